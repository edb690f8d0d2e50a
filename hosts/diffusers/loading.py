"""Loading a folder in diffusers layout: the bundled model or a user's checkpoint. safetensors only, no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...pipelines.core.errors import FamilyError, LoadError
from ..bundled import tiny_folder
from .denoiser import FAMILIES, DiffusersDenoiser
from .schedules import sigma_table, timestep_spacing
from .text_encoder import ClipBpe, ClipTextEncoder, ClipTower, TransformersTokenizer
from .vae import DiffusersCodec


@dataclass
class LoadedModel:
    """The networks of one folder."""

    denoiser: DiffusersDenoiser
    codec: DiffusersCodec
    text: Any

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LoadedModel:
        for module in (self.denoiser.unet, self.codec.vae, *self.text.modules()):
            module.to(device=device, dtype=dtype)
        return replace(self)


def load_bundled(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The bundled model. Raises LoadError if its files are missing."""
    return load_folder(tiny_folder(), device, dtype)


def load_folder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A model from a folder with `unet`, `vae`, `text_encoder`, `tokenizer` (and `_2` for SDXL) and `scheduler`.

    Args:
        folder: path of the model folder.
        device: of all networks.
        dtype: of U-Net, text encoder and VAE; float32 for a VAE whose config asks for it (SDXL's overflows in float16).
    Raises: LoadError (missing or unsafe files), FamilyError (a family that this host cannot run).
    """
    folder = Path(folder).expanduser()
    if (folder / "transformer").is_dir():
        raise FamilyError(
            f"{folder.name} is a transformer (flow) model: headless runs SD 1.x, SD 2.x and SDXL; use ComfyUI for it"
        )
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        if not (folder / part).is_dir():
            raise LoadError(
                f"{folder} has no folder {part!r}: give a model folder in diffusers layout, not a single file"
            )
    with quiet_transformers():
        unet, vae = _unet(folder, dtype), _vae(folder, dtype)
        text = _text(folder, dtype)
    codec = DiffusersCodec(vae.to(device))
    denoiser = _denoiser(folder, unet.to(device), codec)
    for module in text.modules():
        module.to(device)
    return LoadedModel(denoiser, codec, text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read ({error}): is the folder complete?") from error


def _from_pretrained(cls: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    try:
        model = cls.from_pretrained(str(folder / part), torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{folder / part} cannot be loaded ({error}): safetensors files in diffusers layout are needed"
        ) from error
    return model.eval().requires_grad_(False)


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    return _from_pretrained(UNet2DConditionModel, folder, "unet", dtype)


def _vae(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    force = _read_json(folder / "vae" / "config.json").get("force_upcast", False) and dtype == torch.float16
    return _from_pretrained(AutoencoderKL, folder, "vae", torch.float32 if force else dtype)


def _text(folder: Path, dtype: torch.dtype) -> ClipTextEncoder:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    compact = folder / "text_encoder" / "token_ids.json"
    if compact.exists():
        return ClipTextEncoder([_compact_tower(folder, compact, dtype)])
    two = (folder / "text_encoder_2").is_dir()
    layer = -2 if two else None
    towers = [
        ClipTower(
            _tokenizer(folder, "tokenizer"), _from_pretrained(CLIPTextModel, folder, "text_encoder", dtype), layer
        )
    ]
    if two:
        second = _from_pretrained(CLIPTextModelWithProjection, folder, "text_encoder_2", dtype)
        towers.append(ClipTower(_tokenizer(folder, "tokenizer_2"), second, layer))
    return ClipTextEncoder(towers)


def _tokenizer(folder: Path, part: str) -> TransformersTokenizer:
    from transformers import AutoTokenizer

    try:
        return TransformersTokenizer(
            AutoTokenizer.from_pretrained(str(folder / part), local_files_only=True, use_fast=True)
        )
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder / part} cannot be loaded ({error}): the folder needs its tokenizer files") from error


def _compact_tower(folder: Path, compact: Path, dtype: torch.dtype) -> ClipTower:
    """The bundled text encoder stores the embeddings of its grammar's words only; every other word gets their mean."""
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from ..bundled import VOCABULARY, expand_embedding

    config = _read_json(folder / "text_encoder" / "config.json")
    ids = json.loads(compact.read_text(encoding="utf-8"))
    state = {
        k.removeprefix("text_model."): v for k, v in load_file(folder / "text_encoder" / "model.safetensors").items()
    }
    name = "embeddings.token_embedding.weight"
    state[name] = expand_embedding(state[name], ids, VOCABULARY)
    model = CLIPTextModel(CLIPTextConfig(**{**config, "vocab_size": VOCABULARY}))
    target = getattr(model, "text_model", model)
    target.load_state_dict(state)
    return ClipTower(ClipBpe(), model.to(dtype).eval().requires_grad_(False))


def _denoiser(folder: Path, unet: Any, codec: DiffusersCodec) -> DiffusersDenoiser:
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    width = unet.config["cross_attention_dim"]
    family = "bundled" if (folder / "text_encoder" / "token_ids.json").exists() else FAMILIES.get(width)
    if family is None:
        raise FamilyError(
            f"{folder.name} has text width {width}: SD 1.x has 768, SD 2.x 1024, SDXL 2048; others are not supported"
        )
    return DiffusersDenoiser(
        unet=unet,
        table=sigma_table(scheduler),
        prediction=scheduler.get("prediction_type", "epsilon"),
        family=family,
        scaling_factor=float(codec.vae.config["scaling_factor"]),
        factor=codec.factor,
        spacing=timestep_spacing(scheduler),
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings about the compact vocabulary, and no progress bars for small files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
