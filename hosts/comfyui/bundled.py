"""The bundled model as native objects, from its files in diffusers layout. ComfyUI's own loaders know only large models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...pipelines.core.errors import LoadError
from ..bundled import expand_embedding

STOCK_WIDTH = 128  # channels of the VAE that ComfyUI's memory estimates are made for


class BundledConfig(comfy.supported_models_base.BASE):
    """A small SD 1.x: eps prediction on the scaled linear schedule, the same number of heads in every block."""

    editkit_family = "bundled"
    unet_extra_config: dict[str, int] = {}  # the base class would force 64 channels per head
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}
    memory_usage_factor = 0.2


def build_bundled(
    folder: Path, *, model_type: comfy.model_base.ModelType = comfy.model_base.ModelType.EPS
) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of `folder`, all in float32. Raises LoadError for files that are not such a model."""
    vae_config = _config(folder / "vae")
    scale = float(vae_config.get("scaling_factor", 0.18215))
    return _model(folder / "unet", scale, model_type), _clip(folder / "text_encoder"), _vae(folder / "vae", vae_config)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LoadError(f"{folder.name}/config.json is missing: the folder is not a model in diffusers layout")
    return json.loads(path.read_text())


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise LoadError(f"{folder.name}/{path.name} is missing: the model needs its weights as safetensors")
    return {key: value.float() for key, value in load_file(path).items()}


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' U-Net config as arguments of ComfyUI's `UNetModel`."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    down = [1 if "CrossAttn" in kind else 0 for kind in config["down_block_types"]]
    up = [1 if "CrossAttn" in kind else 0 for kind in config["up_block_types"]]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [layers] * len(channels),
        "use_spatial_transformer": True,
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in reversed(up) for _ in range(layers + 1)],
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "num_heads": config["attention_head_dim"],  # in diffusers' SD 1.x configs this is the number of heads
        "num_head_channels": -1,
        "adm_in_channels": None,
        "legacy": False,
        "use_checkpoint": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def _model(folder: Path, scale: float, model_type: comfy.model_base.ModelType) -> Any:
    config = _config(folder)
    native = BundledConfig(unet_config(config))
    native.latent_format = comfy.latent_formats.SD15(scale)
    native.latent_format.latent_rgb_factors = None  # SD 1.5's colours are not this model's
    native.latent_format.taesd_decoder_name = None
    native.set_inference_dtype(torch.float32, None)
    offload = management.unet_offload_device()
    model = comfy.model_base.BaseModel(native, model_type=model_type, device=offload)
    set_groups(model.diffusion_model, config["norm_num_groups"])
    names = comfy.utils.unet_to_diffusers(native.unet_config)
    weights = _weights(folder, "diffusion_pytorch_model")
    unknown = [key for key in weights if key not in names]
    if unknown:
        raise LoadError(f"unet has weights that this layout does not know: {', '.join(unknown[:3])}")
    load(model.diffusion_model, {names[key]: value for key, value in weights.items()}, "unet")
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), offload)


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


def _vae(folder: Path, config: dict[str, Any]) -> Any:
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
    weights = comfy.diffusers_convert.convert_vae_state_dict(_weights(folder, "diffusion_pytorch_model"))
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


def _clip(folder: Path) -> Any:
    config = _config(folder)
    weights = _weights(folder, "model")
    ids = json.loads((folder / "token_ids.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    layout = {key: config[key] for key in (*keys, "max_position_embeddings")}
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
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
