"""The training loss of diffusion models, for a given image: the error of the predicted noise.

In sigma space the error is (D - z_0) / sigma with the denoised prediction D. For eps and v models it equals eps - eps',
because z = z_0 + sigma eps and D = z - sigma eps'. For flow models it equals v - v', because z_0 = z - sigma v and
D = z - sigma v' (docs/methods.md, section 0.2). Each family is therefore fitted by the loss of equations 2, 4 and 5 of
LayerDiffusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.noise import seeded_draw
from ..core.protocols import Context, Denoiser

TIMESTEPS = 1000  # t is uniform in 1 to 1000, as published


class NoiseError:
    """The error of a denoiser on clean latents. Every step and image draws its own sigma and noise."""

    def __init__(self, denoiser: Denoiser, clean: Tensor, seeds: Sequence[int]) -> None:
        """Prepare the draws.

        Args:
            denoiser: the model.
            clean: clean latents, model scale, [B, C, h, w].
            seeds: one per image. Draws depend on the image's seed and the step, not on the rest of the batch.
        """
        self.denoiser = denoiser
        self.clean = clean
        self.seeds = list(seeds)
        self.sigmas = denoiser.schedule(TIMESTEPS)[:-1].to(clean.device)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Sigmas [B, 1, 1, 1] and noise [B, C, h, w] of one step."""
        uniform, noise = seeded_draw(self.clean.shape[1:], self.seeds, self.clean.device, draw=step + 1)
        index = (uniform * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        return self.sigmas[index].view(-1, 1, 1, 1), noise

    def __call__(self, step: int, contexts: Sequence[Context]) -> Tensor:
        """True minus predicted noise (flow models: velocity), [len(contexts), B, C, h, w]."""
        sigma, noise = self.draw(step)
        z = self.denoiser.noise(self.clean, noise, sigma)
        return (self.denoiser.denoise(z, sigma, contexts) - self.clean) / sigma


def masked_mean(error: Tensor, mask: Tensor, *, normalise: bool = False) -> Tensor:
    """Mean of (mask error)^2 for every image.

    Args:
        error: [..., B, C, h, w].
        mask: where the error counts, [B, 1, h, w] in [0, 1].
        normalise: divide by the mean of mask^2, so that small regions count as much as large ones.
    Returns: [..., B]; 0 for an empty mask.
    """
    loss = (error * mask).square().mean(dim=(-3, -2, -1))
    if normalise:
        loss = loss / mask.square().mean(dim=(-3, -2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    return loss
