"""Regularised inversion: predicted noise is moved towards what noise looks like, before each inversion step.

pix2pix-zero (Parmar et al. 2023, section 3.1; docs/methods.md, section 5) lowers two losses of the predicted eps by plain
gradient steps that do not pass the network:

    auto-correlation   sum over channels, the sizes of an average-pooling pyramid and both axes of mean(eps roll(eps, k))^2,
                       with a random shift k for each channel and size
    KL                 var + mean^2 - 1 - log(var + 1e-7), over all elements of an image

Both gradients are written out, so no autograd is needed and the work is a few element-wise operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError
from ..core.noise import image_seeds, seeded_uniform

SMALLEST = 8  # latent pixels: sides at or below this end the pyramid
ROUNDING = 1e-7  # added to the variance in the logarithm, as published


@dataclass(frozen=True)
class Regularisation:
    """How much to regularise. The published numbers by default.

    Attributes:
        steps: rounds of both losses per inversion step, >= 1.
        auto_correlation: weight (step size) of the auto-correlation, >= 0; 0 leaves it out.
        kl: weight (step size) of the KL term, >= 0; 0 leaves it out.
        rolls: draws of random shifts per round, >= 1; their gradients are weighted by 1 / rolls.
        seed: of the shifts.
    """

    steps: int = 5
    auto_correlation: float = 20.0
    kl: float = 20.0
    rolls: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rolls < 1:
            raise ParameterError(
                f"regularisation has {self.steps} steps of {self.rolls} rolls: give at least 1 of both"
            )
        for name in ("auto_correlation", "kl"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ParameterError(f"{name} is {getattr(self, name)}: give 0 (off) or more (20 as published)")

    def __call__(self, eps: Tensor, step: int) -> Tensor:
        """The regularised noise [B, C, h, w] of inversion step `step`; no image depends on the others."""
        shifts = self._shifts(eps, step)
        for draws in shifts:
            if self.auto_correlation > 0:
                for shift in draws:
                    eps = eps - self.auto_correlation / self.rolls * auto_correlation_gradient(eps, shift)
            if self.kl > 0:
                eps = eps - self.kl * kl_gradient(eps)
        return eps

    def _shifts(self, eps: Tensor, step: int) -> Tensor:
        """Random shifts [steps, rolls, B, C, sizes], from 0 to half a side."""
        batch, channels = eps.shape[:2]
        halves = [max(1, side // 2) for side in pyramid_sides(min(eps.shape[-2:]))]
        shape = (self.steps, self.rolls, channels, len(halves))
        uniform = seeded_uniform(shape, image_seeds(self.seed, batch), eps.device, draw=step)
        return (uniform.movedim(0, 2) * torch.tensor(halves, device=eps.device)).long()


def pyramid_sides(side: int) -> list[int]:
    """The shorter side at every size of the pyramid, largest first."""
    sides = [side]
    while sides[-1] > SMALLEST:
        sides.append(sides[-1] // 2)
    return sides


def auto_correlation_gradient(eps: Tensor, shifts: Tensor) -> Tensor:
    """The gradient of the auto-correlation loss.

    Args:
        eps: noise [B, C, h, w].
        shifts: shift of each channel at each size of the pyramid, integers [B, C, sizes].
    Returns: [B, C, h, w].
    """
    gradient = _gradient_along(eps, shifts[..., 0], 2) + _gradient_along(eps, shifts[..., 0], 3)
    if shifts.shape[-1] == 1:
        return gradient
    pooled = auto_correlation_gradient(F.avg_pool2d(eps, 2), shifts[..., 1:])
    spread = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4  # average pooling, transposed
    return gradient + F.pad(spread, (0, eps.shape[3] - spread.shape[3], 0, eps.shape[2] - spread.shape[2]))


def _gradient_along(eps: Tensor, shift: Tensor, axis: int) -> Tensor:
    """The gradient of mean(eps roll(eps, shift))^2 of each channel; `shift` [B, C], along one axis."""
    forward, backward = _rolled(eps, shift, axis), _rolled(eps, -shift, axis)
    correlation = (eps * forward).mean(dim=(2, 3), keepdim=True)
    return 2 * correlation * (forward + backward) / eps[0, 0].numel()


def _rolled(eps: Tensor, shift: Tensor, axis: int) -> Tensor:
    """`torch.roll` with a shift [B, C] for each channel."""
    side = eps.shape[axis]
    index = (torch.arange(side, device=eps.device) - shift[..., None]) % side
    index = index[..., :, None] if axis == 2 else index[..., None, :]
    return eps.gather(axis, index.expand_as(eps))


def kl_gradient(eps: Tensor) -> Tensor:
    """The gradient of var + mean^2 - 1 - log(var + 1e-7), per image [B, C, h, w] (unbiased variance, as published)."""
    count = eps[0].numel()
    mean = eps.mean(dim=(1, 2, 3), keepdim=True)
    variance = eps.var(dim=(1, 2, 3), keepdim=True)
    return 2 * mean / count + 2 * (1 - 1 / (variance + ROUNDING)) * (eps - mean) / (count - 1)
