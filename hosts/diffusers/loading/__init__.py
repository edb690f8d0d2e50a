"""Models from folders in diffusers layout and from single files, and the bundled models.

safetensors only, no network, and no code of a folder: every class is named here, so a configuration cannot name one.
"""

from .models import LoadedModel, flow_over, load_bundled, load_folder, load_model

__all__ = ["LoadedModel", "flow_over", "load_bundled", "load_folder", "load_model"]
