"""Blended Latent Diffusion (Avrahami et al. 2023)."""
