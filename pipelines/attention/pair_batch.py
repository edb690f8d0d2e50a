"""Source and target side by side in one batch, an order that no host splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.attention_sites import Branch, Role, RowMap
from ..core.errors import ShapeError
from ..core.protocols import Context
from ..core.shapes import match_batch

PAIR: tuple[Role, ...] = ("source", "target")
TRIO: tuple[Role, ...] = ("source", "target", "target")


def pair_rows(images: int, branches: Sequence[Branch]) -> RowMap:
    """Source and target of each image side by side: source 0, target 0, source 1, target 1, and so on.

    Hosts that repeat a two-row context over a batch repeat it in this order, and any even division of the batch keeps pairs
    whole.
    """
    batch: tuple[tuple[Role, int], ...] = tuple((role, image) for image in range(images) for role in PAIR)
    return RowMap(batch, tuple(branches))


def trio_rows(images: int, source_branch: Branch) -> RowMap:
    """The source in one branch and the target in both, per image, under one context with a row for each.

    The order is source, conditional target, unconditional target, as in `trio_context`.
    """
    batch: tuple[tuple[Role, int], ...] = tuple((role, image) for image in range(images) for role in TRIO)
    trio: tuple[Branch, ...] = (source_branch, "cond", "uncond")
    return RowMap(batch, (source_branch,), trio * images)


def single_rows(images: int, branches: Sequence[Branch], role: Role = "target") -> RowMap:
    """A batch of one role alone."""
    return RowMap(tuple((role, image) for image in range(images)), tuple(branches))


def interleave(*parts: Tensor) -> Tensor:
    """Source and target, [B, ...] each, as [2 B, ...] in the order of `pair_rows`; any number of parts likewise."""
    return torch.stack(parts, dim=1).flatten(0, 1)


def separate(rows: Tensor, parts: int = 2) -> tuple[Tensor, ...]:
    """The inverse of `interleave`: (source, target)."""
    return tuple(rows[part::parts] for part in range(parts))


def pair_context(source: Context, target: Context, images: int) -> Context:
    """One context [2 images, T, D] for the rows of `pair_rows`; what a host attached to the target is kept."""
    return _interleaved((source, target), images, target)


def trio_context(source: Context, cond: Context, uncond: Context, images: int) -> Context:
    """One context for the rows of `trio_rows`. Only for contexts that are `mergeable`.

    Args:
        source: prompt of the source, tokens [1 or images, T, D].
        cond: the target's prompt, of the same T and D; the result carries its text.
        uncond: the negative prompt, of the same T and D.
        images: images in the batch.
    Returns: a context with tokens [3 images, T, D]: source, conditional and unconditional target of each image.
    Raises: ShapeError for a context with another number of entries than 1 or `images`.
    """
    return _interleaved((source, cond, uncond), images, cond)


def mergeable(*contexts: Context) -> bool:
    """Whether contexts may become the rows of one: no host has attached anything to them, and sizes agree."""
    bare = all(context.host is None for context in contexts)
    pooled = {context.pooled is None for context in contexts}
    return bare and len(pooled) == 1 and len({context.tokens.shape[1:] for context in contexts}) == 1


def _interleaved(contexts: Sequence[Context], images: int, named: Context) -> Context:
    """The contexts row by row; text and host attachments are those of `named`."""

    def rows(values: Sequence[Tensor]) -> Tensor:
        return interleave(*(match_batch(value, images, "prompt", "latent").to(values[-1]) for value in values))

    sizes = {tuple(context.tokens.shape[1:]) for context in contexts}
    if len(sizes) > 1:
        found = " and ".join(f"{tokens} x {width}" for tokens, width in sorted(sizes))
        raise ShapeError(
            f"the prompts have text embeddings of {found} (tokens x width): encode all with this model's CLIP, as long as the "
            "longest"
        )
    pooled = [context.pooled for context in contexts if context.pooled is not None]
    all_pooled = rows(pooled) if len(pooled) == len(contexts) else None
    return replace(named, tokens=rows([context.tokens for context in contexts]), pooled=all_pooled)
