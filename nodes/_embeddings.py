"""Embeddings between nodes: on the compute device, the host's to evict; and sockets that take them for a negative."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..pipelines.embeddings import Embeddings
from ..pipelines.errors import EditError
from ..pipelines.protocols import Context
from ._host_base import conditioning, context, held
from ._trajectory import HeldTrajectory

EXPECTED = "connect 'Null-text inversion', 'Negative-prompt inversion' or 'Load embeddings'"


class HeldEmbeddings:
    """What an EDITKIT_EMBEDDINGS socket holds of null-text or negative-prompt inversion; immutable."""

    def __init__(self, embeddings: Embeddings) -> None:
        base = embeddings.base
        if base.host is None:  # from a file: by its CONDITIONING a host knows what the steps' negatives derive from
            base = replace(base, host=conditioning(base))
        self._bare = replace(embeddings, base=base, tokens=None, path=None)
        self._tokens = None if embeddings.tokens is None else held(embeddings.tokens)
        self._path = None if embeddings.path is None else HeldTrajectory(embeddings.path, {})

    def get(self) -> Embeddings:
        """The embeddings on their device."""
        tokens: Tensor | None = None if self._tokens is None else self._tokens()
        return replace(self._bare, tokens=tokens, path=None if self._path is None else self._path.get())

    def __repr__(self) -> str:
        return f"Embeddings(steps={self._bare.steps}, family={self._bare.family!r})"


def embeddings_out(embeddings: Embeddings) -> HeldEmbeddings:
    """What to put on the socket; nothing is copied to the host."""
    return HeldEmbeddings(embeddings)


def embeddings_in(value: Any, socket: str = "embeddings") -> Embeddings:
    """The embeddings of a socket. Raises EditError for something else."""
    if isinstance(value, Embeddings):
        value = HeldEmbeddings(value)
    if not isinstance(value, HeldEmbeddings):
        raise EditError(f"{socket} is a {type(value).__name__}, which is no negative prompt: {EXPECTED}")
    return value.get()


def negative_in(value: Any, socket: str = "negative") -> Context | Embeddings:
    """The negative of a socket that takes CONDITIONING or EDITKIT_EMBEDDINGS (one negative per step)."""
    return context(value, socket) if isinstance(value, (list, tuple)) else embeddings_in(value, socket)


def prompts_to_open(*prompts: Context | Embeddings | None) -> list[Context]:
    """What `open_denoiser` must know of positives and negatives; negatives per step derive from one base."""
    return [prompt.base if isinstance(prompt, Embeddings) else prompt for prompt in prompts if prompt is not None]


def opened_for(positive: Context, negative: Context | Embeddings, scale: float) -> list[Context]:
    """What `open_denoiser` must know of an edit at a guidance scale: a negative that is not evaluated is none of it."""
    guides = scale != 1 if isinstance(negative, Context) else negative.guides(scale)
    return prompts_to_open(positive, negative if guides else None)
