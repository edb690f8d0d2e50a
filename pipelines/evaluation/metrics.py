"""Numbers that say what an edit did: outside the mask, at its border, and against a text (methods.md, 12).

Every measure is per image, so that nothing depends on how a batch was grouped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError
from ..core.shapes import check_image, check_mask, common_batch, match_batch, same_size

PSNR_CAP = 100.0  # dB, of identical images
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_CONSTANTS = 0.01**2, 0.03**2  # of a data range of 1


def psnr(
    a: Tensor, b: Tensor, region: Tensor | None = None, *, cap: float = PSNR_CAP, over_frame: bool = False
) -> Tensor:
    """Peak signal-to-noise ratio in dB of two IMAGEs in [0, 1]: -10 log10 of the mean squared error, float32 [B].

    Args:
        region: MASK whose ones (or weights) are compared; the error is averaged over them, not over the frame. None
            compares everything.
        cap: value of identical images, and the largest returned.
        over_frame: average the region's error over the whole frame, as the code of PnPInversion does; the number is then
            the larger the smaller the region.
    Returns: NaN for an image whose region is empty.
    """
    a, b, batch = _pair(a, b)
    error = (a - b).square().mean(-1)
    weight = torch.ones_like(error) if region is None else _region(region, a, batch).expand_as(error)
    total = weight.flatten(1).double().sum(1)
    error = (error * weight).flatten(1).double().sum(1) / total
    if over_frame:
        error = error * total / weight[0].numel()
    return (-10 * error.log10()).clamp(max=cap).float()


def psnr_outside(
    image: Tensor, source: Tensor, mask: Tensor, *, cap: float = PSNR_CAP, over_frame: bool = False
) -> Tensor:
    """PSNR in dB [B] of `image` against `source` where the MASK (1 = edit) is not; NaN where it is everywhere."""
    return psnr(image, source, 1 - check_mask(mask, "mask"), cap=cap, over_frame=over_frame)


def ssim(a: Tensor, b: Tensor, region: Tensor | None = None) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1, of two IMAGEs in [0, 1]: float32 [B].

    Windows are Gaussian, 11 x 11 pixels with a deviation of 1.5, wholly inside the picture; data range 1; population
    variances; the mean over red, green and blue. Other conventions (grey, a uniform window of 7 x 7) differ by several
    hundredths.

    Args:
        region: MASK; only windows whose every pixel has 1 count. None counts all.
    Returns: NaN where no window counts, also for pictures with a side below 11 pixels.
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
    """SSIM of every window: planes [C, H, W] to [C, H - 10, W - 10]."""
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
    small, smaller = SSIM_CONSTANTS[1], SSIM_CONSTANTS[0]
    brightness = (2 * first * second + smaller) / (first * first + second * second + smaller)
    return brightness * (2 * covariance + small) / (variances[0] + variances[1] + small)


def change_outside(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """The largest absolute difference of any channel where the MASK is 0, float32 [B]; 0 where it is nowhere 0."""
    image, source, batch = _pair(image, source)
    outside = _region(mask, image, batch) == 0
    return ((image - source).abs().amax(-1) * outside).flatten(1).amax(1)


def largest_change_outside(image: Tensor, source: Tensor, mask: Tensor) -> float:
    """The largest `change_outside` of a batch."""
    return float(change_outside(image, source, mask).max())


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
