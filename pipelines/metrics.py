"""Numbers that say what an edit did: outside the mask, at its border, and against a text (methods.md, 12).

Every measure is per image, so that nothing depends on how a batch was grouped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ParameterError
from .shapes import check_image, check_mask, common_batch, match_batch, same_size

PSNR_CAP = 100.0  # dB, of identical images


def psnr(a: Tensor, b: Tensor, region: Tensor | None = None, *, cap: float = PSNR_CAP) -> Tensor:
    """Peak signal-to-noise ratio in dB of two IMAGEs in [0, 1]: -10 log10 of the mean squared error, float32 [B].

    Args:
        region: MASK whose ones (or weights) are compared; the error is averaged over them, not over the frame. None
            compares everything.
        cap: value of identical images, and the largest returned.
    Returns: NaN for an image whose region is empty.
    """
    a, b, batch = _pair(a, b)
    error = (a - b).square().mean(-1)
    weight = torch.ones_like(error) if region is None else _region(region, a, batch).expand_as(error)
    error = (error * weight).flatten(1).double().sum(1) / weight.flatten(1).double().sum(1)
    return (-10 * error.log10()).clamp(max=cap).float()


def psnr_outside(image: Tensor, source: Tensor, mask: Tensor, *, cap: float = PSNR_CAP) -> Tensor:
    """PSNR in dB [B] of `image` against `source` where the MASK (1 = edit) is not; NaN where it is everywhere."""
    return psnr(image, source, 1 - check_mask(mask, "mask"), cap=cap)


def largest_change_outside(image: Tensor, source: Tensor, mask: Tensor) -> float:
    """The largest absolute difference of any channel where the MASK is 0; 0.0 where it is nowhere 0."""
    image, source, batch = _pair(image, source)
    outside = _region(mask, image, batch) == 0
    return float(((image - source).abs().amax(-1) * outside).max())


def seam_contrast(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """How visible the border of an edit is: the step across it that the surroundings do not explain, float32 [B].

    For every pair of neighbouring pixels p (inside, mask >= 0.5) and q (outside), with a behind p and b behind q on the
    same line, the unexplained step is max(0, |p - q| - max(|a - p|, |b - q|)): a gradient that continues on either side
    costs nothing. Steps are averaged over pairs and channels, in units of image values. The same measure of `source`,
    which has no seam there, is subtracted, and nothing below 0 is returned. 0 where the mask has no border.
    """
    image, source, batch = _pair(image, source)
    inside = (_region(mask, image, batch) >= 0.5).expand(image.shape[:3])
    return (_unexplained_step(image, inside) - _unexplained_step(source, inside)).clamp(min=0)


def _unexplained_step(image: Tensor, inside: Tensor) -> Tensor:
    total = image.new_zeros(image.shape[0])
    pairs = torch.zeros_like(total)
    for axis in (1, 2):
        step = image.diff(dim=axis).abs().mean(-1)
        border = inside.int().diff(dim=axis) != 0
        slope = torch.where(border, torch.zeros_like(step), step)  # a step of another border explains nothing
        padded = F.pad(slope, (1, 1) if axis == 2 else (0, 0, 1, 1))
        behind, ahead = padded.narrow(axis, 0, step.shape[axis]), padded.narrow(axis, 2, step.shape[axis])
        excess = (step - torch.maximum(behind, ahead)).clamp(min=0)
        total = total + (excess * border).flatten(1).sum(1)
        pairs = pairs + border.flatten(1).sum(1)
    return total / pairs.clamp(min=1)


def wilson_interval(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success rate; `z` is the normal quantile (1.96 = 95 %)."""
    if trials < 1 or not 0 <= hits <= trials:
        raise ParameterError(f"{hits} hits of {trials} trials: trials must be at least 1 and hits between 0 and trials")
    rate, spread = hits / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def clip_score(cosine: Tensor) -> Tensor:
    """CLIPScore of cosine similarities: 2.5 max(cos, 0). Other tables print the cosine or 100 cos: never mix them."""
    return 2.5 * cosine.clamp(min=0)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    a, b = check_image(a, "image"), check_image(b, "source").to(a.device)
    same_size(a, b, "image", "source")
    batch = common_batch(image=a, source=b)
    return match_batch(a, batch, "image", "source"), match_batch(b, batch, "source", "image"), batch


def _region(mask: Tensor, image: Tensor, batch: int) -> Tensor:
    mask = check_mask(mask, "mask").to(image.device)
    same_size(mask, image, "mask", "image")
    return match_batch(mask, batch, "mask", "image")
