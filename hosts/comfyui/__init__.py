"""ComfyUI's MODEL, CLIP, VAE and CONDITIONING as the protocols; the only place that imports comfy."""
