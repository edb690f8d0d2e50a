"""Value embeddings: the result of a StyleDiffusion inversion, one set per step (docs/methods.md, section 9).

An edit needs these alone, neither the image encoder nor the mapping networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MismatchError, ShapeError
from ..core.protocols import Context, Denoiser
from ..core.sigmas import step_of_sigma
from ..core.tensor_files import incomplete, write_tensors
from ..core.trajectory import Trajectory, check_grid, check_model

VALUES_FORMAT = "editkit-values-1"


@dataclass(frozen=True)
class ValueEmbeddings:
    """The value inputs of conditional cross-attention in every step of a grid.

    Attributes:
        base: the source prompt.
        scale, shift: float32 [N - first, R, T, D], R = 1 or the batch; entry 0 is for step `first`. The value embedding of
            a text embedding c is c * scale + shift, or shift alone where scale is None ("direct" networks).
        trajectory: the inversion that they reconstruct.
        guidance_scale: the scale that they were learned for.
        fingerprint: of the model; None after loading from a file, and then not checked.
        image: pixels per latent pixel, height and width of the image, where known: its latent may be padded.
    """

    base: Context
    scale: Tensor | None
    shift: Tensor
    trajectory: Trajectory = field(repr=False)
    guidance_scale: float
    fingerprint: str | None
    image: tuple[int, int, int] | None = None

    @property
    def family(self) -> str:
        return self.trajectory.family

    @property
    def sigmas(self) -> Tensor:
        """The whole grid, float32 [N + 1], on the CPU."""
        return self.trajectory.sigmas

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def first(self) -> int:
        """The first step with value embeddings; above 0 if the inversion stopped at an encoding ratio."""
        return self.steps - len(self.shift)

    def step_at(self, sigma: float) -> int:
        """The step in which a sampler moves through `sigma`."""
        return step_of_sigma(float(sigma), self.sigmas)

    def at(self, step: int) -> tuple[Tensor | None, Tensor]:
        """(scale, shift) [R, T, D] of `step` of the whole grid. Raises MismatchError for a step without them."""
        if not self.first <= step < self.steps:
            raise MismatchError(
                f"value embeddings are for steps {self.first} to {self.steps - 1}, not {step}: start there"
            )
        return None if self.scale is None else self.scale[step - self.first], self.shift[step - self.first]

    def check(self, denoiser: Denoiser, sigmas: Tensor | None = None) -> None:
        """Raises MismatchError unless they were made with `denoiser`, and `sigmas` are their grid or its last steps."""
        check_model(self.family, self.fingerprint, denoiser)
        if sigmas is not None:
            check_grid(self.sigmas, sigmas, "value embeddings")

    def check_text(self, context: Context, socket: str) -> None:
        """Raises ShapeError unless `context` has the number of tokens and the width of the embeddings."""
        if context.tokens.shape[1:] != self.shift.shape[2:]:
            raise ShapeError(
                f"{socket} has {context.tokens.shape[1]} tokens of width {context.tokens.shape[2]} but the value embeddings"
                f" {self.shift.shape[2]} of width {self.shift.shape[3]}: encode it with the model's own text encoder, at the"
                " source prompt's length"
            )

    def trajectory_for(self, denoiser: Denoiser) -> Trajectory:
        """The trajectory on the device of `denoiser`. Raises MismatchError if another model is known to have made it."""
        self.check(denoiser)
        return replace(self.trajectory, fingerprint=denoiser.fingerprint).to(denoiser.device)

    def to(self, device: torch.device) -> ValueEmbeddings:
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, scale=scale, shift=self.shift.to(device), trajectory=self.trajectory.to(device))


def save_value_embeddings(embeddings: ValueEmbeddings, path: Path) -> Path:
    """Write a safetensors file and create its folders. What a host attached to the prompt is not saved."""
    base, source = embeddings.base, embeddings.trajectory
    tensors = {
        "base": base.tokens,
        "pooled": base.pooled,
        "scale": embeddings.scale,
        "shift": embeddings.shift,
        "sigmas": source.sigmas,
        "path": source.latents,
        "clean": source.source_latent,
    }
    about = {
        "family": source.family,
        "prompt": source.prompt,
        "text": base.text,
        "guidance_scale": embeddings.guidance_scale,
        "picture": embeddings.image,
    }
    return write_tensors(path, VALUES_FORMAT, tensors, about)


def read_value_embeddings(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> ValueEmbeddings:
    """Value embeddings from a file's tensors and metadata. Raises LoadError if something is missing."""
    try:
        source = Trajectory(tensors["sigmas"], tensors["path"], tensors["clean"], about["family"], "", about["prompt"])
        base = Context(tensors["base"], tensors.get("pooled"), about["text"])
        image = tuple(about["picture"]) if about["picture"] else None
        scale = tensors.get("scale")
        return ValueEmbeddings(base, scale, tensors["shift"], source, about["guidance_scale"], None, image)
    except (KeyError, TypeError) as error:
        raise incomplete(path, error) from error
