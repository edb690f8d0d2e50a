"""Nodes of Blended Latent Diffusion."""
