"""Flow transformers from model folders in diffusers layout: SD3 and Flux."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ....pipelines.core.errors import EditError, FamilyError, LoadError
from ..flow_denoiser import FlowDenoiser
from ..flux_denoiser import FluxDenoiser
from ..schedules import flow_table
from ..text_encoder import FluxTextEncoder, Sd3TextEncoder
from ..vae import DiffusersCodec
from .files import from_pretrained, load_vae, quiet_transformers, read_json
from .text import load_flux_text, load_sd3_text

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
PARTS = ("vae", "text_encoder", "text_encoder_2", "scheduler")


def load_flow_parts(
    folder: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[FlowDenoiser, DiffusersCodec, Sd3TextEncoder | FluxTextEncoder]:
    """The networks of an SD3 or Flux folder: `transformer`, `vae`, the text encoders with tokenizers, and `scheduler`.

    Args:
        folder: path of the model folder.
        device: of all networks.
        dtype: of all networks; float32 for a VAE whose config asks for it.
    Returns: denoiser, codec and text encoder, in eval mode. No random number is drawn.
    Raises: LoadError (missing, incomplete or unsafe files), FamilyError (a family that this host cannot run).
    """
    kind = _transformer_class(folder)
    for part in PARTS:
        if not (folder / part).is_dir():
            raise LoadError(f"{folder} has no folder {part!r}: give a whole model folder in diffusers layout")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # initial weights draw random numbers
        codec = DiffusersCodec(load_vae(folder, dtype).to(device))
    denoiser = flow_denoiser(folder, codec, device, dtype)
    if denoiser.channels != codec.channels:
        raise FamilyError(
            f"{folder.name}: the VAE has {codec.channels} latent channels but the transformer takes {denoiser.channels}: "
            "use the VAE and the base model of one family"
        )
    load_text = load_sd3_text if kind == SD3 else load_flux_text
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        text = load_text(folder, dtype, int(denoiser.network.config["joint_attention_dim"]))
    for module in text.modules():
        module.to(device)
    return denoiser, codec, text


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
    kind = _transformer_class(folder)
    table = _table(folder)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # initial weights draw random numbers
        transformer = _transformer(folder, kind, dtype)
    config = codec.vae.config
    return (FluxDenoiser if kind == FLUX else FlowDenoiser)(
        transformer=transformer.to(device),
        table=table,
        scaling_factor=float(config["scaling_factor"]),
        shift_factor=float(config.get("shift_factor") or 0.0),
    )


def _table(folder: Path) -> torch.Tensor:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        return flow_table(scheduler)
    except EditError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise LoadError(f"{folder.name}/scheduler has a noise schedule that cannot be read ({error})") from error


def _transformer_class(folder: Path) -> str:
    """The class of a folder's transformer. Raises FamilyError for one that this host cannot run."""
    kind = read_json(folder / "transformer" / "config.json").get("_class_name", "")
    if kind not in (SD3, FLUX):
        raise FamilyError(
            f"{folder.name} has a transformer of class {kind!r}: headless runs those of SD3 and Flux; use ComfyUI for others"
        )
    return str(kind)


def _transformer(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    return from_pretrained(
        FluxTransformer2DModel if kind == FLUX else SD3Transformer2DModel, folder, "transformer", dtype
    )
