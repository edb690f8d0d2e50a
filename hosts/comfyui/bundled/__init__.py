"""The bundled models as native objects. ComfyUI's own loaders know only large models."""

from .flow import build_bundled_flow
from .unet import build_bundled

__all__ = ["build_bundled", "build_bundled_flow"]
