"""Whoever runs the network, behind `pipelines/core/protocols.py`: ComfyUI, diffusers, and the bundled model's files."""
