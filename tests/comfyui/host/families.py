"""Native models of the published families with random weights: every block of the published layout, few channels.

The networks are ComfyUI's own classes, made by its own model configs, so that whatever distinguishes a family in ComfyUI
(v prediction, pooled text, joint blocks, shifted flow, in-place blocks) is there. Text widths are the published ones
where that is what a family is recognised by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models as supported
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor, nn

HEAD = 16  # channels of an attention head of SD 2.x and SDXL, published 64
WIDTH = 48  # of the text of transformers
END = 49407  # token that ends a text, and pads SD 1.x
V_PREDICTION = {
    "output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])
}  # what ComfyUI looks at
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True,
    "legacy": False, "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip


class Family(NamedTuple):
    """How to build a family.

    Attributes:
        model: makes the MODEL.
        clip: makes the CLIP.
        channels: of the latent.
        name: of the family in errors, as ComfyUI calls its network.
    """

    model: Callable[[], Any]
    clip: Callable[[], Any]
    channels: int
    name: str


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights under which activations keep their size. Token embeddings become windows of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(module.named_parameters()):
            if name.endswith("token_embedding.weight"):  # 49408 rows, which would take memory
                sequence = torch.randn(sum(value.shape), generator=generator)
                value.data = sequence.as_strided(value.shape, (1, 1))
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            elif "norm" in name and name.endswith(("weight", "scale")):
                value.copy_(1 + 0.05 * noise)
            else:
                value.copy_(0.05 * noise)
        for name, value in module.named_buffers():
            if name.endswith("pos_embed"):  # of SD3, which allocates it and fills it from a checkpoint
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return module.eval().requires_grad_(False)


def patcher(config: Any, weights: dict[str, Tensor]) -> Any:
    """The MODEL of a config of ComfyUI; `weights` are what it looks at to tell variants apart."""
    config.set_inference_dtype(torch.float32, None)
    offload = management.unet_offload_device()
    model = config.get_model(weights, device=offload)
    shake(model.diffusion_model)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), offload)


def unet(kind: Any, depths: list[int], levels: list[int], width: int, **more: Any) -> Any:
    """A MODEL of two residual blocks per level. `depths` are the transformer layers of each level, from the outside in."""
    linear = kind is not supported.SD15
    config = kind({
        **UNET, "channel_mult": levels, "num_res_blocks": [2] * len(levels), "context_dim": width,
        "transformer_depth": [depth for depth in depths for _ in range(2)], "transformer_depth_middle": max(depths[-1], 1),
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "use_linear_in_transformer": linear, "adm_in_channels": more.get("pooled"),
        **({"num_classes": "sequential"} if "pooled" in more else {}),
    })  # fmt: skip
    if linear:
        config.unet_config["num_head_channels"] = HEAD
        config.unet_config.setdefault("num_heads", -1)
    return patcher(config, more.get("weights", {}))


def sd15() -> Any:
    return unet(supported.SD15, [1, 1, 1, 0], [1, 2, 4, 4], 768)


def sd21() -> Any:
    return unet(supported.SD20, [1, 1, 1, 0], [1, 2, 4, 4], 1024, weights=V_PREDICTION)


def sdxl() -> Any:
    """With depths 0, 2 and 3 where 0, 2 and 10 are published."""
    return unet(supported.SDXL, [0, 2, 3], [1, 2, 4], 2048, pooled=2816)


def sd3() -> Any:
    text = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
    config = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None}
    sizes = {"adm_in_channels": WIDTH, "num_patches": 4096, "pos_embed_max_size": 64, "pos_embed_scaling_factor": None}
    return patcher(supported.SD3({**config, **sizes, "context_embedder_config": text}), {})


def known(kind: Any, newer: dict[str, Any]) -> dict[str, Any]:
    """Of the options that newer versions of ComfyUI require, those that this version's configuration has."""
    return {field.name: newer[field.name] for field in fields(kind) if field.name in newer}


def flux() -> Any:
    config = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": WIDTH, "context_in_dim": WIDTH,
        "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 10, 10], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    return patcher(supported.Flux(config | known(FluxParams, {"txt_ids_dims": []})), {})


def lumina2() -> Any:
    config = {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": WIDTH, "dim": 48, "n_layers": 2,
        "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512],
    }  # fmt: skip
    return patcher(supported.Lumina2(config), {})


def qwen_image() -> Any:
    config = {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 24,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 8, 8),
    }  # fmt: skip
    return patcher(supported.QwenImage(config), {})


def hunyuan_image() -> Any:
    config = {
        "image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None,
        "axes_dim": [12, 12], "meanflow": False, "context_in_dim": WIDTH, "hidden_size": 48, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True, "byt5": False,
        "guidance_embed": False,
    }  # fmt: skip
    newer = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    return patcher(supported.HunyuanImage21(config | known(HunyuanVideoParams, newer)), {})


def tower(width: int) -> dict[str, Any]:
    """A text tower of three layers."""
    layers = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    ids = {"max_position_embeddings": 77, "eos_token_id": END, "vocab_size": 49408}
    return {"hidden_size": width, "intermediate_size": 64, **layers, **ids}


def clip(model: Any, tokenizer: Any, **widths: int) -> Any:
    """A CLIP with its published tokenizer and widths."""
    towers = {f"clip_{key}_model_config": tower(width) for key, width in widths.items()}
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    made = comfy.sd.CLIP(target, model_options={**towers, "dtype": torch.float32})
    shake(made.cond_stage_model)
    return made


def clip_sd15() -> Any:
    return clip(comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, l=768)


def clip_sd21() -> Any:
    return clip(comfy.text_encoders.sd2_clip.SD2ClipModel, comfy.text_encoders.sd2_clip.SD2Tokenizer, h=1024)


def clip_sdxl() -> Any:
    return clip(comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, l=768, g=1280)


def clip_narrow() -> Any:
    """Stands in for the encoders of transformers: a CLIP of their text's width."""
    return clip(comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, l=WIDTH)


class UnpaddedClip(comfy.sd1_clip.SD1ClipModel):
    """As Lumina 2's encoder, it leaves the padding out, and says how many tokens count."""

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple:
        text, pooled = super().encode_token_weights(tokens)[:2]
        ids = [entry[0] for entry in tokens["l"][0]]
        count = ids.index(END) + 1
        return text[:, :count], pooled, {"attention_mask": torch.ones(1, count, dtype=torch.long)}


def clip_unpadded() -> Any:
    return clip(UnpaddedClip, comfy.sd1_clip.SD1Tokenizer, l=WIDTH)


def vae(channels: int) -> Any:
    """A VAE of the published four levels."""
    layout = {
        "double_z": True, "z_channels": channels, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    weights = shake(AutoencoderKL(ddconfig=dict(layout), embed_dim=channels), 2).state_dict()
    config = {"params": {"ddconfig": dict(layout), "embed_dim": channels}}
    made = comfy.sd.VAE(sd=weights, config=config, dtype=torch.float32)
    made.latent_channels = channels
    made.first_stage_model.requires_grad_(False)
    return made


FAMILIES = {
    "SD 1.5": Family(sd15, clip_sd15, 4, "SD1"),
    "SD 2.1-v": Family(sd21, clip_sd21, 4, "SD2"),
    "SDXL": Family(sdxl, clip_sdxl, 4, "SDXL"),
    "SD3": Family(sd3, clip_narrow, 16, "SD3"),
    "Flux": Family(flux, clip_narrow, 16, "Flux"),
    "Lumina 2": Family(lumina2, clip_unpadded, 16, "Lumina2"),
    "HunyuanImage 2.1": Family(hunyuan_image, clip_narrow, 64, "HunyuanImage21"),
    "Qwen-Image": Family(qwen_image, clip_narrow, 16, "QwenImage"),
}
