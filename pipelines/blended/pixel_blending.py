"""Blending in pixels for the last steps, as the published LDM script offers (`--percentage_of_pixel_blending`).

After such a step the prediction is decoded, composited over the source image by the pixel mask, encoded again and noised,
in place of the blend of latents. Each of these steps costs a decode and an encode (docs/methods.md, section 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError
from ..core.protocols import Denoiser, LatentCodec
from ..core.shapes import BRIGHTEST, check_image, check_mask, match_batch, pad_to_factor, same_size


@dataclass(frozen=True)
class PixelBlending:
    """What the last steps blend with.

    Attributes:
        codec: the VAE.
        image: source, IMAGE [B or 1, H, W, 3] in [0, 1].
        mask: MASK [B or 1, H, W] at pixel resolution, 1 = edit; binarised at 0.5, as published.
        fraction: fraction of all steps, [0, 1]: the last int(N (1 - fraction)) to N are blended in pixels.
    """

    codec: LatentCodec
    image: Tensor
    mask: Tensor
    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ParameterError(
                f"pixel_blending is {self.fraction}: give a fraction of the steps, 0 (none) to 1 (all)"
            )
        same_size(check_image(self.image, "image"), check_mask(self.mask, "pixel mask"), "image", "pixel mask")

    def applies(self, step: int, steps: int) -> bool:
        """Whether `step` (from 0) of `steps` blends in pixels."""
        return step >= int(steps * (1 - self.fraction))

    def composited(self, denoiser: Denoiser, denoised: Tensor) -> Tensor:
        """A prediction [B, C, h, w] over the source, in model scale: decoded, composited in pixels and encoded."""
        decoded = self.codec.decode(denoiser.scale_out(denoised), clamp=False).clamp(1 - BRIGHTEST, BRIGHTEST)
        source = pad_to_factor(check_image(self.image, "image"), self.codec.factor).to(decoded)
        mask = pad_to_factor(check_mask(self.mask, "pixel mask"), self.codec.factor).to(decoded)
        source = match_batch(source, len(decoded), "image", "latent")
        mask = match_batch(mask, len(decoded), "pixel mask", "latent")
        same_size(decoded, source, "the decoded latent", "image")
        edited = torch.where(mask[..., None] >= 0.5, decoded, source)
        return denoiser.scale_in(self.codec.encode(edited)).to(denoised)
