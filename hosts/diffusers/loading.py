"""Loading a folder in diffusers layout: the bundled model or a user's checkpoint.

safetensors only, no network, and no code of the folder: every class is named here, so a configuration cannot name one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...pipelines.core.errors import EditError, FamilyError, LoadError
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
    Returns: the networks, in eval mode. No random number is drawn.
    Raises: LoadError (missing, incomplete or unsafe files), FamilyError (a family that this host cannot run).
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}: give a model folder in diffusers layout")
    if (folder / "transformer").is_dir():
        raise FamilyError(
            f"{folder.name} is a transformer (flow) model: headless runs SD 1.x, SD 2.x and SDXL; use ComfyUI for it"
        )
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        if not (folder / part).is_dir():
            raise LoadError(
                f"{folder} has no folder {part!r}: give a model folder in diffusers layout, not a single file"
            )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # initial weights draw random numbers
        unet, vae = _unet(folder, dtype), _vae(folder, dtype)
        text = _text(folder, dtype)
    _check_fit(folder, unet, vae, text)
    codec = DiffusersCodec(vae.to(device))
    denoiser = _denoiser(folder, unet.to(device), codec)
    for module in text.modules():
        module.to(device)
    return LoadedModel(denoiser, codec, text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read ({error}): is the folder complete?") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds no configuration: is the folder complete?")
    return value


def _from_pretrained(cls: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One network of the folder, frozen. Raises LoadError where a file is missing, or one of its weights."""
    where = folder / part
    _read_json(where / "config.json")
    try:
        model, found = cls.from_pretrained(
            str(where), torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a damaged folder makes the libraries raise errors of every kind
        raise LoadError(
            f"{where} cannot be loaded ({_brief(error)}): safetensors files in diffusers layout are needed"
        ) from error
    _check_complete(where, found.get("missing_keys", ()), found.get("mismatched_keys", ()))
    return model.eval().requires_grad_(False)


def _check_complete(where: Path, missing: Iterable[Any], mismatched: Iterable[Any]) -> None:
    """Refuse a checkpoint whose network would keep random initial weights."""
    lost = sorted(str(name) for name in missing)
    lost += sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in mismatched)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise LoadError(
            f"{where} lacks {len(lost)} of its weights ({', '.join(lost[:5])}{more}): download the whole checkpoint again"
        )


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


def _brief(error: BaseException) -> str:
    """The message in one line; libraries print paragraphs."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    _text_width(_read_json(folder / "unet" / "config.json"))
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
    return ClipTextEncoder(towers, zeros_for_empty=two and zeros_for_empty_prompt(folder))


def zeros_for_empty_prompt(folder: Path) -> bool:
    """Whether model_index.json of an SDXL folder asks for zeros in place of an empty negative prompt."""
    index = folder / "model_index.json"
    return index.is_file() and bool(_read_json(index).get("force_zeros_for_empty_prompt", False))


def _tokenizer(folder: Path, part: str) -> TransformersTokenizer:
    """CLIP's tokenizer with the folder's vocabulary. The class is named, so that the folder cannot bring its own."""
    from transformers import CLIPTokenizerFast

    try:
        return TransformersTokenizer(
            CLIPTokenizerFast.from_pretrained(str(folder / part), local_files_only=True, trust_remote_code=False)
        )
    except Exception as error:  # the tokenizer's parser raises nothing more special
        raise LoadError(
            f"{folder / part} cannot be loaded ({_brief(error)}): the folder needs the files of a CLIP tokenizer"
        ) from error


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
