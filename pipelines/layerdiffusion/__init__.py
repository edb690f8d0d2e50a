"""LayerDiffusion (Li et al. 2023)."""
