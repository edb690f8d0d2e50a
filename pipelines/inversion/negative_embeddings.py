"""Negatives for guided reconstruction: one unconditional embedding per step, learned or borrowed (methods.md, 11.3 to 11.5).

What null-text inversion and negative-prompt inversion leave behind. It stands wherever a negative prompt does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import LoadError, MismatchError
from ..core.guidance import guided
from ..core.protocols import Context, Denoiser
from ..core.sigmas import step_of_sigma
from ..core.trajectory import Trajectory, check_grid
from .proximal import Proximal

FORMAT = "editkit-embeddings-1"


@dataclass(frozen=True)
class Embeddings:
    """A negative context for every step of a grid (a `NegativeSchedule`).

    Attributes:
        base: everything of the negative that does not change; with `tokens` None it serves every step.
        tokens: learned embeddings, float32 [N - first, R, T, D], R = 1 or the batch; entry 0 is for step `first`.
        sigmas: the whole grid, float32 [N + 1], on the CPU.
        family: of the model.    fingerprint: of the model; None after loading from a file, and then not checked.
        prompt: digest of the source prompt (`context_digest`).
        guidance_scale: what the embeddings were learned for; None if they suit any.
        proximal: how the difference of the two predictions is cut down (ProxNPI).
        path: the source's trajectory, where `proximal` pulls towards it.
    """

    base: Context
    tokens: Tensor | None
    sigmas: Tensor
    family: str
    fingerprint: str | None
    prompt: str
    guidance_scale: float | None = None
    proximal: Proximal | None = None
    path: Trajectory | None = field(default=None, repr=False)

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
        """The negative while a sampler moves through `sigma`."""
        return self.at(step_of_sigma(float(sigma), self.sigmas))

    def check(self, denoiser: Denoiser, sigmas: Tensor | None = None) -> None:
        """Raises MismatchError unless made for `denoiser`, and `sigmas` is their grid or the last part of it."""
        check_model(self.family, self.fingerprint, denoiser)
        if sigmas is not None:
            check_grid(self.sigmas, sigmas, "embeddings")

    def guided(self, denoiser: Denoiser, z: Tensor, sigma: float, positive: Context, scale: float) -> Tensor:
        """See `guidance.guided`; with `proximal` both rows are evaluated at every scale."""
        negative = self.at_sigma(sigma)
        if self.proximal is None:
            return guided(denoiser, z, sigma, positive, negative, scale)
        contexts = [positive, negative]
        cond, uncond = denoiser.denoise(z, sigma, contexts)
        return self.combine(denoiser, z, sigma, cond, uncond, scale, contexts)

    def guides(self, scale: float) -> bool:
        """See `NegativeSchedule.guides`."""
        return scale != 1 or self.proximal is not None

    def combine(
        self, denoiser: Denoiser, z: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float,
        contexts: Sequence[Context],
    ) -> Tensor:  # fmt: skip
        """See `NegativeSchedule.combine`."""
        if self.proximal is None:
            return denoiser.combine(z, sigma, cond, uncond, scale, contexts)
        return self.proximal.guide(
            z, float(sigma), cond, uncond, self.path, lambda c, u: denoiser.combine(z, sigma, c, u, scale, contexts)
        )

    def to(self, device: torch.device) -> Embeddings:
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, tokens=tokens, path=None if self.path is None else self.path.to(device))


def check_model(family: str, fingerprint: str | None, denoiser: Denoiser) -> None:
    """Raises MismatchError unless embeddings of this model suit `denoiser`; after loading the family alone is known."""
    if family != denoiser.family or fingerprint not in (None, denoiser.fingerprint):
        raise MismatchError(
            f"embeddings were made with another model (family {family!r}, {fingerprint or 'from a file'}) than the one"
            f" connected ({denoiser.family!r}, {denoiser.fingerprint}): make them again with this model"
        )


def save_embeddings(embeddings: Embeddings, path: Path) -> Path:
    """Write a safetensors file; folders are made. What a host attached to the prompt (areas, ControlNets) is not saved."""
    base, source = embeddings.base, embeddings.path
    tensors = {
        "base": base.tokens, "pooled": base.pooled, "tokens": embeddings.tokens, "sigmas": embeddings.sigmas,
        "path": None if source is None else source.latents, "clean": None if source is None else source.clean,
    }  # fmt: skip
    about = {
        "family": embeddings.family, "prompt": embeddings.prompt, "text": base.text,
        "guidance_scale": embeddings.guidance_scale,
        "proximal": None if embeddings.proximal is None else asdict(embeddings.proximal),
    }  # fmt: skip
    return write_tensors(path, FORMAT, tensors, about)


def load_embeddings(path: Path) -> Embeddings:
    """Read what `save_embeddings` wrote. Raises LoadError for any other file."""
    _, tensors, about = read_tensors(path, (FORMAT,))
    try:
        base = Context(tensors["base"], tensors.get("pooled"), about["text"])
        sigmas, proximal = tensors["sigmas"], about["proximal"]
        source = None
        if "path" in tensors:
            source = Trajectory(sigmas, tensors["path"], tensors["clean"], about["family"], "", about["prompt"])
        return Embeddings(
            base, tensors.get("tokens"), sigmas, about["family"], None, about["prompt"], about["guidance_scale"],
            Proximal(**proximal) if proximal else None, source,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise incomplete(path, error) from error


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor | None], about: dict[str, Any]) -> Path:
    """A safetensors file of float32 tensors (None is left out) and facts that JSON can hold; folders are made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.contiguous_format
    given = {name: value for name, value in tensors.items() if value is not None}
    held = {name: value.detach().float().cpu().clone(memory_format=whole) for name, value in given.items()}
    save_file(held, path, metadata={"format": kind, "embeddings": json.dumps(about)})
    return path


def read_tensors(path: Path, kinds: Sequence[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: its kind, one of `kinds`, its tensors and facts. Raises LoadError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LoadError(f"{path} does not exist: choose a file that EditKit saved")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            kind = str(header.get("format"))
            if kind not in kinds:
                raise LoadError(f"{path} holds no embeddings of EditKit: choose a file that its save node wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a file is no dict
            return kind, tensors, json.loads(header["embeddings"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read ({error}): choose a file that EditKit saved") from error


def incomplete(path: Path, error: Exception) -> LoadError:
    return LoadError(f"{path} is incomplete ({error}): save the embeddings again")
