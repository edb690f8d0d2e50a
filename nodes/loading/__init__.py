"""Nodes that load models and images, and that encode and decode images of any size."""
