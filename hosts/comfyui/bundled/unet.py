"""The bundled U-Net as native objects, from its files in diffusers layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch

from ....pipelines.core.errors import LoadError
from .parts import build_clip, build_vae, latent_format, load, read_config, read_weights, set_groups


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
    scale = float(read_config(folder / "vae").get("scaling_factor", 0.18215))
    return _model(folder / "unet", scale, model_type), build_clip(folder / "text_encoder"), build_vae(folder / "vae")


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
    config = read_config(folder)
    native = BundledConfig(unet_config(config))
    native.latent_format = latent_format(scale)
    native.set_inference_dtype(torch.float32, None)
    offload = management.unet_offload_device()
    model = comfy.model_base.BaseModel(native, model_type=model_type, device=offload)
    set_groups(model.diffusion_model, config["norm_num_groups"])
    names = comfy.utils.unet_to_diffusers(native.unet_config)
    weights = read_weights(folder, "diffusion_pytorch_model")
    unknown = [key for key in weights if key not in names]
    if unknown:
        raise LoadError(f"unet has weights that this layout does not know: {', '.join(unknown[:3])}")
    load(model.diffusion_model, {names[key]: value for key, value in weights.items()}, "unet")
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), offload)
