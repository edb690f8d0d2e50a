"""Attention control in a diffusers U-Net: hooks for the duration of one `denoise` call.

Layers are found by the structure of `UNet2DConditionModel` (SD 1.x, SD 2.x, SDXL and the bundled model) and numbered as in
Stable Diffusion's original files (see `Site`). The user's own processors run at every site that the control does not want,
and they are always back in place afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...pipelines.core.attention_sites import Controlled, FeatureSite, Place, Row, Site
from ...pipelines.core.errors import FamilyError, ParameterError


@dataclass(frozen=True)
class _Layer:
    """One attention module and its place. `halvings` = how often the grid was halved there."""

    module: Any
    place: Place
    block: int
    blocks: int
    depth: int
    cross: bool
    halvings: int


@dataclass(frozen=True)
class _Block:
    """One residual block, with the transformer that follows it, if any."""

    residual: Any
    transformer: Any | None
    place: Place
    block: int
    blocks: int
    halvings: int


class ControlledCall:
    """A control and the call it is in; the hooks ask it where they are."""

    def __init__(self, controlled: Controlled, sigma: float, latent_pixels: tuple[int, int]) -> None:
        self.control = controlled.control
        self.rows_of = controlled.rows
        self.sigma = sigma
        self.latent_pixels = latent_pixels
        self.rows: tuple[Row, ...] = ()
        """The batch rows of the network call that is about to run."""

    def grid(self, halvings: int) -> tuple[int, int]:
        height, width = (-(-side // 2**halvings) for side in self.latent_pixels)
        return height, width


@contextmanager
def attention_hooks(
    unet: Any, controlled: Controlled, sigma: float, latent_pixels: tuple[int, int]
) -> Iterator[ControlledCall]:
    """Hooks that are in place inside the block and always removed after it. Set `rows` before each network call.

    Args:
        unet: a `UNet2DConditionModel`.
        controlled: the control, and what the rows of the batch are.
        sigma: of the call.
        latent_pixels: height and width of the latent.
    Raises: FamilyError for networks without the attention layers of a Stable Diffusion U-Net, and for processors that
    do more than attention; ParameterError where gradient checkpointing would run layers again after the hooks are gone.
    """
    if torch.is_grad_enabled() and _recomputes(unet):
        raise ParameterError(
            "gradient checkpointing is on: it runs layers again when the attention control is gone; "
            "call disable_gradient_checkpointing() on the U-Net"
        )
    blocks = list(_blocks(unet))
    layers = list(_layers(blocks))
    call = ControlledCall(controlled, sigma, latent_pixels)
    replaced: list[tuple[Any, bool, Any]] = []
    handles = []
    try:
        for layer, site in zip(layers, _sites(layers, call), strict=True):
            # Not through set_processor, which would move a processor that is a module to the end of the weights' order.
            own = vars(layer.module)
            replaced.append((layer.module, "processor" in own, own.get("processor")))
            own["processor"] = _Processor(call, site, layer.module.processor)
        for block in blocks:
            if call.control.wants_features(block.place, block.block, block.blocks):
                handles.append(block.residual.conv2.register_forward_hook(_feature_hook(call, block)))
        yield call
    finally:
        for handle in handles:
            handle.remove()
        for module, had, processor in replaced:
            if had:
                vars(module)["processor"] = processor
            else:
                del vars(module)["processor"]


def _recomputes(unet: Any) -> bool:
    """Whether gradient checkpointing is on. (diffusers' own property walks through every module.)"""
    parts = [part for name in ("down_blocks", "up_blocks") for part in getattr(unet, name, ())]
    return any(getattr(part, "gradient_checkpointing", False) for part in [*parts, getattr(unet, "mid_block", None)])


# ------------------------------------------------------------------------------------------------------------ structure
def _blocks(unet: Any) -> Iterator[_Block]:
    """Every residual block in order of execution, numbered per place."""
    down, middle, up = (getattr(unet, name, None) for name in ("down_blocks", "mid_block", "up_blocks"))
    if down is None or up is None:
        raise FamilyError(
            f"{type(unet).__name__} has no U-Net blocks: attention control works on SD 1.x, SD 2.x and SDXL; for "
            "transformer models use a mask (blended edit, DiffEdit) or an inversion with another prompt"
        )
    halvings = 0
    number = 1
    total = 1 + sum(len(part.resnets) + int(bool(part.downsamplers)) for part in down)
    for part in down:
        for residual, transformer in _paired(part):
            yield _Block(residual, transformer, "down", number, total, halvings)
            number += 1
        number += bool(part.downsamplers)
        halvings += bool(part.downsamplers)
    if middle is not None:  # distilled models may have none
        yield _Block(middle.resnets[0], _only(middle), "mid", 0, 2, halvings)
        yield _Block(middle.resnets[-1], None, "mid", 1, 2, halvings)
    number = 0
    total = sum(len(part.resnets) for part in up)
    for part in up:
        for residual, transformer in _paired(part):
            yield _Block(residual, transformer, "up", number, total, halvings)
            number += 1
        halvings -= bool(part.upsamplers)


def _paired(part: Any) -> list[tuple[Any, Any | None]]:
    transformers = list(getattr(part, "attentions", None) or [None] * len(part.resnets))
    if len(transformers) != len(part.resnets):
        raise _unknown(part)
    return list(zip(part.resnets, transformers, strict=True))


def _only(middle: Any) -> Any | None:
    transformers = list(getattr(middle, "attentions", None) or [None])
    if len(transformers) != 1 or len(middle.resnets) != 2:
        raise _unknown(middle)
    return transformers[0]


def _unknown(part: Any) -> FamilyError:
    return FamilyError(
        f"this network has a {type(part).__name__}, whose attention is not that of a Stable Diffusion U-Net: "
        "attention control works on SD 1.x, SD 2.x and SDXL"
    )


def _layers(blocks: list[_Block]) -> Iterator[_Layer]:
    """Self- and cross-attention of every transformer layer, in order of execution."""
    for block in blocks:
        if block.transformer is None:
            continue
        if not hasattr(block.transformer, "transformer_blocks"):
            raise _unknown(block.transformer)
        blocks_here = 1 if block.place == "mid" else block.blocks
        for depth, layer in enumerate(block.transformer.transformer_blocks):
            for module in (layer.attn1, layer.attn2):
                if module is not None:
                    cross = bool(module.is_cross_attention)
                    yield _Layer(module, block.place, block.block, blocks_here, depth, cross, block.halvings)


def _sites(layers: list[_Layer], call: ControlledCall) -> Iterator[Site]:
    """The site of each layer, without the batch rows, which every network call sets."""
    places = [(layer.place, layer.block, layer.depth) for layer in layers]
    order = {place: index for index, place in enumerate(dict.fromkeys(places))}
    cross = frozenset((layer.place, call.grid(layer.halvings)) for layer in layers if layer.cross)
    for layer, place in zip(layers, places, strict=True):
        yield Site(
            place=layer.place,
            block=layer.block,
            blocks=layer.blocks,
            depth=layer.depth,
            order=order[place],
            layers=len(order),
            grid=call.grid(layer.halvings),
            latent_pixels=call.latent_pixels,
            cross=layer.cross,
            sigma=call.sigma,
            rows=(),
            cross_grids=cross,
        )


# ---------------------------------------------------------------------------------------------------------------- hooks
def _feature_hook(call: ControlledCall, block: _Block) -> Any:
    """A hook on the last convolution of a residual block; its output is added to the skip connection."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        site = FeatureSite(block.place, block.block, block.blocks, call.latent_pixels, call.sigma, call.rows)
        return call.control.features(output, site)

    return hook


class _Processor:
    """Replaces a processor. It runs the original at sites that the control does not want."""

    def __init__(self, call: ControlledCall, site: Site, original: Any) -> None:
        self.call = call
        self.site = site
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See diffusers' `AttnProcessor`."""
        site = replace(self.site, rows=self.call.rows)
        if not self.call.control.wants(site):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        self._check(attn, hidden_states, attention_mask)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        key, value = self.call.control.inputs(source, source, site)
        q, k, v = (
            _split(project(x), attn.heads)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, key), (attn.to_v, value))
        )
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        out = self.call.control.attend(q, k, v, site)
        if out is None:
            out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor

    def _check(self, attn: Any, hidden_states: Tensor, mask: Tensor | None) -> None:
        """Refuse modules for which this processor would compute something else than the original."""
        from diffusers.models import attention_processor as known

        plain = (
            known.AttnProcessor,
            known.AttnProcessor2_0,
            known.FusedAttnProcessor2_0,
            known.SlicedAttnProcessor,
            known.XFormersAttnProcessor,
        )
        if type(self.original) not in plain:
            raise FamilyError(
                f"the U-Net's attention processor {type(self.original).__name__} does more than attention, so that "
                "attention control cannot take its place: remove it (set_default_attn_processor) for this edit"
            )
        special = (mask, attn.group_norm, attn.spatial_norm)
        if hidden_states.ndim != 3 or any(part is not None for part in special) or attn.residual_connection:
            raise _unknown(attn)


def _split(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads * d] as [rows, heads, tokens, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
