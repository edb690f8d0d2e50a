"""Blended editing for samplers that expose predictions only (docs/methods.md, section 1).

Third-party samplers have no end-of-step hook, so the state is blended just before each prediction, which undoes the
noise that ancestral samplers add outside the mask. The denoised prediction is blended too, which keeps the history of
multistep samplers on the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..core.masks import MaskSchedule
from ..core.samplers import Predict
from ..core.sigmas import JUST_ABOVE
from .blending import Background, SourceTrajectory, blend


@dataclass(frozen=True)
class PredictionBlend:
    """Keeps the outside of the masks on the source, before and after each prediction.

    Attributes:
        schedule: masks for the latent batch, on the latents' device.
        sigmas: grid [N + 1] on which the schedule counts.
        source: clean source latent [B, C, h, w], model scale.
        background: gives the source noised to a sigma, [B, C, h, w], model scale.
    """

    schedule: MaskSchedule
    sigmas: Tensor
    source: Tensor
    background: Callable[[float], Tensor]

    def mask(self, sigma: float) -> Tensor:
        """The mask [B, 1, h, w] of the step that leaves `sigma`."""
        return self.schedule.at_sigma(sigma, self.sigmas)

    def arrival_mask(self, sigma: float) -> Tensor:
        """The mask [B, 1, h, w] of the step that reached `sigma`; between two grid sigmas, of the running step.

        `blended_denoise` blends after each step, so its state at `sigma` was blended with this mask.
        """
        return self.schedule.at_sigma(sigma * JUST_ABOVE, self.sigmas)

    def blend_state(self, z: Tensor, sigma: float) -> Tensor:
        """The sampler's state `z` [B, C, h, w] at `sigma` with the noised source outside the mask."""
        return blend(z, self.background(sigma).to(z), self.arrival_mask(sigma).to(z))

    def blend_denoised(self, denoised: Tensor, sigma: float) -> Tensor:
        """The prediction `denoised` [B, C, h, w] made at `sigma` with the clean source outside the mask."""
        return blend(denoised, self.source.to(denoised), self.mask(sigma).to(denoised))


def blended_predictor(
    predict: Predict, background: Background | SourceTrajectory, schedule: MaskSchedule, sigmas: Tensor
) -> Predict:
    """`predict` with its state and its prediction blended.

    Args:
        predict: gives the denoised prediction [B, C, h, w] of a state and its sigma.
        background: the source at every sigma.
        schedule: mask schedule on the latent grid, for the whole batch.
        sigmas: grid [N + 1] on which the schedule counts.
    Returns: a predictor for any sampler.
    """
    outside = PredictionBlend(schedule, sigmas, background.source, background.at)

    def blended(z: Tensor, sigma: float) -> Tensor:
        return outside.blend_denoised(predict(outside.blend_state(z, sigma), sigma), sigma)

    return blended
