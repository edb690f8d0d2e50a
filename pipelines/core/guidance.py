"""Classifier-free guidance (Ho and Salimans 2022): which forward passes a step needs, and how their predictions are mixed.

A prompt may be the same at every step or change from step to step. Both kinds answer the same questions (`Positive`,
`Negative`), and a `Context` is the constant one, so no loop asks which kind it has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import ParameterError
from .protocols import Context, Denoiser

log = logging.getLogger("editkit")

EQUAL_PROMPTS = "nothing will be edited; change words of the target"


class Positive(Protocol):
    """A positive prompt: a `Context`, or one that changes from step to step (LayerDiffusion's iterative guidance)."""

    def at_sigma(self, sigma: float) -> Context:
        """The context in force at `sigma`."""

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """Raises MismatchError unless this was made for `denoiser`, and for `sigmas` or a range of them."""


class Negative(Protocol):
    """A negative prompt: a `Context`, one that changes from step to step (null-text inversion), or one with guidance of
    its own kind (ProxNPI).
    """

    def at_sigma(self, sigma: float) -> Context:
        """The context in force at `sigma`."""

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """Raises MismatchError unless this was made for `denoiser`, and for `sigmas` or a grid that ends with them."""

    def guides(self, scale: float) -> bool:
        """Whether guidance at `scale` needs the unconditional prediction."""

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
        """Mix two predictions by the guidance of this negative.

        Args:
            denoiser: the model; its `combine` is plain classifier-free guidance.
            z: the latent [B, C, h, w] at `sigma`, model scale.
            sigma: above 0.
            cond, uncond: the denoised latents [B, C, h, w] that the network predicts for `contexts`.
            scale: guidance scale; 1 = the conditional prediction.
            contexts: the positive, and the negative of `at_sigma`.
        Returns: the guided denoised latent [B, C, h, w].
        """


def mix(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """D_u + w (D_c - D_u). Mixing eps or v gives the same, because the denoised latent is affine in both."""
    return uncond + scale * (cond - uncond)


def guided(
    denoiser: Denoiser, z: Tensor, sigma: float, positive: Positive, negative: Negative | None, scale: float
) -> Tensor:
    """Predict with classifier-free guidance (docs/methods.md, section 0.2).

    Where the negative does not guide (scale 1), the unconditional forward pass is skipped.

    Args:
        denoiser: the model.
        z: the latent [B, C, h, w] at `sigma`, model scale.
        sigma: above 0.
        positive: the positive prompt.
        negative: the negative prompt; None only at scale 1.
        scale: guidance scale; 1 = the conditional prediction.
    Returns: the guided denoised latent [B, C, h, w].
    Raises: ParameterError where a negative is needed and missing.
    """
    check_guidance(negative, scale)
    context = positive.at_sigma(sigma)
    if negative is None or not negative.guides(scale):
        denoised = denoiser.denoise(z, sigma, [context])[0]
        # the value does not change, but the guidance hooks of a host run
        return denoiser.combine(z, sigma, denoised, denoised, 1.0, [context])
    contexts = [context, negative.at_sigma(sigma)]
    cond, uncond = denoiser.denoise(z, sigma, contexts)
    return negative.combine(denoiser, z, sigma, cond, uncond, scale, contexts)


def check_cfg(scale: float, name: str = "cfg") -> None:
    """Raises ParameterError for a guidance scale below 1: it would steer away from the prompt."""
    if not (math.isfinite(scale) and scale >= 1):
        raise ParameterError(f"{name} is {scale}: give 1 (no guidance) or more, for example 5")


def warn_of_equal_prompts(first: Context, second: Context, remedy: str) -> None:
    """Warn where two prompts that must differ are the same embedding."""
    if first.tokens.shape == second.tokens.shape and torch.equal(first.tokens, second.tokens.to(first.tokens)):
        log.warning("%s and %s are the same prompt: %s", first.socket, second.socket, remedy)


def check_guidance(negative: Negative | None, scale: float) -> None:
    """Raises ParameterError where guidance at `scale` needs a negative and there is none."""
    if negative is None and scale != 1:
        raise ParameterError(f"guidance scale is {scale} but there is no negative prompt: connect one or use scale 1")


def constant_positive(positive: Positive, what: str) -> Context:
    """The positive of every step. Raises ParameterError for one that changes, which `what` cannot follow."""
    if not isinstance(positive, Context):
        raise ParameterError(f"{what} takes one positive prompt for all steps: connect a plain CFGGuider")
    return positive


@dataclass(frozen=True)
class EditPrompts:
    """The prompts of an edit: positive, negative (None only at guidance scale 1) and the guidance scale."""

    positive: Positive
    negative: Negative | None
    guidance_scale: float

    def __post_init__(self) -> None:
        check_cfg(self.guidance_scale)

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """Raises MismatchError if a prompt was made for another model or another grid; a plain prompt fits everywhere."""
        self.positive.check(denoiser, sigmas)
        if self.negative is not None:
            self.negative.check(denoiser, sigmas)
