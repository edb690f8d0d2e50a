"""Nodes of LayerDiffusion and Imagic."""
