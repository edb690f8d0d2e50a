"""What LayerDiffusion starts from besides the picture: the subject's mask on the latent grid, and a reference background.

Li et al. 2023, section 3 (methods.md, section 10): the reference is the user's picture, or one that the model itself makes
from the text of the new background.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.guidance import EditPrompts
from ..core.masks import downsample
from ..core.noise import seeded_noise
from ..core.progress import Progress, silent
from ..core.protocols import Denoiser
from ..core.samplers import predictor, sample
from ..core.shapes import check_image, check_mask

log = logging.getLogger("editkit")


def object_latent_mask(mask: Tensor, height: int, width: int, factor: int | None = None) -> Tensor:
    """A subject's MASK [B, H, W] on a latent grid, [B, height, width] of 0 and 1: cells that it covers by half or more.

    A subject too thin for that keeps every cell that it touches, and a warning is logged. `factor` as in `downsample`.
    """
    mask = check_mask(mask, "mask")
    covered = downsample(mask, height, width, "area", 0.5, factor=factor)
    if not covered.lost:
        return covered.mask
    log.warning("the mask covers no latent cell by half in image %s: every cell it touches is taken", covered.lost)
    touched = downsample(mask, height, width, "max", 0.5, factor=factor).mask
    lost = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    lost[covered.lost] = True
    return torch.where(lost.view(-1, 1, 1), touched, covered.mask)


def fitted_image(image: Tensor, height: int, width: int) -> Tensor:
    """IMAGE [B, H, W, 3] scaled until it covers `height` x `width` pixels, and cut at the centre; one that fits stays."""
    image = check_image(image, "image")
    if tuple(image.shape[1:3]) == (height, width):
        return image
    scale = max(height / image.shape[1], width / image.shape[2])
    size = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
    scaled = F.interpolate(image.movedim(-1, 1), size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].movedim(1, -1).clamp(0, 1).contiguous()


@torch.no_grad()
def reference_from_text(
    denoiser: Denoiser,
    prompts: EditPrompts,
    shape: Sequence[int],
    sigmas: Tensor,
    *,
    seeds: Sequence[int],
    progress: Progress = silent,
) -> Tensor:
    """A reference background made from text by plain DDIM sampling: clean latents [B, C, h, w], unscaled.

    Args:
        shape: [B, C, h, w].    sigmas: the whole grid, falling to 0.    seeds: one for each image.
    """
    noise = seeded_noise(shape[1:], seeds, denoiser.device)
    z = denoiser.noise(torch.zeros_like(noise), noise, float(sigmas[0]))
    return denoiser.scale_out(sample("euler", predictor(denoiser, prompts), z, sigmas, progress))
