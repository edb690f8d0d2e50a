"""The blended edit as a predictor that any sampler can call."""

from __future__ import annotations

from torch import Tensor

from ..core.masks import MaskSchedule
from ..core.samplers import Predict
from .blending import Background, blend


def blended_predictor(predict: Predict, background: Background, schedule: MaskSchedule, sigmas: Tensor) -> Predict:
    """A predictor that keeps the outside on the source's path, before and after the model (methods.md, section 1).

    Before: the outside of z becomes the source at that level. After: the outside of the prediction becomes the source.
    """

    def blended(z: Tensor, sigma: float) -> Tensor:
        mask = schedule.at_sigma(sigma, sigmas)
        arrived = schedule.at_sigma(sigma * (1 + 3e-5), sigmas)  # what was blended when this level was reached
        clean = predict(blend(z, background.at(sigma), arrived), sigma)
        return blend(clean, background.source, mask)

    return blended
