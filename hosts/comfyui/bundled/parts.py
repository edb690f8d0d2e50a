"""The parts of the bundled models as native objects: VAE, CLIP, and files in diffusers layout. ComfyUI's own loaders know only
large models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from safetensors.torch import load_file
from torch import Tensor

from ....pipelines.core.errors import LoadError
from ...bundled import expand_embedding

# Red, green and blue of each latent channel and their bias, for sampling previews: a least-squares fit of the example images, in
# all orders of their channels, to their latents.
RGB_FACTORS = [
    [0.1579, 0.0391, 0.1347],
    [0.1628, -0.1675, -0.3141],
    [-0.4065, -0.291, -0.2836],
    [-0.0513, -0.2175, -0.0294],
]
RGB_BIAS = [0.4274, 0.3859, 0.3901]
STOCK_WIDTH = 128  # channels of the VAE that ComfyUI's memory estimates are made for


def latent_format(scale: float) -> Any:
    """SD 1.5's latent format with the bundled VAE's scale and colours."""
    made = comfy.latent_formats.SD15(scale)
    made.latent_rgb_factors = RGB_FACTORS
    made.latent_rgb_factors_bias = RGB_BIAS
    made.taesd_decoder_name = None
    return made


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A configuration file of a model folder. Raises LoadError where it is missing."""
    path = folder / name
    if not path.is_file():
        raise LoadError(f"{folder.name}/{name} is missing: the folder is not a model in diffusers layout")
    return json.loads(path.read_text())


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of a file in float32. Raises LoadError where it is missing."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise LoadError(f"{folder.name}/{path.name} is missing: the model needs its weights as safetensors")
    return {key: value.float() for key, value in load_file(path).items()}


def set_groups(module: torch.nn.Module, groups: int) -> None:
    """Set the groups of every GroupNorm. ComfyUI always builds 32, too many for narrow layers."""
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.num_groups = groups


def load(module: torch.nn.Module, weights: dict[str, Tensor], name: str, *, may_lack: tuple[str, ...] = ()) -> None:
    """Load every weight of a file into a network.

    Args:
        module: the network.
        weights: its state dict.
        name: for messages.
        may_lack: beginnings of names that the file may leave out.
    Raises: LoadError for a file with missing, extra or wrong weights.
    """
    try:
        result = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise LoadError(f"{name} does not fit its config: {str(error).splitlines()[-1].strip()}") from error
    missing = [key for key in result.missing_keys if not key.startswith(may_lack)] if may_lack else result.missing_keys
    if missing or result.unexpected_keys:
        wrong = ", ".join([*missing, *result.unexpected_keys][:3])
        raise LoadError(
            f"{name} does not fit its config: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} too many ({wrong})"
        )


def build_vae(folder: Path) -> Any:
    """The VAE of a folder. Raises LoadError for files of another layout."""
    config = read_config(folder)
    widths = config["block_out_channels"]
    if len(widths) != 4:
        raise LoadError(f"vae has {len(widths)} resolutions: the bundled layout has 4 (factor 8)")
    channels = config["latent_channels"]
    layout = {
        "double_z": True,
        "z_channels": channels,
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    weights = comfy.diffusers_convert.convert_vae_state_dict(read_weights(folder, "diffusion_pytorch_model"))
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": layout, "embed_dim": channels}}, dtype=torch.float32)
    set_groups(vae.first_stage_model, config["norm_num_groups"])
    load(vae.first_stage_model, weights, "vae")
    vae.first_stage_model.requires_grad_(False)
    _scale_memory(vae, widths[0] / STOCK_WIDTH)
    return vae


def _scale_memory(vae: Any, share: float) -> None:
    encode, decode = vae.memory_used_encode, vae.memory_used_decode
    vae.memory_used_encode = lambda shape, dtype: encode(shape, dtype) * share
    vae.memory_used_decode = lambda shape, dtype: decode(shape, dtype) * share


SD1_TEXT = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)


def build_clip(folder: Path, target: Any = SD1_TEXT) -> Any:
    """The CLIP of a folder with a compact vocabulary.

    Args:
        folder: of the text encoder.
        target: tokenizer and text model, as a `ClipTarget`.
    Raises: LoadError for files of another layout.
    """
    config = read_config(folder)
    weights = read_weights(folder, "model")
    ids = json.loads((folder / "token_ids.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    layout = {key: config[key] for key in (*keys, "max_position_embeddings")}
    vocabulary = {"eos_token_id": max(ids), "vocab_size": max(ids) + 1}
    options = {"clip_l_model_config": {**layout, **vocabulary}, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, model_options=options)
    transformer = clip.cond_stage_model.clip_l.transformer
    rows = next(key for key in weights if key.endswith("embeddings.token_embedding.weight"))
    weights[rows] = expand_embedding(weights[rows], ids, max(ids) + 1)
    native = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in weights.items()}
    native = {key: value for key, value in native.items() if not key.endswith("position_ids")}
    native.setdefault("text_projection.weight", torch.eye(config["hidden_size"]))  # SD 1.x does not project
    load(transformer, native, "text_encoder")
    clip.cond_stage_model.requires_grad_(False)
    return clip
