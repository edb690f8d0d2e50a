"""Random checkpoint files of SD 1.x, SD 2.x and SDXL under the names of the original code, at reduced width.

The names are written here once more, from the side of the diffusers models, so that the loader is compared with something.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from editkit.tests.parity import tiny

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def configs(family: str) -> dict[str, Any]:
    """The configurations of `loading/configs` with two levels and few channels."""
    xl, two = family == "sdxl", family == "sd2"
    towers = [tower(16), tower(24)] if xl else [tower(16)]
    unet: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [16, 32], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "norm_num_groups": 8,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": [2, 4] if xl or two else 4,
        "cross_attention_dim": 40 if xl else 16, "use_linear_projection": xl or two,
    }  # fmt: skip
    if xl:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        unet |= {**added, "projection_class_embeddings_input_dim": 6 * 8 + 24, "transformer_layers_per_block": [2, 1]}
    vae = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 4, "norm_num_groups": 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 32, "scaling_factor": 0.13025 if xl else 0.18215,
        **({"force_upcast": True} if xl else {}),
    }  # fmt: skip
    return {"unet": unet, "vae": vae, "text": towers}


def tower(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    return {**sizes, **ids, "projection_dim": width, "max_position_embeddings": 77, "hidden_act": "gelu"}


def models(family: str) -> dict[str, Any]:
    """The random networks: unet, vae, and text with one or two models."""
    made = configs(family)
    classes = [CLIPTextModel, CLIPTextModelWithProjection]
    text = [cls(CLIPTextConfig(**config)) for cls, config in zip(classes, made["text"], strict=False)]
    return {
        "unet": tiny.randomise(UNet2DConditionModel.from_config(made["unet"])),
        "vae": tiny.randomise(AutoencoderKL.from_config(made["vae"]), 1),
        "text": [tiny.randomise(model, 2 + number) for number, model in enumerate(text)],
    }


def checkpoint(family: str, made: dict[str, Any], **extra: Tensor) -> dict[str, Tensor]:
    """The weights of the networks under the original names."""
    first = made["text"][0]
    weights = renamed(made["unet"], unet_name, "model.diffusion_model.")
    weights |= vae_weights(made["vae"])
    if family == "sd2":
        return {**weights, **open_clip(first, "cond_stage_model.model."), **extra}
    prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
    weights |= renamed(first, lambda name: f"text_model.{name.removeprefix('text_model.')}", prefix)
    if family == "sdxl":
        weights |= open_clip(made["text"][1], "conditioner.embedders.1.model.")
    return {**weights, **extra}


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, path)
    return path


def renamed(model: nn.Module, rename: Callable[[str], str], prefix: str) -> dict[str, Tensor]:
    return {prefix + rename(name): value for name, value in model.state_dict().items()}


def swapped(name: str, table: dict[str, str]) -> str:
    """`name` with its beginning replaced, where the table has it."""
    found = next((old for old in table if name.startswith(f"{old}.")), None)
    return name if found is None else table[found] + name[len(found) :]


def unet_name(name: str) -> str:
    """A U-Net's layer in the original code: two resnets a level on the way down, three on the way up."""
    words = name.split(".")
    if words[0] == "mid_block":
        place = int(words[2]) * 2 if words[1] == "resnets" else 1
        return f"middle_block.{place}.{swapped('.'.join(words[3:]), RESNET if words[1] == 'resnets' else {})}"
    if words[0] not in ("down_blocks", "up_blocks"):
        return swapped(name, ENDS)
    level, kind, number, rest = int(words[1]), words[2], int(words[3]), ".".join(words[4:])
    if words[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * (level + 1)}.0.{rest.replace('conv', 'op')}"
        block = f"input_blocks.{3 * level + number + 1}"
    else:
        block = f"output_blocks.{3 * level + (2 if kind == 'upsamplers' else number)}"
    if kind == "upsamplers":
        return f"{block}.1.{rest}"  # the only level with one has no attention
    return f"{block}.0.{swapped(rest, RESNET)}" if kind == "resnets" else f"{block}.1.{rest}"


def vae_weights(vae: nn.Module) -> dict[str, Tensor]:
    found = renamed(vae, vae_name, "first_stage_model.")
    return {
        name: value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
        for name, value in found.items()
    }


def vae_name(name: str) -> str:
    words = name.split(".")
    if len(words) < 3 or words[1] not in ("down_blocks", "up_blocks", "mid_block"):
        return name.replace("conv_norm_out", "norm_out")
    if words[1] == "mid_block":
        rest = ".".join(words[4:])
        part = f"block_{int(words[3]) + 1}" if words[2] == "resnets" else "attn_1"
        return f"{words[0]}.mid.{part}.{rest if words[2] == 'resnets' else swapped(rest, ATTENTION)}"
    level = int(words[2]) if words[1] == "down_blocks" else 3 - int(words[2])
    side = words[1].removesuffix("_blocks")
    part = f"block.{words[4]}" if words[3] == "resnets" else f"{words[3].removesuffix('rs')}"
    part = part if words[3] == "resnets" else f"{side}sample"
    return f"{words[0]}.{side}.{level}.{part}.{'.'.join(words[5:]).replace('conv_shortcut', 'nin_shortcut')}"


def open_clip(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A text model under open_clip's names, with q, k and v as one matrix."""
    state = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        out["text_projection"] = state["text_projection.weight"].T
    for name, value in state.items():
        if name.startswith("encoder.layers.") and not any(f"{letter}_proj" in name for letter in "qkv"):
            number, _, rest = name.removeprefix("encoder.layers.").partition(".")
            out[f"transformer.resblocks.{number}.{swapped(rest, LAYER)}"] = value
    for number in range(2):
        for end in ("weight", "bias"):
            parts = [state[f"encoder.layers.{number}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            out[f"transformer.resblocks.{number}.attn.in_proj_{end}"] = torch.cat(parts)
    return {prefix + name: value for name, value in out.items()}
