"""The path of a real image through the noise levels: what an inversion leaves behind (methods.md, sections 5 and 14).

A trajectory belongs to one model, one grid, one size and one prompt, knows them all, and is refused elsewhere by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import MismatchError
from .protocols import Context, Denoiser
from .shapes import match_batch

SIGMA_TOLERANCE = 1e-5  # relative; a sampler may hand a level back in another precision


@dataclass(frozen=True)
class Trajectory:
    """Latents of one image batch at the levels `first` to N of a grid; nobody writes into its tensors.

    Attributes:
        sigmas: the whole grid, float32 [N + 1], falling, on the CPU.
        latents: model-scaled [N + 1 - first, B, C, h, w] on the model's device, noisiest first; the last is the source.
        source_latent: the source as the VAE gave it (unscaled) [B, C, h, w]: results return its bits outside a mask.
        family, fingerprint: of the model that made it.
        prompt: digest of the context that it was made with (`context_digest`).
    """

    sigmas: Tensor
    latents: Tensor
    source_latent: Tensor
    family: str
    fingerprint: str
    prompt: str

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def first(self) -> int:
        """The noisiest level held: 0 for the whole grid, more where the inversion stopped at an encoding ratio."""
        return self.steps + 1 - len(self.latents)

    @property
    def batch(self) -> int:
        return self.latents.shape[1]

    @property
    def source(self) -> Tensor:
        """The clean source in model scale, [B, C, h, w]."""
        return self.latents[-1]

    def level(self, index: int) -> Tensor:
        """The latent [B, C, h, w] at level `index` of the whole grid. Raises MismatchError for one that is not held."""
        if not self.first <= index <= self.steps:
            raise MismatchError(
                f"trajectory holds levels {self.first} to {self.steps} but level {index} is needed: "
                "invert with a larger encoding ratio"
            )
        return self.latents[index - self.first]

    def at(self, sigma: float, step: int = 0) -> Tensor:
        """The latent at noise level `sigma`: exact on the grid; between two levels, on the line that DDIM draws there.

        `step` is not needed (a path draws no noise); it is there because a noised background takes it too.
        Raises: MismatchError for a level outside the path.
        """
        levels = self.sigmas[self.first :].tolist()
        for index, level in enumerate(levels):
            if abs(sigma - level) <= SIGMA_TOLERANCE * level:
                return self.latents[index]
            if level < sigma:
                if index == 0:
                    break
                share = (sigma - level) / (levels[index - 1] - level)
                return torch.lerp(self.latents[index], self.latents[index - 1], share)
        raise MismatchError(
            f"trajectory runs from sigma {levels[0]:.4g} to {levels[-1]:.4g} but {sigma:.4g} is asked: use its own sigmas"
        )

    def check(self, denoiser: Denoiser, sigmas: Tensor | None = None) -> None:
        """Raises MismatchError unless `denoiser` made this, and `sigmas` is its grid or the last part of it."""
        if denoiser.fingerprint != self.fingerprint:
            raise MismatchError(
                f"trajectory was made with another model (family {self.family!r}, weights or LoRAs {self.fingerprint}) than the"
                f" one connected ({denoiser.family!r}, {denoiser.fingerprint}): invert again with this model"
            )
        if sigmas is not None:
            check_grid(self.sigmas, sigmas, "trajectory")

    def check_prompt(self, context: Context, socket: str) -> None:
        """Raises MismatchError unless the trajectory was made with this prompt."""
        if context_digest(context) != self.prompt:
            raise MismatchError(
                f"{socket} is not the prompt that the trajectory was made with: connect the CONDITIONING of the inversion"
            )

    def fitted(self, denoiser: Denoiser, sigmas: Tensor, like: Tensor) -> Trajectory:
        """This path for a latent batch `like` [B, C, h, w] on its device (a batch of 1 serves any). Raises MismatchError."""
        self.check(denoiser, sigmas)
        if self.latents.shape[2:] != like.shape[1:]:
            raise MismatchError(
                f"trajectory has latents {list(self.latents.shape[2:])} but the latent is {list(like.shape[1:])} "
                "(channels, height, width): invert the picture at this size"
            )
        return self.expanded(like.shape[0]).to(like.device)

    def expanded(self, batch: int) -> Trajectory:
        """The path for `batch` images; raises ShapeError unless it has as many or one."""
        latents = match_batch(self.latents.transpose(0, 1), batch, "trajectory", "the latent").transpose(0, 1)
        return replace(
            self, latents=latents, source_latent=match_batch(self.source_latent, batch, "trajectory", "the latent")
        )

    def to(self, device: torch.device) -> Trajectory:
        return replace(self, latents=self.latents.to(device), source_latent=self.source_latent.to(device))


def made_trajectory(
    denoiser: Denoiser, clean: Tensor, path: Sequence[Tensor], sigmas: Tensor, context: Context
) -> Trajectory:
    """A trajectory from its latents, source first, along the last len(path) levels of `sigmas`."""
    return Trajectory(
        sigmas=sigmas.detach().float().cpu().clone(),
        latents=torch.stack(list(reversed(path))),
        source_latent=clean.detach().to(path[0].device, copy=True),
        family=denoiser.family,
        fingerprint=denoiser.fingerprint,
        prompt=context_digest(context),
    )


def context_digest(context: Context) -> str:
    """A name for an encoded prompt: equal for equal embeddings. What a host attached besides is not part of it."""
    digest = hashlib.blake2b(digest_size=8)
    for value in (context.tokens, context.pooled):
        if value is not None:
            value = value.detach().float().cpu().contiguous()
            digest.update(str(tuple(value.shape)).encode() + value.numpy().tobytes())
    return digest.hexdigest()


def check_grid(own: Tensor, sigmas: Tensor, name: str) -> None:
    """Raises MismatchError unless `sigmas` is the grid `own` or the last part of it; `name` is what was made on it."""
    given, own = sigmas.detach().float().cpu(), own.detach().float().cpu()
    if len(given) > len(own) or not torch.allclose(given, own[len(own) - len(given) :], rtol=SIGMA_TOLERANCE, atol=0):
        raise MismatchError(
            f"{name} was made on {_grid(own)} but is used on {_grid(given)}: connect the same SIGMAS, or the last part of them"
        )


def _grid(sigmas: Tensor) -> str:
    return f"{len(sigmas) - 1} steps from sigma {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"


def check_model(family: str, fingerprint: str | None, denoiser: Denoiser) -> None:
    """Raises MismatchError unless embeddings of this model suit `denoiser`; after loading the family alone is known."""
    if family != denoiser.family or fingerprint not in (None, denoiser.fingerprint):
        raise MismatchError(
            f"embeddings were made with another model (family {family!r}, {fingerprint or 'from a file'}) than the one"
            f" connected ({denoiser.family!r}, {denoiser.fingerprint}): make them again with this model"
        )
