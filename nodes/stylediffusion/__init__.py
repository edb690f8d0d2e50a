"""Nodes of StyleDiffusion."""
