"""Flow transformers from model folders in diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ....pipelines.core.errors import FamilyError
from ..flow_denoiser import FlowDenoiser
from ..schedules import flow_table
from ..vae import DiffusersCodec
from .files import from_pretrained, quiet_transformers, read_json


def flow_denoiser(folder: Path, codec: DiffusersCodec, device: torch.device | str, dtype: torch.dtype) -> FlowDenoiser:
    """The denoiser of a folder with `transformer` and `scheduler`.

    Args:
        folder: path of the model folder.
        codec: the VAE of the model, which has the scale of its latents.
        device: of the transformer.
        dtype: of the transformer.
    Returns: the denoiser, in eval mode. No random number is drawn.
    Raises: LoadError (missing, incomplete or unsafe files), FamilyError (a family that this host cannot run).
    Source: Esser et al. 2024, section 4 (SD3).
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # initial weights draw random numbers
        transformer = _transformer(folder, dtype)
    config = codec.vae.config
    return FlowDenoiser(
        transformer=transformer.to(device),
        table=flow_table(read_json(folder / "scheduler" / "scheduler_config.json")),
        scaling_factor=float(config["scaling_factor"]),
        shift_factor=float(config.get("shift_factor") or 0.0),
    )


def _transformer(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import SD3Transformer2DModel

    kind = read_json(folder / "transformer" / "config.json").get("_class_name", "")
    if kind != "SD3Transformer2DModel":
        raise FamilyError(
            f"{folder.name} has a transformer of class {kind!r}: headless runs SD3's; use ComfyUI for others"
        )
    return from_pretrained(SD3Transformer2DModel, folder, "transformer", dtype)
