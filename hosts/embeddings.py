"""Embeddings on sockets: they stay on the compute device between nodes, and the host may evict them.

EDITKIT_EMBEDDINGS holds one negative per step (null-text or negative-prompt inversion) or value embeddings
(StyleDiffusion). A node that needs the other kind refuses it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipelines.core.errors import EditError
from ..pipelines.core.guidance import check_cfg, warn_of_equal_prompts
from ..pipelines.core.protocols import Context
from ..pipelines.core.tensor_files import read_tensors
from ..pipelines.inversion.negative_embeddings import FORMAT, Embeddings, read_embeddings, save_embeddings
from ..pipelines.stylediffusion.value_embeddings import (
    VALUES_FORMAT,
    ValueEmbeddings,
    read_value_embeddings,
    save_value_embeddings,
)
from .host import keep_on_device
from .sockets import conditioning_of, context_of
from .trajectory import DeviceTrajectory

EXPECTED = "connect 'Null-Text Inversion', 'Negative-Prompt Inversion' or 'Load Inversion Embeddings'"
EXPECTED_VALUES = "connect 'StyleDiffusion Inversion' or 'Load Inversion Embeddings'"


class DeviceEmbeddings:
    """The negatives of null-text or negative-prompt inversion as the value of a socket; immutable."""

    def __init__(self, embeddings: Embeddings) -> None:
        base = embeddings.base
        if base.host is None:  # from a file
            # The host recognises each step's negative by the CONDITIONING that it derives from.
            base = replace(base, host=conditioning_of(base))
        self._bare = replace(embeddings, base=base, tokens=None, trajectory=None)
        self._tokens = None if embeddings.tokens is None else keep_on_device(embeddings.tokens)
        self._trajectory = None if embeddings.trajectory is None else DeviceTrajectory(embeddings.trajectory, {})

    def get(self) -> Embeddings:
        """The embeddings on their device."""
        tokens: Tensor | None = None if self._tokens is None else self._tokens()
        trajectory = None if self._trajectory is None else self._trajectory.get()
        return replace(self._bare, tokens=tokens, trajectory=trajectory)

    def __repr__(self) -> str:
        return f"Embeddings(steps={self._bare.steps}, family={self._bare.family!r})"


class DeviceValueEmbeddings:
    """The value embeddings of StyleDiffusion as the value of a socket; immutable.

    Attributes:
        rest: the known entries of the LATENT that was inverted; results inherit them.
    """

    def __init__(self, values: ValueEmbeddings, like: Mapping[str, Any]) -> None:
        known = {} if values.image is None else {"editkit_factor": values.image[0], "editkit_size": values.image[1:]}
        self.rest = {**known, **like}
        if {"editkit_factor", "editkit_size"} <= set(self.rest):
            values = replace(values, image=(self.rest["editkit_factor"], *self.rest["editkit_size"]))
        nothing = values.shift.new_empty(0)  # a view would keep the memory alive
        bare = replace(values.trajectory, latents=nothing, source_latent=nothing)
        self._bare = replace(values, scale=None, shift=nothing, trajectory=bare)
        self._trajectory = DeviceTrajectory(values.trajectory, {})
        self._scale = None if values.scale is None else keep_on_device(values.scale)
        self._shift = keep_on_device(values.shift)
        self._shape = list(values.shift.shape)

    def get(self) -> ValueEmbeddings:
        """The value embeddings on their device."""
        scale = None if self._scale is None else self._scale()
        return replace(self._bare, scale=scale, shift=self._shift(), trajectory=self._trajectory.get())

    def __repr__(self) -> str:
        return f"ValueEmbeddings(steps={self._shape[0]}, images={self._shape[1]}, family={self._bare.family!r})"


def embeddings_out(
    embeddings: Embeddings | ValueEmbeddings, like: Mapping[str, Any] | None = None
) -> DeviceEmbeddings | DeviceValueEmbeddings:
    """The socket value; nothing is copied to the host. `like`: the other entries of the LATENT that was inverted."""
    if isinstance(embeddings, ValueEmbeddings):
        return DeviceValueEmbeddings(embeddings, like or {})
    return DeviceEmbeddings(embeddings)


def save_learned(embeddings: Embeddings | ValueEmbeddings, path: Path) -> Path:
    """Write a safetensors file that `load_learned` reads; folders are made."""
    if isinstance(embeddings, Embeddings):
        return save_embeddings(embeddings, path)
    return save_value_embeddings(embeddings, path)


def load_learned(path: Path) -> Embeddings | ValueEmbeddings:
    """The negatives or the value embeddings of a file. Raises LoadError for any other file."""
    kind, tensors, about = read_tensors(path, (FORMAT, VALUES_FORMAT))
    read = read_embeddings if kind == FORMAT else read_value_embeddings
    return read(path, tensors, about)


def learned_in(value: Any, socket: str = "embeddings") -> Embeddings | ValueEmbeddings:
    """The embeddings of a socket, of either kind. Raises EditError for something else."""
    return (
        value_embeddings_in(value, socket)
        if isinstance(value, (DeviceValueEmbeddings, ValueEmbeddings))
        else embeddings_in(value, socket)
    )


def value_embeddings_in(value: Any, socket: str = "embeddings") -> ValueEmbeddings:
    """The value embeddings of a socket. Raises EditError for negatives and for something else."""
    if isinstance(value, ValueEmbeddings):
        return value
    if isinstance(value, (DeviceEmbeddings, Embeddings)):
        raise EditError(f"{socket} holds negatives, but value embeddings are needed: {EXPECTED_VALUES}")
    if not isinstance(value, DeviceValueEmbeddings):
        raise EditError(f"{socket} is a {type(value).__name__}: {EXPECTED_VALUES}")
    return value.get()


def value_embeddings_rest(value: Any) -> dict[str, Any]:
    """The other entries of the LATENT that was inverted, for results made from value embeddings."""
    return dict(value.rest) if isinstance(value, DeviceValueEmbeddings) else {}


def embeddings_in(value: Any, socket: str = "embeddings") -> Embeddings:
    """The embeddings of a socket. Raises EditError for something else."""
    if isinstance(value, Embeddings):
        value = DeviceEmbeddings(value)
    if isinstance(value, (DeviceValueEmbeddings, ValueEmbeddings)):
        raise EditError(f"{socket} holds value embeddings (StyleDiffusion), which are no negative prompt: {EXPECTED}")
    if not isinstance(value, DeviceEmbeddings):
        raise EditError(f"{socket} is a {type(value).__name__}, which is no negative prompt: {EXPECTED}")
    return value.get()


def negative_in(value: Any, socket: str = "negative") -> Context | Embeddings:
    """The negative of a socket that takes CONDITIONING or EDITKIT_EMBEDDINGS (one negative per step)."""
    return context_of(value, socket) if isinstance(value, (list, tuple)) else embeddings_in(value, socket)


def prompts_to_open(*prompts: Context | Embeddings | None) -> list[Context]:
    """The contexts for `open_denoiser` of some positives and negatives; per-step negatives derive from one base."""
    return [prompt.base if isinstance(prompt, Embeddings) else prompt for prompt in prompts if prompt is not None]


def opened_for(positive: Context, negative: Context | Embeddings, scale: float) -> list[Context]:
    """The contexts for `open_denoiser` of an edit at a guidance scale: without the negative if that is not needed.

    Raises: ParameterError for a scale below 1. Warns where both prompts are equal.
    """
    check_cfg(scale)
    if isinstance(negative, Context) and scale != 1:
        warn_of_equal_prompts(positive, negative, "guidance has no effect; write what the image should show")
    return prompts_to_open(positive, negative if negative.guides(scale) else None)
