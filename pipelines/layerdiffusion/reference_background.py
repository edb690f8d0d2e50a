"""The inputs of LayerDiffusion's stage 2: the object's mask on the latent grid, and the reference background.

The reference is the user's image, or an image that the model generates from the text of the new background (Li et al. 2023,
section 3; docs/methods.md, section 10).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.guidance import EditPrompts
from ..core.images import encode_image
from ..core.masks import downsample
from ..core.noise import seeded_noise
from ..core.progress import Progress, silent
from ..core.protocols import Denoiser, LatentCodec
from ..core.samplers import predictor, sample
from ..core.shapes import check_image, check_mask

log = logging.getLogger("editkit")


def object_latent_mask(mask: Tensor, height: int, width: int, factor: int | None = None) -> Tensor:
    """An object's mask on the latent grid: the latent pixels of which it covers at least half.

    An object too thin for that keeps every latent pixel that it touches, and a warning is logged.

    Args:
        mask: [B, H, W] in [0, 1].
        height, width: of the latent grid.
        factor: pixels per latent pixel, as in `downsample`.
    Returns: [B, height, width] of 0 and 1.
    """
    mask = check_mask(mask, "mask")
    covered = downsample(mask, height, width, "area", 0.5, factor=factor)
    if not covered.lost:
        return covered.mask
    log.warning(
        "the mask covers no latent pixel by half in image %s: every latent pixel that it touches is used", covered.lost
    )
    peak = mask.amax(dim=(1, 2), keepdim=True)
    solid = torch.where((peak > 0) & (peak < 0.5), mask / peak, mask)  # a soft object counts by its own largest value
    touched = downsample(solid, height, width, "max", 0.5, factor=factor).mask
    lost = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    lost[covered.lost] = True
    return torch.where(lost.view(-1, 1, 1), touched, covered.mask)


def fitted_image(image: Tensor, height: int, width: int) -> Tensor:
    """Scale an image [B, H, W, 3] until it covers `height` x `width` pixels, and crop its centre."""
    image = check_image(image, "image")
    if tuple(image.shape[1:3]) == (height, width):
        return image
    scale = max(height / image.shape[1], width / image.shape[2])
    size = (max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale)))
    scaled = F.interpolate(image.movedim(-1, 1), size, mode="bilinear", align_corners=False, antialias=True)
    top = (size[0] - height) // 2
    left = (size[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].movedim(1, -1).clamp(0, 1).contiguous()


def reference_from_image(codec: LatentCodec, image: Tensor, height: int, width: int) -> Tensor:
    """Encode an image as the reference background of an image of `height` x `width` pixels.

    Args:
        codec: the VAE.
        image: [B, H, W, 3] in [0, 1] of any size; scaled and cropped to fit.
        height, width: in pixels.
    Returns: clean latents [B, C, h, w], unscaled.
    """
    return encode_image(codec, fitted_image(image, height, width))


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
    """Generate a reference background from text by DDIM sampling.

    Args:
        denoiser: the model.
        prompts: text of the new background, negative prompt and guidance scale.
        shape: of the latent, [B, C, h, w].
        sigmas: the whole grid, descending to 0, [N + 1].
        seeds: one per image.
        progress: called after every step; raising there cancels.
    Returns: clean latents [B, C, h, w], unscaled.
    """
    noise = seeded_noise(shape[1:], seeds, denoiser.device)
    z = denoiser.noise(torch.zeros_like(noise), noise, float(sigmas[0]))
    return denoiser.scale_out(sample("euler", predictor(denoiser, prompts), z, sigmas, progress))
