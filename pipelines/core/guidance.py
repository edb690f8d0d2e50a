"""Classifier-free guidance, outside the model: which rows to evaluate and how to mix them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from .errors import ParameterError
from .protocols import Context, Denoiser


class PositiveSchedule(Protocol):
    """Positives that differ from step to step (LayerDiffusion's iterative guidance)."""

    def at_sigma(self, sigma: float) -> Context:
        """The positive in force at noise level `sigma`."""

    def check(self, sigmas: Tensor) -> None:
        """Raises MismatchError unless `sigmas` is the grid of this schedule, or neighbouring levels of it."""


class NegativeSchedule(Protocol):
    """Negatives that differ from step to step (null-text inversion), or that guide in their own way (ProxNPI)."""

    def at_sigma(self, sigma: float) -> Context:
        """The negative in force at noise level `sigma`."""

    def check(self, denoiser: Denoiser, sigmas: Tensor | None = None) -> None:
        """Raises MismatchError unless this was made for `denoiser`, on `sigmas` or a grid that ends with them."""

    def guided(self, denoiser: Denoiser, z: Tensor, sigma: float, positive: Context, scale: float) -> Tensor:
        """The guided clean prediction [B, C, h, w]."""

    def guides(self, scale: float) -> bool:
        """Whether the negative's prediction is needed at `scale`."""

    def combine(
        self, denoiser: Denoiser, z: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float,
        contexts: Sequence[Context],
    ) -> Tensor:  # fmt: skip
        """`guided` for predictions of `contexts`, the positive and `at_sigma`'s, that were made elsewhere."""


Positive: TypeAlias = "Context | PositiveSchedule"
Negative: TypeAlias = "Context | NegativeSchedule"


def mix(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """D_u + w (D_c - D_u): equal to mixing eps or v, because the clean prediction is affine in both."""
    return uncond + scale * (cond - uncond)


def guided(
    denoiser: Denoiser, z: Tensor, sigma: float, positive: Positive, negative: Negative | None, scale: float
) -> Tensor:
    """The guided clean prediction [B, C, h, w]. At scale 1, and without a negative, no unconditional row is evaluated."""
    if not isinstance(positive, Context):
        positive = positive.at_sigma(sigma)
    if negative is not None and not isinstance(negative, Context):
        return negative.guided(denoiser, z, sigma, positive, scale)
    if scale == 1 or negative is None:
        if scale != 1:
            raise ParameterError(
                f"guidance scale is {scale} but there is no negative prompt: connect one or use scale 1"
            )
        clean = denoiser.denoise(z, sigma, [positive])[0]
        # equal in value, and a host's guidance hooks run
        return denoiser.combine(z, sigma, clean, clean, 1.0, [positive])
    contexts = [positive, negative]
    cond, uncond = denoiser.denoise(z, sigma, contexts)
    return denoiser.combine(z, sigma, cond, uncond, scale, contexts)


def one_positive(positive: Positive, what: str) -> Context:
    """The positive of every step. Raises ParameterError for a schedule, which `what` cannot follow."""
    if not isinstance(positive, Context):
        raise ParameterError(f"{what} takes one positive prompt for all steps: connect a plain CFGGuider")
    return positive


def check_positive(positive: Positive, sigmas: Tensor) -> None:
    """Raises MismatchError if `positive` was made for another grid; a plain prompt fits everywhere."""
    if not isinstance(positive, Context):
        positive.check(sigmas)


def check_negative(negative: Negative | None, denoiser: Denoiser, sigmas: Tensor) -> None:
    """Raises MismatchError if `negative` was made for another model or grid; a plain prompt fits everywhere."""
    if negative is not None and not isinstance(negative, Context):
        negative.check(denoiser, sigmas)


@dataclass(frozen=True)
class EditPrompts:
    """What to denoise towards: positive and negative (one, or one per step), and the guidance scale."""

    positive: Positive
    negative: Negative | None
    guidance_scale: float
