"""Models for scripts: a folder in diffusers layout, a checkpoint file, the bundled models, rankers, and images to edit.

The adapters that stand behind them implement `pipelines/core/protocols.py`. Each name loads its module, and each module
its library, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...pipelines.core.lazy import lazy_names

if TYPE_CHECKING:
    from ..bundled.example_images import EXAMPLES, Example, load_example, load_image, load_mask
    from .finetune import with_changes
    from .image_encoder import load_vision_tokens
    from .loading import LoadedModel, load_bundled, load_folder, load_model
    from .open_clip_ranker import OpenClipRanker, load_bundled_ranker, load_open_clip, load_ranker

__all__ = [
    "EXAMPLES",
    "Example",
    "LoadedModel",
    "OpenClipRanker",
    "load_bundled",
    "load_bundled_ranker",
    "load_example",
    "load_folder",
    "load_image",
    "load_mask",
    "load_model",
    "load_open_clip",
    "load_ranker",
    "load_vision_tokens",
    "with_changes",
]

# Where each name is defined, for the loader; the imports above say the same to type checkers.
_HOMES = {
    "..bundled.example_images": "EXAMPLES Example load_example load_image load_mask",
    ".loading": "LoadedModel load_bundled load_folder load_model",
    ".finetune": "with_changes",
    ".image_encoder": "load_vision_tokens",
    ".open_clip_ranker": "OpenClipRanker load_bundled_ranker load_open_clip load_ranker",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
