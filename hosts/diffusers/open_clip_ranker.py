"""Ranker over open_clip: the bundled one, or any architecture with the user's own weight file. Nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipelines.core.errors import FamilyError, LoadError, out_of_memory
from ..bundled import expand_embedding, ranker_folder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG, TOKEN_IDS = "open_clip_config.json", "token_ids.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
EMBEDDING = "text.token_embedding.weight"
# Width, patch size and embedding of the image towers that open_clip weights usually have.
TOWERS = {
    (768, 16, 512): "ViT-B-16",
    (768, 32, 512): "ViT-B-32",
    (1024, 14, 768): "ViT-L-14",
    (1280, 14, 1024): "ViT-H-14",
    (1664, 14, 1280): "ViT-bigG-14",
}
# Entries that a file may lack or have in excess.
HARMLESS = (
    "num_batches_tracked",
    "position_ids",
    "attn_mask",
    "logit_scale",
    "logit_bias",
    "input_resolution",
    "context_length",
    "vocab_size",
)


@dataclass
class OpenClipRanker:
    """A `Ranker`: unit embeddings of images and texts, float32.

    Attributes:
        model: an open_clip CLIP or CustomTextCLIP, float32, in eval mode.
        tokenize: texts to token ids [N, T].
        size: height and width that the image tower takes, in pixels.
        mean, std: per-channel normalisation, applied after any masking.
        interpolation: "bicubic" or "bilinear", both antialiased.
        resize_mode: for images of another aspect: "squash" them, fit the "shortest" side and crop the centre, or fit the
            "longest" side and pad with zeros (open_clip's preprocess_cfg).
    """

    model: Any
    tokenize: Any
    size: tuple[int, int]
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> OpenClipRanker:
        self.model.to(device)
        return self

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of IMAGEs [B, H, W, 3] in [0, 1], resized and normalised here."""
        with torch.no_grad():
            return F.normalize(self.model.encode_image(self.prepare(images)).float(), dim=-1)

    def image_tokens(self, images: Tensor) -> Tensor:
        """The image tower as an `ImageEncoder`: tokens [B, S, W] of IMAGEs [B, H, W, 3] in [0, 1], float32.

        Transformers give every token after their last norm, the class token first, without the projection: 197 of width
        768 for ViT-B/16. Residual networks give the input of their attention pool: the mean of the feature map, and its pixels.
        Raises: FamilyError for towers of another kind.
        """
        with torch.no_grad():
            return tower_tokens(self.model.visual, self.prepare(images)).float()

    def prepare(self, images: Tensor) -> Tensor:
        """IMAGEs [B, H, W, 3] in [0, 1] as the image tower takes them, [B, 3, *size]."""
        images = self._fit(images.movedim(-1, 1).to(self.device, torch.float32)).clamp(0, 1)  # bicubic overshoots
        mean, std = (images.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (images - mean) / std

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D]; a text is cut at the model's context length."""
        with torch.no_grad():
            return F.normalize(self.model.encode_text(self.tokenize(list(texts)).to(self.device)).float(), dim=-1)

    def _fit(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        tall, wide = self.size
        if self.resize_mode == "squash":
            return self._resize(images, tall, wide)
        pick = max if self.resize_mode == "shortest" else min
        scale = pick(tall / height, wide / width)
        images = self._resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
        rows, columns = tall - images.shape[-2], wide - images.shape[-1]
        above, left = rows // 2, columns // 2
        return F.pad(images, (left, columns - left, above, rows - above))  # negative pads cut

    def _resize(self, images: Tensor, height: int, width: int) -> Tensor:
        if images.shape[-2:] == (height, width):
            return images
        return F.interpolate(images, (height, width), mode=self.interpolation, antialias=True, align_corners=False)


def tower_tokens(tower: Any, images: Tensor) -> Tensor:
    """`OpenClipRanker.image_tokens` of prepared images [B, 3, *size]; differentiable."""
    if hasattr(tower, "attnpool"):
        for part in (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            images = part(images)
        pixels = images.flatten(2).transpose(1, 2)  # of the feature map
        return torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1)
    if not hasattr(tower, "ln_post"):
        raise FamilyError(
            f"the image tower {type(tower).__name__} has no tokens to give: choose a CLIP ViT, such as ViT-B-16"
        )
    found = tower.forward_intermediates(
        images,
        indices=1,
        normalize_intermediates=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat([found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]], dim=1)


def load_bundled_ranker(device: torch.device | str = "cpu") -> OpenClipRanker:
    """The ranker that ships with the pack. Raises LoadError if its files are missing."""
    return load_ranker(ranker_folder(), device)


def load_ranker(folder: str | Path, device: torch.device | str = "cpu") -> OpenClipRanker:
    """A ranker from a folder with open_clip_config.json and its weights (safetensors, or .bin without code in it).

    With a token_ids.json, the stored text embedding has rows for those tokens only, and is expanded (see `bundled`).
    Raises: LoadError, FamilyError.
    """
    folder = Path(folder).expanduser()
    config = _read_json(folder / CONFIG)
    if "model_cfg" not in config:
        raise LoadError(f"{folder / CONFIG} has no model_cfg: it is not an open_clip configuration")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise LoadError(f"{folder} has none of {', '.join(WEIGHTS)}: put the ranker's weights beside its configuration")
    state = _read_weights(weights)
    if (folder / TOKEN_IDS).is_file() and EMBEDDING in state:
        state[EMBEDDING] = expand_embedding(state[EMBEDDING], _read_json(folder / TOKEN_IDS))
    return _ranker(config["model_cfg"], config.get("preprocess_cfg", {}), state, folder.name).to(device)


def architecture_of(weights: Path) -> str:
    """open_clip's name for the architecture of a safetensors file, by the shape of its image tower. Raises LoadError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), "pt") as file:
            width, _, patch, _ = file.get_slice("visual.conv1.weight").get_shape()
            return TOWERS[width, patch, file.get_slice("visual.proj").get_shape()[1]]
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise LoadError(
            f"the architecture of {weights.name} is not one of {', '.join(TOWERS.values())}: it needs open_clip's image and text "
            "encoder in one file; write the name of another architecture, such as ViT-L-14-336"
        ) from error


def load_open_clip(architecture: str, weights: str | Path, device: torch.device | str = "cpu") -> OpenClipRanker:
    """A ranker of one of open_clip's architectures, such as "ViT-B-16", with a local weight file.

    Args:
        architecture: a name of `open_clip.list_models()`; OpenAI's weights need one ending in "-quickgelu".
        weights: a .safetensors file, or one that torch reads without running code; no names of pretrained weights.
    Raises: LoadError, FamilyError.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise LoadError(
            f"weights {str(weights)!r} is not a file: EditKit downloads nothing, so download the weights"
            " (safetensors) yourself and give their path"
        )
    if ":" in architecture:
        raise LoadError(
            f"architecture {architecture!r} would be fetched from a network: give an open_clip name such as 'ViT-B-16'"
        )
    from open_clip import get_model_config, list_models

    config = get_model_config(architecture)
    if config is None:
        near = [name for name in list_models() if architecture.lower()[:5] in name.lower()][:8]
        raise LoadError(
            f"open_clip knows no architecture {architecture!r}: did you mean one of"
            f" {', '.join(near) or 'ViT-B-16, ViT-L-14'}?"
        )
    return _ranker(config, {}, _read_weights(path), architecture).to(device)


def _ranker(
    model_config: dict[str, Any], preprocess: dict[str, Any], state: dict[str, Tensor], name: str
) -> OpenClipRanker:
    from open_clip import SimpleTokenizer

    text = model_config.get("text_cfg", {})
    if "hf_model_name" in text or "hf_tokenizer_name" in text or "siglip" in name.lower():
        raise FamilyError(
            f"{name} needs a tokenizer from a network: choose a model with CLIP's own, such as ViT-B-16 or ViT-L-14"
        )
    model = _build(model_config, state, name)
    if preprocess.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise LoadError(
            f"interpolation {preprocess['interpolation']!r} of {name} is unknown: bicubic and bilinear are supported"
        )
    size = preprocess.get("size", getattr(model.visual, "image_size", 224))
    return OpenClipRanker(
        model,
        SimpleTokenizer(context_length=int(text.get("context_length", 77)), **(text.get("tokenizer_kwargs") or {})),
        (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[0]), int(size[1])),
        tuple(preprocess.get("mean", CLIP_MEAN)),
        tuple(preprocess.get("std", CLIP_STD)),
        preprocess.get("interpolation", "bicubic"),
        preprocess.get("resize_mode", "shortest"),
    )


def _build(model_config: dict[str, Any], state: dict[str, Tensor], name: str) -> nn.Module:
    from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict

    config = {key: value for key, value in model_config.items() if key != "custom_text"}
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    custom = bool(model_config.get("custom_text"))
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):  # initial weights draw random numbers
            model = (CustomTextCLIP if custom else CLIP)(**config)
        state = convert_to_custom_text_state_dict(state) if custom else state
        missing = model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise LoadError(
            f"the weights do not fit {name} ({_first_line(error)}): check the architecture's name"
        ) from error
    wrong = [key for key in (*missing.missing_keys, *missing.unexpected_keys) if not key.endswith(HARMLESS)]
    if wrong:
        raise LoadError(
            f"the weights do not fit {name} ({len(wrong)} names differ, first {wrong[0]!r}): check the architecture's"
            " name"
        )
    return model.eval().requires_grad_(False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file. Raises LoadError for a file that could run code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise LoadError(
            f"{path.name} cannot be read as plain weights ({_first_line(error)}): convert it to safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LoadError(f"{path.name} does not hold named tensors: convert it to safetensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read ({_first_line(error)}): is the folder complete?") from error


__all__ = ["OpenClipRanker", "load_bundled_ranker", "load_open_clip", "load_ranker", "tower_tokens"]
