"""Classifier-free guidance, outside the model: which rows to evaluate and how to mix them."""

from __future__ import annotations

from torch import Tensor

from .errors import ParameterError
from .protocols import Context, Denoiser


def mix(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """D_u + w (D_c - D_u): equal to mixing eps or v, because the clean prediction is affine in both."""
    return uncond + scale * (cond - uncond)


def guided(
    denoiser: Denoiser, z: Tensor, sigma: float, positive: Context, negative: Context | None, scale: float
) -> Tensor:
    """The guided clean prediction [B, C, h, w]. At scale 1, and without a negative, no unconditional row is evaluated."""
    if scale == 1 or negative is None:
        if scale != 1:
            raise ParameterError(
                f"guidance scale is {scale} but there is no negative prompt: connect one or use scale 1"
            )
        return denoiser.denoise(z, sigma, [positive])[0]
    cond, uncond = denoiser.denoise(z, sigma, [positive, negative])
    return denoiser.combine(z, sigma, cond, uncond, scale)
