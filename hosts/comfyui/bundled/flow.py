"""The bundled flow transformer as native objects: ComfyUI's SD3 network at the bundled width, from diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ....pipelines.core.errors import LoadError
from ...bundled import FLOW_TEXT_LENGTH
from .parts import build_clip, build_vae, latent_format, load, read_config, read_weights

WINDOW = 77  # tokens of CLIP
HEAD = 64  # channels of an attention head of ComfyUI's SD3, which takes its width as a number of heads


class BundledFlowConfig(comfy.supported_models_base.BASE):
    """A small SD3: rectified flow with a fixed shift."""

    editkit_family = "flow"
    unet_extra_config: dict[str, int] = {}
    memory_usage_factor = 0.2


class BundledFlowTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP's tokenizer. A prompt that fits FLOW_TEXT_LENGTH tokens is padded to these, a longer one to whole windows."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        windows = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        end = self.clip_l.end_token
        return {name: [_without_padding(rows[0], end)] if len(rows) == 1 else rows for name, rows in windows.items()}


class BundledFlowText(comfy.sd1_clip.SD1ClipModel):
    """CLIP's text model, which has a position for every token of a whole window: shorter prompts are padded to one.

    A token attends to those before it only, so that the embeddings of the first tokens do not depend on the padding.
    """

    def encode_token_weights(self, token_weight_pairs: dict[str, list]) -> tuple:
        rows = token_weight_pairs[self.clip_name]
        length = len(rows[0])
        if len(rows) > 1 or length >= WINDOW:
            return super().encode_token_weights(token_weight_pairs)
        padded = [*rows[0], *[rows[0][-1]] * (WINDOW - length)]
        embeddings, *rest = super().encode_token_weights({self.clip_name: [padded]})
        return embeddings[:, :length], *rest


TEXT = comfy.supported_models_base.ClipTarget(BundledFlowTokenizer, BundledFlowText)


def _without_padding(tokens: list[tuple], end: int) -> list[tuple]:
    """A window without the padding beyond FLOW_TEXT_LENGTH tokens. An embedding in the place of a token is a tensor."""
    first = next(place for place, token in enumerate(tokens) if isinstance(token[0], int) and token[0] == end)
    return tokens[:FLOW_TEXT_LENGTH] if first < FLOW_TEXT_LENGTH else tokens


def build_bundled_flow(folder: Path, base: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, all in float32.

    Args:
        folder: holds `transformer` and `scheduler`.
        base: holds `vae` and `text_encoder`.
    Raises: LoadError for files that are not such a model.
    """
    vae_config = read_config(base / "vae")
    return _model(folder, vae_config), build_clip(base / "text_encoder", TEXT), build_vae(base / "vae")


def network_config(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' SD3 config as arguments of ComfyUI's `MMDiT`. Raises LoadError for heads of another width."""
    heads, side = config["num_attention_heads"], config["pos_embed_max_size"]
    if config["attention_head_dim"] != HEAD:
        raise LoadError(f"transformer has heads of {config['attention_head_dim']} channels: ComfyUI's SD3 has {HEAD}")
    embedder = {"in_features": config["joint_attention_dim"], "out_features": config["caption_projection_dim"]}
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "patch_size": config["patch_size"],
        "depth": heads,
        "num_blocks": config["num_layers"],
        "input_size": None,
        "adm_in_channels": config["pooled_projection_dim"],
        "context_embedder_config": {"target": "torch.nn.Linear", "params": embedder},
        "num_patches": side * side,
        "pos_embed_max_size": side,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms" if config["qk_norm"] else None,
    }


def _model(folder: Path, vae_config: dict[str, Any]) -> Any:
    config = read_config(folder / "transformer")
    native = BundledFlowConfig(network_config(config))
    native.sampling_settings = {"shift": float(read_config(folder / "scheduler", "scheduler_config.json")["shift"])}
    native.latent_format = latent_format(float(vae_config["scaling_factor"]))
    native.set_inference_dtype(torch.float32, None)
    offload = management.unet_offload_device()
    model = comfy.model_base.SD3(native, device=offload)
    weights = read_weights(folder / "transformer", "diffusion_pytorch_model")
    load(model.diffusion_model, native_weights(weights, native.unet_config), "transformer")
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), offload)


def native_weights(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """diffusers' SD3 weights under ComfyUI's names.

    Args:
        weights: the transformer's state dict.
        config: from `network_config`.
    Returns: q, k and v of a layer as one matrix; the last block's text modulation and the output's with scale and shift
        in ComfyUI's order. ComfyUI's own table expects as many blocks as heads, so that last block is named here.
    Raises: LoadError for weights that this layout does not have.
    """
    names: dict[str, Any] = comfy.utils.mmdit_to_diffusers(config)
    last, wrong = config["num_blocks"] - 1, config["depth"] - 1
    for part in ("weight", "bias"):
        key, native = (
            "transformer_blocks.{}.norm1_context.linear." + part,
            "joint_blocks.{}.context_block.adaLN_modulation.1.",
        )
        names[key.format(wrong)] = native.format(wrong) + part
        names[key.format(last)] = (native.format(last) + part, None, comfy.utils.swap_scale_shift)
    unknown = [key for key in weights if key not in names]
    if unknown:
        raise LoadError(f"transformer has weights that this layout does not know: {', '.join(unknown[:3])}")
    out: dict[str, Tensor] = {}
    for key, weight in weights.items():
        target, place, change = (
            (*names[key], None, None)[:3] if isinstance(names[key], tuple) else (names[key], None, None)
        )
        if place is None:
            out[target] = weight if change is None else change(weight)
            continue
        axis, begin, length = place
        whole = out.setdefault(target, weight.new_empty((3 * length, *weight.shape[1:])))
        whole.narrow(axis, begin, length).copy_(weight)
    return out
