"""Joint attention of text and image tokens (MMDiT: SD3, Flux), edited without stored maps.

One softmax A = softmax(Q K^T / sqrt(d)) runs over the text tokens T, which come first, and the image tokens I. An edit acts
on the image rows, whose blocks A^IT and A^II are what cross- and self-attention are in a U-Net. An edited row keeps its sum
(docs/methods.md, section 18.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Attention
from .pair_control import Partners

PADDING = 8  # channels for one more value: attention kernels want a head width that 8 divides


@dataclass(frozen=True)
class WordMix:
    """An edit of A^IT in one step, folded into the values (`step_ranges.folded_weights`): A_s W1 + A_t W2.

    Attributes:
        from_source: W1 [T, T].
        from_target: the diagonal of W2 [T].
        source_rest: the share of each source token that W1 leaves out [T], before words are weighted.
        target_share: the share of each target token that W2 keeps [T], before words are weighted.
    """

    from_source: Tensor
    from_target: Tensor
    source_rest: Tensor
    target_share: Tensor

    def to(self, like: Tensor) -> WordMix:
        """In the dtype and on the device of `like`."""
        parts = (self.from_source, self.from_target, self.source_rest, self.target_share)
        return WordMix(*(part.to(like.dtype).to(like.device) for part in parts))


def with_image_of(x: Tensor, source_of: Tensor, text: int) -> Tensor:
    """x [rows, heads, text + image tokens, d] with the image tokens of row `source_of[i]` behind the text tokens of row i."""
    return torch.cat([x[:, :, :text], x[:, :, text:].index_select(0, source_of)], dim=2)


def mixed_words(
    inputs: tuple[Tensor, Tensor, Tensor],
    layout: tuple[Tensor, Tensor],
    partners: Partners,
    mix: WordMix,
    text: int,
    attention: Attention,
) -> Tensor:
    """Joint attention in which the target's image tokens attend to words as their source does.

    With A_s of the source and A of the target, in the target's image rows,

        A* = [A_s^IT W1 + r A^IT W2, r A^II],    r = (1 - what W1 takes) / (what A keeps).

    r leaves the sum of a row at 1 before words are weighted. The target's text rows stay its own.

    Args:
        inputs: q, k and v of the layer, [rows, heads, T + I, d].
        layout: queries and keys of A for every row: those of the layer, or with the source's image tokens.
        partners: the targets and their sources.
        mix: of this step, in the dtype and on the device of the inputs.
        text: T.
        attention: computes softmax(q k^T / sqrt(d)) v.
    Returns: [rows, heads, T + I, d].
    Source: Hertz et al. 2022, section 3, on the blocks of the joint map (Shin et al. 2025); docs/methods.md, section 18.4.
    """
    q, k, v = inputs
    targets, sources = partners.targets, partners.sources
    own_q, own_k, own_v = (x.index_select(0, targets) for x in (*layout, v))
    words, image = own_v[:, :, :text], own_v[:, :, text:]
    out = _attention_elsewhere(layout, v, targets, attention)
    out.index_copy_(0, targets, _padded_rows(attention(own_q[:, :, :text], own_k, own_v), image.shape[2]))
    source_q, source_k = q.index_select(0, sources)[:, :, text:], k.index_select(0, sources)
    source_v = torch.cat([mix.from_source @ words, torch.zeros_like(image)], dim=2)
    from_source, rest = _attention_and_share(source_q, source_k, source_v, mix.source_rest, attention)
    target_v = torch.cat([words * mix.from_target[:, None], image], dim=2)
    from_target, kept = _attention_and_share(own_q[:, :, text:], own_k, target_v, mix.target_share, attention)
    scale = rest.clamp(min=0) / kept.clamp(min=torch.finfo(kept.dtype).tiny)
    out[targets, :, text:] = from_source + scale * from_target
    return out


def _attention_elsewhere(layout: tuple[Tensor, Tensor], v: Tensor, targets: Tensor, attention: Attention) -> Tensor:
    """Attention in all rows but `targets`, where it is left empty."""
    others = torch.ones(len(v), dtype=torch.bool, device=v.device)
    others[targets] = False
    out = torch.empty_like(v)
    if bool(others.any()):
        out[others] = attention(layout[0][others], layout[1][others], v[others])
    return out


def _padded_rows(x: Tensor, count: int) -> Tensor:
    return F.pad(x, (0, 0, 0, count))


def _attention_and_share(
    q: Tensor, k: Tensor, v: Tensor, text_share: Tensor, attention: Attention
) -> tuple[Tensor, Tensor]:
    """Attention, and the attention that goes to the image tokens and to `text_share` of each text token.

    Args:
        q: queries [pairs, heads, N, d].
        k, v: keys and values [pairs, heads, T + I, d].
        text_share: [T], 0 to 1.
        attention: as in `mixed_words`.
    Returns: [pairs, heads, N, d] and [pairs, heads, N, 1].
    """
    width, wide = v.shape[-1], v.shape[-1] + PADDING
    share = torch.ones_like(v[..., :1])
    share[:, :, : len(text_share), 0] = text_share
    # A kernel divides by the square root of the padded width.
    q = F.pad(q * (wide / width) ** 0.5, (0, PADDING))
    k = F.pad(k, (0, PADDING))
    out = attention(q, k, F.pad(torch.cat([v, share], dim=-1), (0, PADDING - 1)))
    return out[..., :width], out[..., width : width + 1]


def mutual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_of: Tensor,
    text: int,
    attention: Attention,
) -> Tensor:
    """Joint attention in which image tokens attend to the source's image tokens and to their own text (MasaCtrl).

    Args:
        q, k, v: of the layer [rows, heads, T + I, d].
        source_of: for every row the row whose image tokens it attends to, int64 [rows].
        text: T.
        attention: as in `mixed_words`.
    Returns: [rows, heads, T + I, d]; the text tokens attend to their own row.
    """
    words = attention(q[:, :, :text], k, v)
    keys, values = (with_image_of(x, source_of, text) for x in (k, v))
    return torch.cat([words, attention(q[:, :, text:], keys, values)], dim=2)


def image_word_maps(q: Tensor, k: Tensor, weights: Tensor, text: int, attention: Attention) -> Tensor:
    """The attention of image tokens to words, A^IT of the chosen words only; no map is stored.

    Args:
        q, k: of the layer [rows, heads, T + I, d].
        weights: weight of every text token in every word, float32 [T, words].
        text: T.
        attention: as in `mixed_words`.
    Returns: float32 [rows, I, words], averaged over heads.
    """
    parts: Sequence[Tensor] = weights.to(q.device, q.dtype).split(q.shape[-1], dim=1)
    maps = []
    for part in parts:  # as many words at a time as values are wide, so that every attention kernel takes them
        values = F.pad(part, (0, q.shape[-1] - part.shape[1], 0, q.shape[2] - text))
        out = attention(q[:, :, text:], k, values.expand(*q.shape[:2], -1, -1))
        maps.append(out[..., : part.shape[1]].float().mean(1))
    return torch.cat(maps, dim=-1)
