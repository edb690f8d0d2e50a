"""Masks on the latent grid: downsampling that keeps thin strokes, dilation, and mask schedules.

A mask is 1 where the image may change. Every method whose editable set depends on the step uses `MaskSchedule`
(docs/methods.md, sections 0.4 and 2).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ParameterError, ShapeError
from .shapes import Sources, check_mask, match_batch, pad_to_factor, padded_length, with_sources
from .sigmas import step_of_sigma

log = logging.getLogger("editkit")

MODES = ("max", "area", "nearest", "bilinear")
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # pixels of the image per latent pixel that a VAE may have
SPACINGS = ("steps", "log-sigma", "published")
PAPER_KERNELS = (7, 5, 3, 1)
PAPER_SIDE = 32  # latent pixels of the shorter side that the paper's kernels were tuned on
PURE_NOISE_SIGMA = 15.0  # above Stable Diffusion's largest sigma, 14.6; nothing of an image is decided there
PREVIEW_COLUMNS = 8  # steps in the preview of a release schedule


# -------------------------------------------------------------------------------------------------------- downsampling
@dataclass(frozen=True)
class DownsampledMask:
    """A mask on the latent grid.

    Attributes:
        mask: float32 [B, h, w] in [0, 1].
        kept: fraction of each image's stroke that lies under the latent mask, float32 [B]; a pixel of a soft stroke
            counts by its value. 1 where there is no stroke.
    """

    mask: Tensor
    kept: Tensor

    @property
    def lost(self) -> list[int]:
        """Indices of the images whose whole stroke vanished."""
        return [i for i, fraction in enumerate(self.kept.tolist()) if fraction == 0]


def downsample(
    mask: Tensor, height: int, width: int, mode: str = "max", threshold: float = 0.5, *, factor: int | None = None
) -> DownsampledMask:
    """Downsample a mask to a latent grid (docs/methods.md, section 0.4).

    Args:
        mask: MASK [B, H, W] in [0, 1], 1 = edit. If the grid belongs to a mask of this size (padded right and below to
            multiples of `factor`), every latent pixel covers an exact block. A mask of any other size is stretched.
        height, width: of the grid, in latent pixels, at least 1.
        mode: "max" takes the largest value in a latent pixel, so that every stroke of at least `threshold` is kept;
            "area" takes the mean, its coverage; "nearest" samples the mask at the centre (as published); "bilinear"
            interpolates there.
        threshold: a latent pixel becomes 1 at this value and above, in [0, 1]; 0 keeps soft values. A soft stroke whose
            values lie below it is lost in every mode.
        factor: pixels per latent pixel, as the VAE says; None takes the smallest power of two that fits both sides.
    Returns: the mask on the grid, float32 [B, h, w] in [0, 1], and the fraction of each stroke that it keeps.
    Raises: ShapeError for anything but a MASK, or an empty grid; ParameterError for an unknown mode or a threshold
        outside 0 to 1.
    """
    mask = check_mask(mask, "mask")
    if mode not in MODES:
        raise ParameterError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    if not 0 <= threshold <= 1:
        raise ParameterError(f"threshold is {threshold}: give 0 (keep soft values) to 1")
    if height < 1 or width < 1:
        raise ShapeError(f"the latent grid is {width} x {height} latent pixels: connect a LATENT or VAE with an image")
    blocks = _pad_to_blocks(mask, height, width, factor)[:, None]
    latent_mask = _reduce(blocks, height, width, mode)[:, 0]
    if threshold > 0:
        latent_mask = (latent_mask >= threshold).to(mask.dtype)
    return DownsampledMask(latent_mask, _kept(blocks[:, 0], latent_mask))


def _pad_to_blocks(mask: Tensor, height: int, width: int, factor: int | None) -> Tensor:
    """The mask padded to multiples of the factor, if it belongs to this grid; otherwise unchanged."""
    for pixels in [factor] if factor else FACTORS:
        padded = padded_length(mask.shape[1], pixels), padded_length(mask.shape[2], pixels)
        if padded == (height * pixels, width * pixels):
            return pad_to_factor(mask, pixels)
    return mask


def _reduce(mask: Tensor, height: int, width: int, mode: str) -> Tensor:
    if mode == "max":
        return F.adaptive_max_pool2d(mask, (height, width))
    if mode == "area":
        return F.adaptive_avg_pool2d(mask, (height, width))
    if mode == "nearest":
        return F.interpolate(mask, (height, width), mode="nearest-exact")
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False, antialias=False)


def _kept(mask: Tensor, latent_mask: Tensor) -> Tensor:
    """Fraction [B] of the stroke whose latent pixels are marked; a pixel counts by its value."""
    stroke = mask.float()
    cover = F.interpolate(latent_mask[:, None], mask.shape[1:], mode="nearest-exact")[:, 0]
    total = stroke.sum(dim=(1, 2))
    fraction = (stroke * (cover > 0)).sum(dim=(1, 2)) / total
    return torch.where(total > 0, fraction, torch.ones_like(fraction))


# ---------------------------------------------------------------------------------------------------------- morphology
def dilate(mask: Tensor, kernel: int) -> Tensor:
    """Dilate [..., h, w] by a square of `kernel` latent pixels (odd; 1 changes nothing). Outside the image counts as 0."""
    if kernel < 1 or kernel % 2 == 0:
        raise ParameterError(f"kernel is {kernel}: a dilation kernel is an odd number of latent pixels (1, 3, 5, 7)")
    if kernel == 1:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return F.max_pool2d(flat, kernel, stride=1, padding=kernel // 2).reshape(mask.shape)


def remove_islands(mask: Tensor, smallest: int) -> Tensor:
    """Remove the connected components of fewer than `smallest` latent pixels from a binary mask [B, h, w].

    Pixels that touch at a corner are connected.
    """
    if smallest < 0:
        raise ParameterError(f"smallest island is {smallest} latent pixels: give 0 (keep all) or more")
    if smallest <= 1:
        return mask
    inside = (mask >= 0.5).float()[:, None]
    labels = _components(inside).flatten(1)
    sizes = torch.zeros(len(mask), mask[0].numel() + 1, device=mask.device)
    sizes = sizes.scatter_add_(1, labels, inside.flatten(1))
    return mask * (sizes.gather(1, labels) >= smallest).view(mask.shape)


def _components(inside: Tensor) -> Tensor:
    """Connected components of a binary mask [B, 1, h, w] as int64 labels: 0 outside, positive and equal within one.

    Every pixel starts with its own number, and the largest number spreads through its component. float32 counts exactly
    up to 2^24 pixels.
    """
    height, width = inside.shape[-2:]
    number = torch.arange(1, height * width + 1, device=inside.device).float().view(1, 1, height, width) * inside
    while True:
        before = number
        for _ in range(max(height, width)):
            number = F.max_pool2d(number, 3, stride=1, padding=1) * inside
        if torch.equal(number, before):
            return number.long()


# ----------------------------------------------------------------------------------------------------------- schedules
@dataclass(frozen=True)
class MaskSchedule:
    """A mask for every step of a run.

    Attributes:
        masks: float32 [stages, B, 1, h, w], the first stage first.
        spacing: how the stages divide the run. "steps": equal numbers of steps. "log-sigma": equal falls of log(sigma),
            so the last stages get few steps. "published": the rule of the official script, whose last stage is shorter
            and missing in short runs (docs/methods.md, section 16).
        shares: share of the steps of each stage, in any unit, with "steps" spacing; empty = equal shares.
        release: the one stage is a change map in [0, 1], and latent pixels become editable one after another
            (`release_schedule`).
    """

    masks: Tensor
    spacing: str = "steps"
    release: bool = False
    shares: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        return self.masks.shape[0]

    @property
    def batch(self) -> int:
        return self.masks.shape[1]

    def stage(self, step: int, sigmas: Tensor) -> int:
        """The stage of `step` (from 0) in a run over `sigmas` [N + 1].

        The last step is in the last stage, except with "published" spacing.
        """
        steps = len(sigmas) - 1
        if not 0 <= step < steps:
            raise ParameterError(f"step {step} is outside a run of {steps} steps (0 to {steps - 1})")
        if self.spacing == "published":
            return min(self.stages - 1, step // (steps // self.stages + 1))
        if step == steps - 1:
            return self.stages - 1
        if self.spacing == "log-sigma":
            return min(self.stages - 1, math.floor(_log_sigma_fraction(step, sigmas) * self.stages))
        if self.shares:
            ends = list(accumulate(self.shares))
            return sum(step * ends[-1] >= end * steps for end in ends[:-1])
        return step * self.stages // steps

    def at(self, step: int, sigmas: Tensor) -> Tensor:
        """The mask [B, 1, h, w] of `step` in a run over `sigmas` [N + 1]."""
        mask = self.masks[self.stage(step, sigmas)]
        return self._released(step / (len(sigmas) - 1)) if self.release else mask

    def _released(self, fraction: float) -> Tensor:
        """The latent pixels of a release schedule that are editable after this fraction of the steps."""
        return (1 - self.masks[0] <= fraction).to(self.masks)

    def at_sigma(self, sigma: float, sigmas: Tensor) -> Tensor:
        """The mask [B, 1, h, w] of the step that moves through `sigma` on the grid `sigmas` [N + 1]."""
        return self.at(step_of_sigma(sigma, sigmas), sigmas)

    def to(self, device: torch.device) -> MaskSchedule:
        return replace(self, masks=self.masks.to(device))

    def expanded(self, batch: int, height: int, width: int) -> MaskSchedule:
        """The schedule for a latent batch; raises ShapeError if batch or size do not fit."""
        if tuple(self.masks.shape[-2:]) != (height, width):
            raise ShapeError(
                f"schedule is made for {self.masks.shape[-1]} x {self.masks.shape[-2]} latent pixels but the latent has "
                f"{width} x {height}: make the latent mask from this LATENT"
            )
        masks = match_batch(self.masks.transpose(0, 1), batch, "schedule", "the latent").transpose(0, 1)
        return replace(self, masks=masks)

    def with_sources(self, sources: Sources | None) -> MaskSchedule:
        """The schedule for candidates, each with the mask of its source; see `shapes.with_sources`."""
        masks = with_sources(self.masks.transpose(0, 1), sources, "schedule", "latent").transpose(0, 1)
        return replace(self, masks=masks)

    def preview(self, zoom: int = 8) -> Tensor:
        """An image [1, H, W, 3] of the schedule: one row per image, one column per stage, grey gaps.

        A release schedule shows PREVIEW_COLUMNS steps instead. A latent pixel is `zoom` pixels wide.
        """
        masks = self.masks
        if self.release:
            masks = torch.stack([self._released(i / PREVIEW_COLUMNS) for i in range(PREVIEW_COLUMNS)])
        columns, rows = masks.shape[:2]
        tiles = masks[:, :, 0].repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
        tiles = F.pad(tiles, (zoom, 0, zoom, 0), value=0.5)
        strip = tiles.permute(1, 2, 0, 3).reshape(rows * tiles.shape[-2], columns * tiles.shape[-1])
        strip = F.pad(strip, (0, zoom, 0, zoom), value=0.5)
        return strip[None, :, :, None].expand(-1, -1, -1, 3).contiguous()


def _log_sigma_fraction(step: int, sigmas: Tensor) -> float:
    """How far log(sigma) has fallen before `step`, from the first sigma to the last above 0, in [0, 1]."""
    first, here, last = (min(float(sigma), PURE_NOISE_SIGMA) for sigma in (sigmas[0], sigmas[step], sigmas[-2]))
    if not 0 < last < first:  # pure noise throughout, or a grid that does not fall
        return 0.0
    return math.log(first / min(first, max(last, here))) / math.log(first / last)


def constant_schedule(mask: Tensor) -> MaskSchedule:
    """The same mask [B, h, w] at every step."""
    return MaskSchedule(check_mask(mask, "mask")[None, :, None])


def release_schedule(change: Tensor) -> MaskSchedule:
    """The soft mask schedule of Differential Diffusion (Levin and Fried 2023; docs/methods.md, section 11.10).

    The editable set grows: at step i of N a latent pixel is editable if 1 - change <= i / N. A change of 1 is editable
    from the start, a change of 0 never.

    The official loop blends before each step (`BlendOptions(blend="before")`) and never returns to the source. With
    blending after each step every latent pixel becomes editable one step later, and one whose change is below 1 / N ends
    exactly at the source.

    Args:
        change: change map [B, h, w] in [0, 1], 1 = edit freely (the official map is its inverse, 1 = keep).
    """
    return MaskSchedule(check_mask(change, "change map")[None, :, None], release=True)


def dilation_schedule(
    mask: Tensor,
    kernels: Sequence[int] = PAPER_KERNELS,
    *,
    invert: bool = False,
    scale_with_size: bool = False,
    spacing: str = "steps",
    shares: Sequence[float] = (),
) -> MaskSchedule:
    """Progressive mask shrinking: dilated masks first, the user's mask last (BLD, section 4.3 and appendix C).

    With stages of equal steps, as in the paper, the user's mask gets the last quarter of them. On small latents the
    object is decided there, and the background overwrites it again. `spacing="log-sigma"`, which is ours, gives every
    stage an equal fall of log(sigma), so the user's mask gets only the last few steps.

    Args:
        mask: latent mask [B, h, w]; it is binarised at 0.5, because a dilation of soft values has no meaning.
        kernels: one per stage in latent pixels: odd, falling, ending with 1 (the mask itself).
        invert: edit everything but the mask. The inversion comes before the dilation, so that the edited side grows.
        scale_with_size: scale the kernels, which the paper tuned on 32 x 32 latent pixels, with the shorter side.
        spacing: "steps", "log-sigma" or "published", see `MaskSchedule`. "published" reproduces the official script,
            which also inverts after the dilation and so erodes (docs/methods.md, section 16, rows 6 and 7).
        shares: share of the steps of each stage, in any unit, >= 0; empty = as `spacing` says. A share of 0 leaves a stage
            out; the last step always has the user's mask.
    Returns: a schedule with one mask [B, 1, h, w] per kernel, the largest first.
    Raises: ShapeError for anything but a mask; ParameterError for an unknown spacing, shares that do not fit, or kernels
        that are even, rise or do not end with 1.
    """
    if spacing not in SPACINGS:
        raise ParameterError(f"stages are spaced by {spacing!r}: choose one of {', '.join(SPACINGS)}")
    mask = _binarised(check_mask(mask, "mask"))
    sizes = check_kernels(kernels)
    if scale_with_size:
        sizes = tuple(scaled_kernel(kernel, min(mask.shape[1:])) for kernel in sizes)
    if invert and spacing != "published":
        mask = 1 - mask
    masks = [dilate(mask, kernel) for kernel in sizes]
    if invert and spacing == "published":
        masks = [1 - dilated for dilated in masks]
    return MaskSchedule(torch.stack(masks)[:, :, None], spacing, shares=check_shares(shares, len(sizes), spacing))


def _binarised(mask: Tensor) -> Tensor:
    """The mask [B, h, w] with 1 at values of 0.5 and above; a warning names soft masks that vanish."""
    solid = (mask >= 0.5).float()
    gone = (solid.sum(dim=(1, 2)) == 0) & (mask.sum(dim=(1, 2)) > 0)
    for index in gone.nonzero().flatten().tolist():
        log.warning(
            "mask %d of the dilation schedule is empty: all its values lie below 0.5, where a dilation has no meaning; "
            "use 'Differential Diffusion (Soft Mask Schedule)' or a stronger mask",
            index,
        )
    return solid


def check_kernels(kernels: Sequence[int]) -> tuple[int, ...]:
    """The kernels, which must be odd, must not rise and must end with 1 (the user's mask). Raises ParameterError."""
    kernels = tuple(kernels)
    falling = all(a >= b for a, b in zip(kernels, kernels[1:], strict=False))
    if not kernels or kernels[-1] != 1 or not falling or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
        raise ParameterError(
            f"kernels are {list(kernels)}: give odd sizes in latent pixels that fall and end with 1, for example 7, 5, 3, 1"
        )
    return kernels


def parse_kernels(text: str) -> tuple[int, ...]:
    """The kernels of a text like "7, 5, 3, 1". Raises ParameterError for anything else."""
    try:
        kernels = [int(number) for number in text.replace(";", ",").split(",") if number.strip()]
    except ValueError:
        raise ParameterError(f"kernels is {text!r}: write odd numbers with commas, for example 7,5,3,1") from None
    return check_kernels(kernels)


def check_shares(shares: Sequence[float], stages: int, spacing: str = "steps") -> tuple[float, ...]:
    """The shares of the steps, one for each stage or none at all. Raises ParameterError for anything else."""
    shares = tuple(float(share) for share in shares)
    if not shares:
        return ()
    if spacing != "steps":
        raise ParameterError(
            f"shares are given but the stages are spaced by {spacing!r}: choose steps, or give no shares"
        )
    if len(shares) != stages:
        raise ParameterError(f"shares has {len(shares)} numbers but there are {stages} kernels: give one for each")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
        raise ParameterError(f"shares are {list(shares)}: give numbers of 0 or more, and not only 0")
    return shares


def parse_shares(text: str) -> tuple[float, ...]:
    """The shares of a text like "40, 20, 20, 20"; none of an empty one. Raises ParameterError for anything else."""
    try:
        return tuple(float(number) for number in text.replace(";", ",").split(",") if number.strip())
    except ValueError:
        raise ParameterError(f"shares is {text!r}: write numbers with commas, for example 40,20,20,20") from None


def scaled_kernel(kernel: int, side: int) -> int:
    """A kernel tuned on 32 latent pixels, for a shorter side of `side`; its radius scales and is at least 1."""
    radius = (kernel - 1) // 2
    return 1 if radius == 0 else 2 * max(1, round(radius * side / PAPER_SIDE)) + 1
