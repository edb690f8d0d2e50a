"""Negatives for guided reconstruction: the result of null-text inversion and of negative-prompt inversion.

One unconditional embedding per step, learned (null-text) or the source prompt (NPI); docs/methods.md, sections 11.3 to
11.5. `Embeddings` can be used wherever a negative prompt can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import MismatchError
from ..core.protocols import Context, Denoiser
from ..core.sigmas import step_of_sigma
from ..core.tensor_files import incomplete, read_tensors, write_tensors
from ..core.trajectory import Trajectory, check_grid, check_model
from .proximal import Proximal

FORMAT = "editkit-embeddings-1"
FILE_KEYS = {
    "inversion_guidance": "pull",
    "inversion_guidance_below": "pull_below",
    "inversion_guidance_target": "pull_to",
}  # fields of `Proximal` that files call otherwise


@dataclass(frozen=True)
class Embeddings:
    """A negative context for every step of a grid (a `guidance.Negative`).

    Attributes:
        base: the parts of the negative that all steps share; with `tokens` None it is the negative of every step.
        tokens: learned embeddings, float32 [N - first, R, T, D], R = 1 or the batch; entry 0 is for step `first`.
        sigmas: the whole grid, float32 [N + 1], on the CPU.
        family: of the model.
        fingerprint: of the model; None after loading from a file, and then not checked.
        prompt: digest of the source prompt (`context_digest`).
        guidance_scale: the scale they were learned for; None if they suit any.
        proximal: proximal guidance (ProxNPI); None for plain guidance.
        trajectory: of the source; needed where `proximal` uses inversion guidance.
    """

    base: Context
    tokens: Tensor | None
    sigmas: Tensor
    family: str
    fingerprint: str | None
    prompt: str
    guidance_scale: float | None = None
    proximal: Proximal | None = None
    trajectory: Trajectory | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def first(self) -> int:
        """The first step there is an embedding for; later than 0 where the inversion stopped at an encoding ratio."""
        return 0 if self.tokens is None else self.steps - len(self.tokens)

    def at(self, step: int) -> Context:
        """The negative of `step` of the whole grid. Raises MismatchError for one that was not learned."""
        if not self.first <= step < self.steps:
            raise MismatchError(f"embeddings are for steps {self.first} to {self.steps - 1}, not {step}: start there")
        return self.base if self.tokens is None else self.base.with_tokens(self.tokens[step - self.first])

    def at_sigma(self, sigma: float) -> Context:
        """The negative of the step that a sampler makes at `sigma`."""
        return self.at(step_of_sigma(float(sigma), self.sigmas))

    def check(self, denoiser: Denoiser, sigmas: Tensor | None = None) -> None:
        """Raises MismatchError unless made for `denoiser`, and `sigmas` is their grid or the last part of it."""
        check_model(self.family, self.fingerprint, denoiser)
        if sigmas is not None:
            check_grid(self.sigmas, sigmas, "embeddings")

    def guides(self, scale: float) -> bool:
        """Whether the unconditional prediction is needed; proximal guidance needs it at every guidance scale."""
        return scale != 1 or self.proximal is not None

    def combine(
        self,
        denoiser: Denoiser,
        z: Tensor,
        sigma: float,
        cond: Tensor,
        uncond: Tensor,
        scale: float,
        contexts: Sequence[Context],
    ) -> Tensor:
        """See `Negative.combine`; with `proximal`, proximal guidance."""
        if self.proximal is None:
            return denoiser.combine(z, sigma, cond, uncond, scale, contexts)
        return self.proximal.guide(
            z,
            float(sigma),
            cond,
            uncond,
            self.trajectory,
            lambda c, u: denoiser.combine(z, sigma, c, u, scale, contexts),
        )

    def to(self, device: torch.device) -> Embeddings:
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, tokens=tokens, trajectory=None if self.trajectory is None else self.trajectory.to(device))


def save_embeddings(embeddings: Embeddings, path: Path) -> Path:
    """Write a safetensors file and the folders above it; returns `path`.

    What a host attached to the prompt (areas, ControlNets) is not saved.
    """
    base = embeddings.base
    trajectory = embeddings.trajectory
    tensors = {
        "base": base.tokens,
        "pooled": base.pooled,
        "tokens": embeddings.tokens,
        "sigmas": embeddings.sigmas,
        "path": None if trajectory is None else trajectory.latents,
        "clean": None if trajectory is None else trajectory.source_latent,
    }
    about = {
        "family": embeddings.family,
        "prompt": embeddings.prompt,
        "text": base.text,
        "guidance_scale": embeddings.guidance_scale,
        "proximal": None if embeddings.proximal is None else _proximal_to_file(embeddings.proximal),
    }
    return write_tensors(path, FORMAT, tensors, about)


def load_embeddings(path: Path) -> Embeddings:
    """Read what `save_embeddings` wrote. Raises LoadError for any other file."""
    _, tensors, about = read_tensors(path, (FORMAT,))
    return read_embeddings(path, tensors, about)


def read_embeddings(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Embeddings:
    """The embeddings in the tensors and the metadata of a file; errors name its `path`. Raises LoadError if incomplete."""
    try:
        sigmas = tensors["sigmas"]
        trajectory = None
        if "path" in tensors:
            trajectory = Trajectory(sigmas, tensors["path"], tensors["clean"], about["family"], "", about["prompt"])
        return Embeddings(
            base=Context(tensors["base"], tensors.get("pooled"), about["text"]),
            tokens=tensors.get("tokens"),
            sigmas=sigmas,
            family=about["family"],
            fingerprint=None,
            prompt=about["prompt"],
            guidance_scale=about["guidance_scale"],
            proximal=_proximal_from_file(about["proximal"]) if about["proximal"] else None,
            trajectory=trajectory,
        )
    except (KeyError, TypeError) as error:
        raise incomplete(path, error) from error


def _proximal_to_file(proximal: Proximal) -> dict[str, Any]:
    return {FILE_KEYS.get(name, name): value for name, value in asdict(proximal).items()}


def _proximal_from_file(saved: Mapping[str, Any]) -> Proximal:
    names = {key: name for name, key in FILE_KEYS.items()}
    return Proximal(**{names.get(key, key): value for key, value in saved.items()})
