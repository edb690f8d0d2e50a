"""Attention control in diffusers' SD3 and Flux transformers: hooks for the duration of one `denoise` call.

Every block of SD3 has one joint attention; in some, as in SD3.5-medium, a second one of the image tokens alone follows. Text tokens
come first in what a control sees, whatever the order of the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...pipelines.core.attention_sites import Controlled, Site, check_joint, third
from ...pipelines.core.errors import FamilyError, ParameterError
from .attention_hooks import ControlledCall


@contextmanager
def joint_hooks(
    transformer: Any, controlled: Controlled, sigma: float, latent_pixels: tuple[int, int], patch: int
) -> Iterator[ControlledCall]:
    """Hooks that are in place inside the block and always removed after it. Set `rows` before each network call.

    Args:
        transformer: an SD3Transformer2DModel or a FluxTransformer2DModel.
        controlled: the control, and what the rows of the batch are.
        sigma: of the call.
        latent_pixels: height and width of the latent.
        patch: latent pixels on a side of one image token.
    Raises: FamilyError for a control that does not know joint attention, and for processors that do more than attention;
    ParameterError where gradient checkpointing would run layers again after the hooks are gone.
    """
    check_joint(controlled.control, type(transformer).__name__)
    if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
        raise ParameterError(
            "gradient checkpointing is on: it runs layers again when the attention control is gone; "
            "call disable_gradient_checkpointing() on the transformer"
        )
    call = ControlledCall(controlled, sigma, latent_pixels)
    flux = hasattr(transformer, "single_transformer_blocks")
    replaced: list[tuple[Any, bool, Any]] = []
    try:
        text = [0]
        for module, site in _sites(transformer, call, patch):
            # Not through set_processor, which would move a processor that is a module to the end of the weights' order.
            own = vars(module)
            replaced.append((module, "processor" in own, own.get("processor")))
            if flux:
                own["processor"] = _FluxProcessor(call, site, module.processor, text)
            else:
                own["processor"] = _JointProcessor(call, site, module.processor)
        yield call
    finally:
        for module, had, processor in replaced:
            if had:
                vars(module)["processor"] = processor
            else:
                del vars(module)["processor"]


def _sites(transformer: Any, call: ControlledCall, patch: int) -> Iterator[tuple[Any, Site]]:
    """Every attention module with its site, without the batch rows and the text, which every network call sets."""
    height, width = (-(-side // patch) for side in call.latent_pixels)
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]
    for number, block in enumerate(blocks):
        for depth, module in enumerate((block.attn, getattr(block, "attn2", None))):
            if module is None:
                continue
            site = Site(
                place=third(number, len(blocks)),
                block=number,
                blocks=len(blocks),
                depth=depth,
                order=number,
                layers=len(blocks),
                grid=(height, width),
                latent_pixels=call.latent_pixels,
                cross=False,
                sigma=call.sigma,
                rows=(),
            )
            yield module, site


class _Processor:
    """Replaces a processor. It runs the original at sites that the control does not want."""

    original_class: str

    def __init__(self, call: ControlledCall, site: Site, original: Any) -> None:
        self.call = call
        self.site = site
        self.original = original

    def here(self, text: int) -> Site:
        return replace(self.site, rows=self.call.rows, text=text)

    def attended(self, qkv: tuple[Tensor, Tensor, Tensor], site: Site, mask: Tensor | None) -> Tensor:
        """The control's attention, or plain, [rows, text and image tokens, heads * d]."""
        if type(self.original).__name__ != self.original_class or mask is not None:
            raise FamilyError(
                f"the transformer's attention processor {type(self.original).__name__} does more than attention, so that "
                "attention control cannot take its place: remove it for this edit"
            )
        out = self.call.control.attend(*qkv, site)
        if out is None:
            out = F.scaled_dot_product_attention(*qkv)
        return out.transpose(1, 2).flatten(2).to(qkv[0].dtype)


class _JointProcessor(_Processor):
    """SD3's: joint attention, or attention among image tokens where no text comes."""

    original_class = "JointAttnProcessor2_0"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """See diffusers' `JointAttnProcessor2_0`."""
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        site = self.here(text)
        if not self.call.control.wants(site):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **named)
        out = self.attended(_projected(attn, hidden_states, encoder_hidden_states), site, attention_mask)
        image = attn.to_out[1](attn.to_out[0](out[:, text:]))
        if encoder_hidden_states is None:
            return image
        return image, out[:, :text] if attn.context_pre_only else attn.to_add_out(out[:, :text])


class _FluxProcessor(_Processor):
    """Flux's. In a single block text and image come as one sequence; the double blocks before it say how long the text is."""

    original_class = "FluxAttnProcessor"

    def __init__(self, call: ControlledCall, site: Site, original: Any, text: list[int]) -> None:
        super().__init__(call, site, original)
        self.text = text

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """See diffusers' `FluxAttnProcessor`."""
        from diffusers.models.embeddings import apply_rotary_emb

        if encoder_hidden_states is not None:
            self.text[:] = [encoder_hidden_states.shape[1]]
        site = self.here(self.text[0])
        if not self.call.control.wants(site):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        q, k, v = _projected(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=2) for x in (q, k))
        out = self.attended((q, k, v), site, attention_mask)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, site.text :])), attn.to_add_out(out[:, : site.text])


def _projected(attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [rows, heads, text and image tokens, d]."""

    def heads(projection: Any, x: Tensor, norm: Any = None) -> Tensor:
        split = projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return split if norm is None else norm(split)

    q = heads(attn.to_q, image, attn.norm_q)
    k = heads(attn.to_k, image, attn.norm_k)
    v = heads(attn.to_v, image)
    if text is None:
        return q, k, v
    return (
        torch.cat([heads(attn.add_q_proj, text, attn.norm_added_q), q], dim=2),
        torch.cat([heads(attn.add_k_proj, text, attn.norm_added_k), k], dim=2),
        torch.cat([heads(attn.add_v_proj, text), v], dim=2),
    )
