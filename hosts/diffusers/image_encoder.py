"""transformers' CLIP vision models as `ImageEncoder`; those of open_clip are rankers (`open_clip_ranker.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pipelines.core.errors import LoadError


@dataclass
class VisionTokens:
    """A transformers CLIP vision model with its image processor: every token after the last norm, without the projection."""

    model: Any
    processor: Any

    def image_tokens(self, images: Tensor) -> Tensor:
        """Tokens [B, S, W] of IMAGEs [B, H, W, 3] in [0, 1]."""
        weight = next(self.model.parameters())
        processed = self.processor(images=list(images.cpu().numpy()), return_tensors="pt", do_rescale=False)
        with torch.no_grad():
            hidden = self.model(processed["pixel_values"].to(weight)).last_hidden_state
            vision = getattr(self.model, "vision_model", self.model)
            return vision.post_layernorm(hidden).float()


def load_vision_tokens(folder: str | Path, device: torch.device | str = "cpu") -> VisionTokens:
    """A CLIP vision model from a local folder of transformers (config.json, safetensors, preprocessor_config.json).

    Raises: LoadError.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModel

    path = Path(folder).expanduser()
    try:
        model = CLIPVisionModel.from_pretrained(str(path), use_safetensors=True, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path} cannot be loaded ({error}): a CLIP vision model in transformers' layout is needed"
        ) from error
    return VisionTokens(model.to(device).eval().requires_grad_(False), processor)


__all__ = ["VisionTokens", "load_vision_tokens"]
