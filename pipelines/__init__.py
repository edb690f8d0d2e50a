"""The maths of EditKit and its headless API: torch only, no ComfyUI and no diffusers at import."""
