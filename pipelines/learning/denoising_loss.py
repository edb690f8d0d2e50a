"""The loss that diffusion models are trained with, for a picture at hand: the error of the predicted noise.

In sigma space it is (D - z_0) / sigma with the clean prediction D. For eps and v models that is eps - eps', because
z = z_0 + sigma eps and D = z - sigma eps'; for flow models v - v', because z_0 = z - sigma v and D = z - sigma v'
(methods.md, 0.2). So each family is fitted by the loss of equations 2, 4 and 5 of LayerDiffusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.noise import seeded_draw
from ..core.protocols import Context, Denoiser

LEVELS = 1000  # t is uniform in 1 to 1000, as published


class NoiseError:
    """The error of a denoiser on clean latents, each at a level and with noise of its own, new at every step."""

    def __init__(self, denoiser: Denoiser, clean: Tensor, seeds: Sequence[int]) -> None:
        """`clean` is model-scaled [B, C, h, w]; image b draws by `seeds[b]` and the step, whatever else is in the batch."""
        self.denoiser, self.clean, self.seeds = denoiser, clean, list(seeds)
        self.levels = denoiser.schedule(LEVELS)[:-1].to(clean.device)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Levels [B, 1, 1, 1] and noise [B, C, h, w] of one step."""
        uniform, noise = seeded_draw(self.clean.shape[1:], self.seeds, self.clean.device, draw=step + 1)
        index = (uniform * len(self.levels)).long().clamp(max=len(self.levels) - 1)
        return self.levels[index].view(-1, 1, 1, 1), noise

    def __call__(self, step: int, contexts: Sequence[Context]) -> Tensor:
        """True minus predicted noise (or velocity), [len(contexts), B, C, h, w]."""
        sigma, noise = self.draw(step)
        z = self.denoiser.noise(self.clean, noise, sigma)
        return (self.denoiser.denoise(z, sigma, contexts) - self.clean) / sigma


def masked_mean(error: Tensor, mask: Tensor, *, normalise: bool = False) -> Tensor:
    """Mean of (mask error)^2 for every image, [..., B] of [..., B, C, h, w]; mask [B, 1, h, w] in [0, 1].

    `normalise` divides by the mean of mask^2, so that small regions count as much as large ones; an empty mask gives 0.
    """
    loss = (error * mask).square().mean(dim=(-3, -2, -1))
    if normalise:
        loss = loss / mask.square().mean(dim=(-3, -2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    return loss
