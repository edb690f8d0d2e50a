"""Metrics of an edit: outside the mask, at its border, and against a text (docs/methods.md, section 12).

Every metric is per image, so that no value depends on the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError
from ..core.shapes import check_image, check_mask, common_batch, match_batch, same_size

PSNR_CAP = 100.0  # dB, of identical images
SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_C1 = 0.01**2  # for a data range of 1
SSIM_C2 = 0.03**2


def psnr(
    a: Tensor, b: Tensor, region: Tensor | None = None, *, cap: float = PSNR_CAP, over_frame: bool = False
) -> Tensor:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared error, float32 [B].

    Args:
        a, b: IMAGEs [B, H, W, 3] in [0, 1].
        region: MASK [1 or B, H, W]; its values weight the error, which is averaged over the region. None = everywhere.
        cap: the largest value, also that of identical images, in dB.
        over_frame: average the error of the region over the whole frame instead, as the code of PnPInversion does; a
            smaller region then gives a larger value.
    Returns: NaN for an image whose region is empty.
    Raises: ShapeError.
    """
    return (-10 * _squared_error(a, b, region, over_frame).log10()).clamp(max=cap).float()


def mse(a: Tensor, b: Tensor, region: Tensor | None = None, *, over_frame: bool = False) -> Tensor:
    """Mean squared error, float32 [B] (docs/methods.md, section 12).

    Args:
        a, b: IMAGEs [B, H, W, 3] in [0, 1].
        region: MASK [1 or B, H, W]; its values weight the error, which is averaged over the region. None = everywhere.
        over_frame: average over the whole frame instead, see `psnr`.
    Returns: NaN for an image whose region is empty.
    Raises: ShapeError.
    """
    return _squared_error(a, b, region, over_frame).float()


def _squared_error(a: Tensor, b: Tensor, region: Tensor | None, over_frame: bool) -> Tensor:
    """`mse` in float64."""
    a, b, batch = _pair(a, b)
    error = (a - b).square().mean(-1)
    weight = torch.ones_like(error) if region is None else _region(region, a, batch).expand_as(error)
    total = weight.flatten(1).double().sum(1)
    error = (error * weight).flatten(1).double().sum(1) / total
    if over_frame:
        error = error * total / weight[0].numel()
    return error


def psnr_outside(
    image: Tensor, source: Tensor, mask: Tensor, *, cap: float = PSNR_CAP, over_frame: bool = False
) -> Tensor:
    """PSNR of an edit against its source outside a mask, in dB (docs/methods.md, section 12).

    Args:
        image, source: IMAGEs [B, H, W, 3] in [0, 1].
        mask: MASK [1 or B, H, W] in [0, 1], 1 = edit; 1 - mask weights the error.
        cap: the largest value, also that of equal images, in dB.
        over_frame: average the error over the whole frame instead, see `psnr`.
    Returns: float32 [B]; NaN for an image whose mask is 1 everywhere.
    Raises: ShapeError for anything but IMAGEs and a MASK, and for sizes or batches that differ.
    """
    return psnr(image, source, 1 - check_mask(mask, "mask"), cap=cap, over_frame=over_frame)


def ssim(a: Tensor, b: Tensor, region: Tensor | None = None) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1, float32 [B].

    Windows are Gaussian, 11 x 11 pixels with a deviation of 1.5, wholly inside the image; data range 1; population
    variances; the mean over red, green and blue. Other conventions (grey, a uniform window of 7 x 7) differ by several
    hundredths.

    Args:
        a, b: IMAGEs [B, H, W, 3] in [0, 1].
        region: MASK [1 or B, H, W]; a window counts if all its pixels are 1. None counts all.
    Returns: NaN where no window counts, also for images with a side below 11 pixels.
    """
    a, b, batch = _pair(a, b)
    inside = None if region is None else _region(region, a, batch)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        return a.new_full((batch,), math.nan)
    values = []
    for index in range(batch):
        similarity = _similarity(*(image[index].movedim(-1, 0).double() for image in (a, b))).mean(0).float()
        if inside is not None:
            covered = -F.max_pool2d(-inside[index][None], SSIM_WINDOW, stride=1)[0]
            similarity = similarity[covered == 1]
        values.append(similarity.mean())
    return torch.stack(values)


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of every window of two images [C, H, W]: [C, H - 10, W - 10]."""
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    kernel = torch.softmax(-(offsets**2).double() / (2 * SSIM_SIGMA**2), 0).tolist()

    def mean(planes: Tensor) -> Tensor:
        for axis in (1, 2):
            length = planes.shape[axis] - SSIM_WINDOW + 1
            total = planes.narrow(axis, 0, length) * kernel[0]
            for start, weight in enumerate(kernel[1:], 1):
                total.add_(planes.narrow(axis, start, length), alpha=weight)
            planes = total
        return planes

    first, second = mean(a), mean(b)
    variances = mean(a * a) - first * first, mean(b * b) - second * second
    covariance = mean(a * b) - first * second
    luminance = (2 * first * second + SSIM_C1) / (first * first + second * second + SSIM_C1)
    return luminance * (2 * covariance + SSIM_C2) / (variances[0] + variances[1] + SSIM_C2)


def change_outside(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """The largest absolute difference of any channel where the MASK is 0, float32 [B]; 0 if it is 0 nowhere."""
    image, source, batch = _pair(image, source)
    outside = _region(mask, image, batch) == 0
    return ((image - source).abs().amax(-1) * outside).flatten(1).amax(1)


def largest_change_outside(image: Tensor, source: Tensor, mask: Tensor) -> float:
    """The largest `change_outside` of a batch."""
    return float(change_outside(image, source, mask).max())


def seam_contrast(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """The visible step at the border of an edit, beyond the gradient of its surroundings, float32 [B] (docs/methods.md, 12).

    For every pair of neighbouring pixels p (inside, mask >= 0.5) and q (outside), with a behind p and b behind q on the
    same line, the excess step is max(0, |p - q| - max(|a - p|, |b - q|)), so a gradient that continues on either side
    does not count. Steps are averaged over pairs and channels, in units of image values. The value of `source`, which
    has no seam there, is subtracted, and the result is at least 0. It is 0 where the mask has no border.
    """
    image, source, batch = _pair(image, source)
    inside = (_region(mask, image, batch) >= 0.5).expand(image.shape[:3])
    return (_excess_step(image, inside) - _excess_step(source, inside)).clamp(min=0)


def _excess_step(image: Tensor, inside: Tensor) -> Tensor:
    """The mean excess step [B] over the pairs of pixels at the border of `inside` [B, H, W]; see `seam_contrast`."""
    total = image.new_zeros(image.shape[0])
    pairs = torch.zeros_like(total)
    for axis in (1, 2):
        step = image.diff(dim=axis).abs().mean(-1)
        border = inside.int().diff(dim=axis) != 0
        slope = torch.where(border, torch.zeros_like(step), step)  # the step of another border is no gradient
        padded = F.pad(slope, (1, 1) if axis == 2 else (0, 0, 1, 1))
        behind, ahead = padded.narrow(axis, 0, step.shape[axis]), padded.narrow(axis, 2, step.shape[axis])
        excess = (step - torch.maximum(behind, ahead)).clamp(min=0)
        total = total + (excess * border).flatten(1).sum(1)
        pairs = pairs + border.flatten(1).sum(1)
    return total / pairs.clamp(min=1)


def wilson_interval(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a rate of `hits` in `trials`; `z` is the normal quantile (1.96 = 95 %)."""
    if trials < 1 or not 0 <= hits <= trials:
        raise ParameterError(f"{hits} hits of {trials} trials: trials must be at least 1 and hits between 0 and trials")
    rate = hits / trials
    spread = z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def clip_score(cosine: Tensor) -> Tensor:
    """CLIPScore (Hessel et al. 2021), 2.5 max(cos, 0). Some tables print the cosine or 100 cos, which do not compare."""
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
