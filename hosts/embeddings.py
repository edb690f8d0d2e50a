"""Embeddings between nodes: on the compute device, the host's to evict; and sockets that take them for a negative.

EDITKIT_EMBEDDINGS holds negatives (null-text, negative-prompt inversion) or values (StyleDiffusion); each kind is refused by
name where the other is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipelines.core.errors import EditError
from ..pipelines.core.protocols import Context
from ..pipelines.core.tensor_files import read_tensors
from ..pipelines.inversion.negative_embeddings import FORMAT, Embeddings, read_embeddings, save_embeddings
from ..pipelines.stylediffusion.value_embeddings import (
    VALUES_FORMAT,
    ValueEmbeddings,
    read_value_embeddings,
    save_value_embeddings,
)
from .sockets import conditioning, context, held
from .trajectory import HeldTrajectory

EXPECTED = "connect 'Null-text inversion', 'Negative-prompt inversion' or 'Load embeddings'"
EXPECTED_VALUES = "connect 'Learn a picture's values (StyleDiffusion)' or 'Load embeddings'"


class HeldEmbeddings:
    """What an EDITKIT_EMBEDDINGS socket holds of null-text or negative-prompt inversion; immutable."""

    def __init__(self, embeddings: Embeddings) -> None:
        base = embeddings.base
        if base.host is None:  # from a file: by its CONDITIONING a host knows what the steps' negatives derive from
            base = replace(base, host=conditioning(base))
        self._bare = replace(embeddings, base=base, tokens=None, trajectory=None)
        self._tokens = None if embeddings.tokens is None else held(embeddings.tokens)
        self._trajectory = None if embeddings.trajectory is None else HeldTrajectory(embeddings.trajectory, {})

    def get(self) -> Embeddings:
        """The embeddings on their device."""
        tokens: Tensor | None = None if self._tokens is None else self._tokens()
        return replace(
            self._bare, tokens=tokens, trajectory=None if self._trajectory is None else self._trajectory.get()
        )

    def __repr__(self) -> str:
        return f"Embeddings(steps={self._bare.steps}, family={self._bare.family!r})"


class HeldValueEmbeddings:
    """What an EDITKIT_EMBEDDINGS socket holds of StyleDiffusion; immutable.

    Attributes:
        rest: entries of the LATENT that was inverted, as far as they are known: results inherit them.
    """

    def __init__(self, values: ValueEmbeddings, like: Mapping[str, Any]) -> None:
        known = {} if values.image is None else {"editkit_factor": values.image[0], "editkit_size": values.image[1:]}
        self.rest = {**known, **like}
        if {"editkit_factor", "editkit_size"} <= set(self.rest):
            values = replace(values, image=(self.rest["editkit_factor"], *self.rest["editkit_size"]))
        nothing = values.shift.new_empty(0)  # not a view, which would keep the memory
        bare = replace(values.trajectory, latents=nothing, source_latent=nothing)
        self._bare, self._trajectory = (
            replace(values, scale=None, shift=nothing, trajectory=bare),
            HeldTrajectory(values.trajectory, {}),
        )
        self._scale = None if values.scale is None else held(values.scale)
        self._shift, self._shape = held(values.shift), list(values.shift.shape)

    def get(self) -> ValueEmbeddings:
        """The values on their device."""
        scale = None if self._scale is None else self._scale()
        return replace(self._bare, scale=scale, shift=self._shift(), trajectory=self._trajectory.get())

    def __repr__(self) -> str:
        return f"ValueEmbeddings(steps={self._shape[0]}, images={self._shape[1]}, family={self._bare.family!r})"


def embeddings_out(
    embeddings: Embeddings | ValueEmbeddings, like: Mapping[str, Any] | None = None
) -> HeldEmbeddings | HeldValueEmbeddings:
    """What to put on the socket; nothing is copied to the host. `like`: the rest of the LATENT that values belong to."""
    return (
        HeldValueEmbeddings(embeddings, like or {})
        if isinstance(embeddings, ValueEmbeddings)
        else HeldEmbeddings(embeddings)
    )


def save_learned(embeddings: Embeddings | ValueEmbeddings, path: Path) -> Path:
    """Write a safetensors file that `load_learned` reads; folders are made."""
    if isinstance(embeddings, Embeddings):
        return save_embeddings(embeddings, path)
    return save_value_embeddings(embeddings, path)


def load_learned(path: Path) -> Embeddings | ValueEmbeddings:
    """Negatives or value embeddings, whichever the file holds. Raises LoadError for any other file."""
    kind, tensors, about = read_tensors(path, (FORMAT, VALUES_FORMAT))
    read = read_embeddings if kind == FORMAT else read_value_embeddings
    return read(path, tensors, about)


def learned_in(value: Any, socket: str = "embeddings") -> Embeddings | ValueEmbeddings:
    """The embeddings of a socket, of either kind. Raises EditError for something else."""
    return (
        value_embeddings_in(value, socket)
        if isinstance(value, (HeldValueEmbeddings, ValueEmbeddings))
        else embeddings_in(value, socket)
    )


def value_embeddings_in(value: Any, socket: str = "embeddings") -> ValueEmbeddings:
    """The values of a socket. Raises EditError for negatives and for something else."""
    if isinstance(value, ValueEmbeddings):
        return value
    if isinstance(value, (HeldEmbeddings, Embeddings)):
        raise EditError(f"{socket} holds negatives, not what a picture's values are: {EXPECTED_VALUES}")
    if not isinstance(value, HeldValueEmbeddings):
        raise EditError(f"{socket} is a {type(value).__name__}: {EXPECTED_VALUES}")
    return value.get()


def value_embeddings_rest(value: Any) -> dict[str, Any]:
    """A LATENT without samples, for results made from values."""
    return dict(value.rest) if isinstance(value, HeldValueEmbeddings) else {}


def embeddings_in(value: Any, socket: str = "embeddings") -> Embeddings:
    """The embeddings of a socket. Raises EditError for something else."""
    if isinstance(value, Embeddings):
        value = HeldEmbeddings(value)
    if isinstance(value, (HeldValueEmbeddings, ValueEmbeddings)):
        raise EditError(f"{socket} holds the values of StyleDiffusion, which are no negative prompt: {EXPECTED}")
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
