"""Classifier-free guidance, outside the model: which rows to evaluate and how to mix them."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from torch import Tensor

from .errors import ParameterError
from .protocols import Context, Denoiser


class NegativeSchedule(Protocol):
    """Negatives that differ from step to step (null-text inversion), or that guide in their own way (ProxNPI)."""

    def at_sigma(self, sigma: float) -> Context:
        """The negative in force at noise level `sigma`."""

    def check(self, denoiser: Denoiser, sigmas: Tensor | None = None) -> None:
        """Raises MismatchError unless this was made for `denoiser`, on `sigmas` or a grid that ends with them."""

    def guided(self, denoiser: Denoiser, z: Tensor, sigma: float, positive: Context, scale: float) -> Tensor:
        """The guided clean prediction [B, C, h, w]."""


Negative: TypeAlias = "Context | NegativeSchedule"


def mix(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """D_u + w (D_c - D_u): equal to mixing eps or v, because the clean prediction is affine in both."""
    return uncond + scale * (cond - uncond)


def guided(
    denoiser: Denoiser, z: Tensor, sigma: float, positive: Context, negative: Negative | None, scale: float
) -> Tensor:
    """The guided clean prediction [B, C, h, w]. At scale 1, and without a negative, no unconditional row is evaluated."""
    if negative is not None and not isinstance(negative, Context):
        return negative.guided(denoiser, z, sigma, positive, scale)
    if scale == 1 or negative is None:
        if scale != 1:
            raise ParameterError(
                f"guidance scale is {scale} but there is no negative prompt: connect one or use scale 1"
            )
        clean = denoiser.denoise(z, sigma, [positive])[0]
        return denoiser.combine(z, sigma, clean, clean, 1.0)  # equal in value, and a host's guidance hooks run
    cond, uncond = denoiser.denoise(z, sigma, [positive, negative])
    return denoiser.combine(z, sigma, cond, uncond, scale)


def check_negative(negative: Negative | None, denoiser: Denoiser, sigmas: Tensor) -> None:
    """Raises MismatchError if `negative` was made for another model or grid; a plain prompt fits everywhere."""
    if negative is not None and not isinstance(negative, Context):
        negative.check(denoiser, sigmas)
