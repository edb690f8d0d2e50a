"""ComfyUI's MODEL, CLIP, VAE and CONDITIONING as the protocols of `pipelines/core`. Only this folder imports comfy."""
