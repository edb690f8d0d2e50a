"""Whole models: a folder in diffusers layout, or a bundled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ....pipelines.core.errors import EditError, FamilyError, LoadError
from ...bundled import BUNDLED, BUNDLED_MODELS, FLOW_TEXT_LENGTH, flow_folder, tiny_folder
from ..denoiser import FAMILIES, DiffusersDenoiser
from ..schedules import sigma_table, timestep_spacing
from ..text_encoder import ClipTextEncoder
from ..vae import DiffusersCodec
from .files import PICKLES, from_pretrained, load_vae, quiet_transformers, read_json
from .flow import flow_denoiser, load_flow_parts
from .single_file import load_single_file
from .text import load_text


@dataclass
class LoadedModel:
    """The networks of one folder."""

    denoiser: Any  # a NetworkDenoiser
    codec: DiffusersCodec
    text: Any

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LoadedModel:
        for module in (self.denoiser.network, self.codec.vae, *self.text.modules()):
            module.to(device=device, dtype=dtype)
        return replace(self)


def load_bundled(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, model: str = BUNDLED
) -> LoadedModel:
    """A bundled model, one of `BUNDLED_MODELS`. Raises LoadError if its files are missing, or for another name."""
    if model not in BUNDLED_MODELS:
        raise LoadError(f"there is no bundled model {model!r}: choose one of {', '.join(BUNDLED_MODELS)}")
    base = load_folder(tiny_folder(), device, dtype)
    if model == BUNDLED:
        return base
    return flow_over(flow_folder(), base)


def flow_over(folder: str | Path, base: LoadedModel) -> LoadedModel:
    """The flow transformer of a folder with the VAE and the text encoder of the bundled U-Net model `base`."""
    text = ClipTextEncoder([replace(base.text.towers[0], short=FLOW_TEXT_LENGTH, pools=True)])
    denoiser = flow_denoiser(Path(folder), base.codec, base.denoiser.device, base.denoiser.dtype)
    return LoadedModel(denoiser, base.codec, text)


def load_model(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model from a folder in diffusers layout (`load_folder`) or a single safetensors file of SD 1.x, SD 2.x or SDXL.

    Args:
        path: of the folder or the file.
        device: of all networks.
        dtype: of all networks; float32 for a VAE that overflows in float16.
    Returns: the networks, in eval mode. No random number is drawn.
    Raises: LoadError (missing, incomplete or unsafe files), FamilyError (a family that this host cannot run).
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in PICKLES and not path.is_dir():
        raise LoadError(f"{path.name} is a pickle, which can run code: give a safetensors file of the model")
    if not path.is_file():
        return load_folder(path, device, dtype)
    if path.suffix.lower() != ".safetensors":
        raise LoadError(f"{path.name} is no safetensors file: give one, or a model folder in diffusers layout")
    return LoadedModel(*load_single_file(path, device, dtype))


def load_folder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A model from a folder in diffusers layout: SD 1.x, SD 2.x, SDXL, SD3 or Flux, told by its configurations.

    It has `unet` or `transformer`, `vae`, `scheduler`, and text encoders with tokenizers (`text_encoder`, `tokenizer`, with
    `_2` and `_3` for further ones). SD3 may lack T5 (`text_encoder_3`).

    Args:
        folder: path of the model folder.
        device: of all networks.
        dtype: of the network, text encoders and VAE; float32 for a VAE whose config asks for it (SDXL's overflows in float16).
    Returns: the networks, in eval mode. No random number is drawn.
    Raises: LoadError (missing, incomplete or unsafe files), FamilyError (a family that this host cannot run).
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}: give a model folder in diffusers layout")
    if (folder / "transformer").is_dir():
        return LoadedModel(*load_flow_parts(folder, device, dtype))
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        if not (folder / part).is_dir():
            raise LoadError(
                f"{folder} has no folder {part!r}: give a model folder in diffusers layout, not a single file"
            )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # initial weights draw random numbers
        unet, vae = _unet(folder, dtype), load_vae(folder, dtype)
        text = load_text(folder, dtype)
    _check_fit(folder, unet, vae, text)
    codec = DiffusersCodec(vae.to(device))
    denoiser = _denoiser(folder, unet.to(device), codec)
    for module in text.modules():
        module.to(device)
    return LoadedModel(denoiser, codec, text)


def _check_fit(folder: Path, unet: Any, vae: Any, text: ClipTextEncoder) -> None:
    """Refuse networks that were not made for each other, and conditions that this host does not give."""
    width = _text_width(unet.config)
    configs: list[Any] = [model.config for model in text.modules()]
    given = sum(int(config.hidden_size) for config in configs)
    if given != width:
        raise FamilyError(
            f"{folder.name}: the text encoder gives embeddings of width {given} but the U-Net takes {width}: "
            "use the text encoder that the model was trained with"
        )
    if int(vae.config["latent_channels"]) != int(unet.config["in_channels"]):
        raise FamilyError(
            f"{folder.name}: the VAE has {vae.config['latent_channels']} latent channels but the U-Net takes "
            f"{unet.config['in_channels']}: use the VAE and the base model of one family"
        )
    for name, known in (
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim_type", None),
        ("class_embed_type", None),
    ):
        if unet.config.get(name) not in (None, known):
            raise FamilyError(
                f"{folder.name} has {name} {unet.config[name]!r}, which headless does not give: use ComfyUI"
            )


def _text_width(config: Mapping[str, Any]) -> int:
    """The width of the U-Net's cross-attention; a list names it once per block. Raises FamilyError where they differ."""
    width = config.get("cross_attention_dim", 1280)  # what diffusers takes where a folder does not say it
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if len(widths) != 1:
        raise FamilyError(
            f"the U-Net's blocks take texts of widths {width}: only models with one text width are supported"
        )
    return int(widths.pop())


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    _text_width(read_json(folder / "unet" / "config.json"))
    return from_pretrained(UNet2DConditionModel, folder, "unet", dtype)


def _denoiser(folder: Path, unet: Any, codec: DiffusersCodec) -> DiffusersDenoiser:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    width = _text_width(unet.config)
    bundled = (folder / "text_encoder" / "token_ids.json").exists()
    family = "bundled" if bundled else FAMILIES.get(width, f"text width {width}")
    try:
        table = sigma_table(scheduler)
    except EditError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoadError(f"{folder.name}/scheduler has a noise schedule that cannot be read ({error})") from error
    return DiffusersDenoiser(
        unet=unet,
        table=table,
        prediction=scheduler.get("prediction_type", "epsilon"),
        family=family,
        scaling_factor=float(codec.vae.config["scaling_factor"]),
        factor=codec.factor,
        spacing=timestep_spacing(scheduler),
    )
