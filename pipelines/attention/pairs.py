"""Source and target side by side in one batch: the order that no host splits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..protocols import Context
from ..shapes import match_batch
from .sites import Branch, Role, RowMap


def pair_rows(images: int, branches: Sequence[Branch]) -> RowMap:
    """Source and target of each image side by side: source 0, target 0, source 1, target 1, and so on.

    Hosts that repeat a two-row context over a batch repeat it in this order, and any even cut of the batch keeps pairs whole.
    """
    batch = tuple((role, image) for image in range(images) for role in ("source", "target"))
    return RowMap(batch, tuple(branches))  # type: ignore[arg-type]  # literals


def single_rows(images: int, branches: Sequence[Branch], role: Role = "target") -> RowMap:
    """A batch of one role alone."""
    return RowMap(tuple((role, image) for image in range(images)), tuple(branches))


def interleave(source: Tensor, target: Tensor) -> Tensor:
    """[B, ...] and [B, ...] as [2B, ...] in the order of `pair_rows`."""
    return torch.stack([source, target], dim=1).flatten(0, 1)


def separate(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `interleave`: (source, target)."""
    return pairs[0::2], pairs[1::2]


def pair_context(source: Context, target: Context, images: int) -> Context:
    """One context [2 images, T, D] for the rows of `pair_rows`; what a host attached to the target is kept."""

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return interleave(match_batch(a, images, "source prompt", "latent"), match_batch(b, images, "prompt", "latent"))

    pooled = None
    if source.pooled is not None and target.pooled is not None:
        pooled = rows(source.pooled, target.pooled)
    return Context(rows(source.tokens, target.tokens), pooled, target.text, target.host)
