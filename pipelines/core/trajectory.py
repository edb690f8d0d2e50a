"""The trajectory of a real image through the sigmas of a grid: what an inversion returns (docs/methods.md, sections 5, 14).

A trajectory belongs to one model, one grid, one latent size and one prompt. It records all four and refuses others.
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
from .sigmas import SIGMA_TOLERANCE


@dataclass(frozen=True)
class Trajectory:
    """Latents of one image batch at the sigmas `first` to N of a grid. Its tensors are never written to.

    Attributes:
        sigmas: the whole grid, float32 [N + 1], falling, on the CPU.
        latents: model scale, [N + 1 - first, B, C, h, w] on the model's device, noisiest first; the last is the source.
        source_latent: the source as the VAE gave it (unscaled) [B, C, h, w]. Results copy its bits outside a mask.
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
        """Index of the noisiest latent in the grid: 0, or more where the inversion stopped at an encoding ratio."""
        return self.steps + 1 - len(self.latents)

    @property
    def batch(self) -> int:
        return self.latents.shape[1]

    @property
    def source(self) -> Tensor:
        """The source latent in model scale, [B, C, h, w]."""
        return self.latents[-1]

    def latent(self, index: int) -> Tensor:
        """The latent [B, C, h, w] at sigma number `index` of the grid. Raises MismatchError below `first`."""
        if not self.first <= index <= self.steps:
            raise MismatchError(
                f"trajectory has the latents {self.first} to {self.steps} of its grid but number {index} is needed: "
                "invert with a larger encoding ratio"
            )
        return self.latents[index - self.first]

    def at(self, sigma: float, step: int = 0) -> Tensor:
        """The latent [B, C, h, w] at `sigma`: exact on the grid, interpolated linearly in sigma (as DDIM steps) between.

        Args:
            sigma: from the noisiest sigma of the trajectory down to its last.
            step: not used; the other backgrounds of a blended edit draw noise by it.
        Raises: MismatchError for a sigma outside the trajectory.
        """
        sigmas = self.sigmas[self.first :].tolist()
        for index, own in enumerate(sigmas):
            if abs(sigma - own) <= SIGMA_TOLERANCE * own:
                return self.latents[index]
            if own < sigma:
                if index == 0:
                    break
                fraction = (sigma - own) / (sigmas[index - 1] - own)
                return torch.lerp(self.latents[index], self.latents[index - 1], fraction)
        raise MismatchError(
            f"trajectory runs from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g} but {sigma:.4g} is needed: use its own sigmas"
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
        """The trajectory for the batch and device of the latent `like` [B, C, h, w]; a batch of 1 is repeated.

        Raises: MismatchError for another model, grid or latent size; ShapeError for another batch.
        """
        self.check(denoiser, sigmas)
        if self.latents.shape[2:] != like.shape[1:]:
            raise MismatchError(
                f"trajectory has latents {list(self.latents.shape[2:])} but the latent is {list(like.shape[1:])} "
                "(channels, height, width): invert the image at this size"
            )
        return self.expanded(like.shape[0]).to(like.device)

    def expanded(self, batch: int) -> Trajectory:
        """The trajectory for `batch` images; raises ShapeError unless it has as many or one."""
        latents = match_batch(self.latents.transpose(0, 1), batch, "trajectory", "the latent").transpose(0, 1)
        source_latent = match_batch(self.source_latent, batch, "trajectory", "the latent")
        return replace(self, latents=latents, source_latent=source_latent)

    def to(self, device: torch.device) -> Trajectory:
        return replace(self, latents=self.latents.to(device), source_latent=self.source_latent.to(device))


def made_trajectory(
    denoiser: Denoiser, source_latent: Tensor, latents: Sequence[Tensor], sigmas: Tensor, context: Context
) -> Trajectory:
    """Collect the latents of an inversion in a trajectory.

    Args:
        denoiser: the model that inverted; the trajectory records its family and fingerprint.
        source_latent: as the VAE gave it (unscaled), [B, C, h, w].
        latents: model scale, [B, C, h, w] each, the source first, at the last len(latents) sigmas in reverse.
        sigmas: the whole grid [N + 1], falling.
        context: the inversion prompt.
    Returns: the trajectory, noisiest latent first.
    """
    return Trajectory(
        sigmas=sigmas.detach().float().cpu().clone(),
        latents=torch.stack(list(reversed(latents))),
        source_latent=source_latent.detach().to(latents[0].device, copy=True),
        family=denoiser.family,
        fingerprint=denoiser.fingerprint,
        prompt=context_digest(context),
    )


def context_digest(context: Context) -> str:
    """A digest of a prompt's embeddings. What a host attached to it is not part of it."""
    digest = hashlib.blake2b(digest_size=8)
    for embedding in (context.tokens, context.pooled):
        if embedding is not None:
            embedding = embedding.detach().float().cpu().contiguous()
            digest.update(str(tuple(embedding.shape)).encode() + embedding.numpy().tobytes())
    return digest.hexdigest()


def check_grid(own: Tensor, sigmas: Tensor, name: str) -> None:
    """Raises MismatchError unless `sigmas` is the grid `own` or the last part of it; `name` is what was made on it."""
    own, given = own.detach().float().cpu(), sigmas.detach().float().cpu()
    if len(given) > len(own) or not torch.allclose(given, own[len(own) - len(given) :], rtol=SIGMA_TOLERANCE, atol=0):
        raise MismatchError(
            f"{name} was made on {_brief(own)} but is used on {_brief(given)}: connect the same SIGMAS, or the last part of them"
        )


def _brief(sigmas: Tensor) -> str:
    return f"{len(sigmas) - 1} steps from sigma {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"


def check_model(family: str, fingerprint: str | None, denoiser: Denoiser) -> None:
    """Raises MismatchError unless embeddings made with this model suit `denoiser`; a file records only the family."""
    if family != denoiser.family or fingerprint not in (None, denoiser.fingerprint):
        raise MismatchError(
            f"embeddings were made with another model (family {family!r}, {fingerprint or 'from a file'}) than the one"
            f" connected ({denoiser.family!r}, {denoiser.fingerprint}): make them again with this model"
        )
