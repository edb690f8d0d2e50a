"""Masks on the latent grid: downsampling that does not lose thin strokes, dilation, and schedules over steps.

A mask is 1 where the picture may change. `MaskSchedule` is the one primitive for every method whose editable set
depends on the step (methods.md, 0.4 and 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ParameterError, ShapeError
from .shapes import check_mask, match_batch, pad_to_factor, padded_length

MODES = ("max", "area", "nearest", "bilinear")
POWERS = (1, 2, 4, 8, 16, 32, 64)  # factors that a VAE may have
STAGES = 8  # columns of a release's preview
DIVISIONS = ("steps", "noise", "published")
NOISE_ALONE = 15.0  # sigma from which on nothing of a picture is decided: just above Stable Diffusion's largest, 14.6


@dataclass(frozen=True)
class DownsampledMask:
    """A mask on the latent grid.

    Attributes:
        mask: float32 [B, h, w] in [0, 1].
        kept: share of each image's stroke that lies under the latent mask, float32 [B]; 1 where there is no stroke.
    """

    mask: Tensor
    kept: Tensor

    @property
    def lost(self) -> list[int]:
        """Images whose stroke vanished altogether."""
        return [i for i, share in enumerate(self.kept.tolist()) if share == 0]


def downsample(
    mask: Tensor, height: int, width: int, mode: str = "max", threshold: float = 0.5, *, factor: int | None = None
) -> DownsampledMask:
    """A pixel mask on a latent grid of `height` x `width` cells.

    Args:
        mask: MASK [B, H, W] in [0, 1], 1 = edit. If the grid is the one of this size (padded right and below to
            whole cells of `factor` pixels), cells are exact blocks; a mask of any other size is stretched over it.
        mode: "max" marks a cell that is touched, "area" one covered at least to `threshold`, "nearest" samples the
            pixel at the centre (as published), "bilinear" interpolates there.
        threshold: a cell is 1 at this value and above; 0 keeps soft values (methods.md, 0.4 on soft masks).
        factor: pixels of a cell, as the VAE says; None takes the smallest power of two that fits both sides.
    Raises: ShapeError, ParameterError.
    """
    mask = check_mask(mask, "mask")
    if mode not in MODES:
        raise ParameterError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    if not 0 <= threshold <= 1:
        raise ParameterError(f"threshold is {threshold}: give 0 (keep soft values) to 1")
    if height < 1 or width < 1:
        raise ShapeError(f"the latent grid is {width} x {height} cells: connect a LATENT or VAE with a picture")
    blocks = _on_blocks(mask, height, width, factor)[:, None]
    latent_pixels = _reduce(blocks, height, width, mode)[:, 0]
    if threshold > 0:
        latent_pixels = (latent_pixels >= threshold).to(mask.dtype)
    return DownsampledMask(latent_pixels, _kept(blocks[:, 0], latent_pixels))


def _on_blocks(mask: Tensor, height: int, width: int, factor: int | None) -> Tensor:
    """The mask padded to whole cells, if it belongs to this grid."""
    for pixels in [factor] if factor else POWERS:
        if (padded_length(mask.shape[1], pixels), padded_length(mask.shape[2], pixels)) == (
            height * pixels,
            width * pixels,
        ):
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


def _kept(mask: Tensor, latent_pixels: Tensor) -> Tensor:
    """Share of the stroke's pixels whose cell is marked."""
    stroke = (mask >= 0.5).float()
    cover = F.interpolate(latent_pixels[:, None], mask.shape[1:], mode="nearest-exact")[:, 0]
    total = stroke.sum(dim=(1, 2))
    share = (stroke * (cover > 0)).sum(dim=(1, 2)) / total.clamp(min=1)
    return torch.where(total > 0, share, torch.ones_like(share))


def dilate(mask: Tensor, kernel: int) -> Tensor:
    """Grow [..., h, w] by a square of `kernel` cells (odd; 1 changes nothing); the border is not edited from outside."""
    if kernel < 1 or kernel % 2 == 0:
        raise ParameterError(f"kernel is {kernel}: a dilation kernel is an odd number of latent cells (1, 3, 5, 7)")
    if kernel == 1:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return F.max_pool2d(flat, kernel, stride=1, padding=kernel // 2).reshape(mask.shape)


def remove_islands(mask: Tensor, latent_pixels: int) -> Tensor:
    """A binary mask [B, h, w] without its connected parts of fewer than `cells` cells (corners connect)."""
    if latent_pixels < 0:
        raise ParameterError(f"smallest island is {latent_pixels} cells: give 0 (keep all) or more")
    if latent_pixels <= 1:
        return mask
    batch, height, width = mask.shape
    inside = (mask >= 0.5).float()[:, None]
    # every cell of a part takes over the largest number in it; float32 counts exactly up to 2^24 cells
    number = torch.arange(1, height * width + 1, device=mask.device).float().view(1, 1, height, width) * inside
    while True:
        before = number
        for _ in range(max(height, width)):
            number = F.max_pool2d(number, 3, stride=1, padding=1) * inside
        if torch.equal(number, before):
            break
    labels = number.flatten(1).long()
    sizes = torch.zeros(batch, height * width + 1, device=mask.device).scatter_add_(1, labels, inside.flatten(1))
    return mask * (sizes.gather(1, labels) >= latent_pixels).view(mask.shape)


@dataclass(frozen=True)
class MaskSchedule:
    """Which cells may change at which step.

    Attributes:
        masks: float32 [parts, B, 1, h, w] in order of time.
        division: how the run is divided among the parts. "steps": equal numbers of steps. "noise": equal falls of
            log(sigma), so that the last parts get few steps. "published": the published rule, whose short runs never
            reach the last part.
        release: the one part is a map of change in [0, 1], and cells become editable one after the other
            (`release_schedule`).
    """

    masks: Tensor
    division: str = "steps"
    release: bool = False

    @property
    def parts(self) -> int:
        return self.masks.shape[0]

    @property
    def batch(self) -> int:
        return self.masks.shape[1]

    def part(self, step: int, sigmas: Tensor) -> int:
        """Part in force at `step` (0-based) of a run over `sigmas` [N + 1]; the last step is always in the last part."""
        steps = len(sigmas) - 1
        if not 0 <= step < steps:
            raise ParameterError(f"step {step} is outside a run of {steps} steps (0 to {steps - 1})")
        if self.division == "published":
            return min(self.parts - 1, step // (steps // self.parts + 1))
        if step == steps - 1:
            return self.parts - 1
        if self.division == "noise":
            return min(self.parts - 1, math.floor(_noise_gone(step, sigmas) * self.parts))
        return step * self.parts // steps

    def at(self, step: int, sigmas: Tensor) -> Tensor:
        """The mask [B, 1, h, w] of one step of a run over `sigmas` [N + 1]."""
        mask = self.masks[self.part(step, sigmas)]
        return self._released(step / (len(sigmas) - 1)) if self.release else mask

    def _released(self, done: float) -> Tensor:
        """The cells of a release that are free when this share of the steps is done."""
        return (1 - self.masks[0] <= done).to(self.masks)

    def at_sigma(self, sigma: float, sigmas: Tensor) -> Tensor:
        """The mask in force while a sampler moves through `sigma` on the grid `sigmas` [N + 1]."""
        from .sigmas import step_of_sigma

        return self.at(step_of_sigma(sigma, sigmas), sigmas)

    def to(self, device: torch.device) -> MaskSchedule:
        return replace(self, masks=self.masks.to(device))

    def expanded(self, batch: int, height: int, width: int) -> MaskSchedule:
        """The schedule for a latent batch; raises ShapeError if batch or size do not fit."""
        if tuple(self.masks.shape[-2:]) != (height, width):
            raise ShapeError(
                f"schedule is made for {self.masks.shape[-1]} x {self.masks.shape[-2]} latent cells but the latent has "
                f"{width} x {height}: make the latent mask from this LATENT"
            )
        masks = match_batch(self.masks.transpose(0, 1), batch, "schedule", "the latent").transpose(0, 1)
        return replace(self, masks=masks)

    def preview(self, latent_pixel: int = 8) -> Tensor:
        """A strip [1, H, W, 3]: one row per image, one column per part, `cell` pixels a latent cell, grey gaps.

        A release has one part; its columns are the steps of a run of STAGES.
        """
        masks = torch.stack([self._released(i / STAGES) for i in range(STAGES)]) if self.release else self.masks
        parts, batch = masks.shape[:2]
        tiles = masks[:, :, 0].repeat_interleave(latent_pixel, -1).repeat_interleave(latent_pixel, -2)
        tiles = F.pad(tiles, (latent_pixel, 0, latent_pixel, 0), value=0.5)
        strip = tiles.permute(1, 2, 0, 3).reshape(batch * tiles.shape[-2], parts * tiles.shape[-1])
        return (
            F.pad(strip, (0, latent_pixel, 0, latent_pixel), value=0.5)[None, :, :, None]
            .expand(-1, -1, -1, 3)
            .contiguous()
        )


def _noise_gone(step: int, sigmas: Tensor) -> float:
    """How far log(sigma) has fallen on its way from the first level to the last above 0, in [0, 1]."""
    first, here, last = (min(float(sigma), NOISE_ALONE) for sigma in (sigmas[0], sigmas[step], sigmas[-2]))
    if not 0 < last < first:  # all of it noise alone, or a sampler's own grid that does not fall
        return 0.0
    return math.log(first / min(first, max(last, here))) / math.log(first / last)


def constant_schedule(mask: Tensor) -> MaskSchedule:
    """The same mask [B, h, w] at every step."""
    return MaskSchedule(check_mask(mask, "mask")[None, :, None])


def release_schedule(change: Tensor) -> MaskSchedule:
    """Differential Diffusion: how much each cell may change decides when it is let go (Levin and Fried 2023).

    The opposite of shrinking: the editable set grows. At step i of N a cell is editable if 1 - change <= i / N, so that
    1 is free from the start and 0 never is. The published loop blends before each step (`BlendOptions(blend="before")`)
    and never returns to the source; blending after each step holds a cell one step longer, and cells with less than
    1 / N then end at the source exactly.

    Args:
        change: latent map [B, h, w] in [0, 1], 1 = edit freely (the official map is its inverse, 1 = keep).
    """
    return MaskSchedule(check_mask(change, "change map")[None, :, None], release=True)


PAPER_KERNELS = (7, 5, 3, 1)


def dilation_schedule(
    mask: Tensor,
    kernels: Sequence[int] = PAPER_KERNELS,
    *,
    invert: bool = False,
    scale_with_size: bool = False,
    division: str = "steps",
) -> MaskSchedule:
    """Progressive mask shrinking: dilated masks first, the user's own mask last (BLD, section 4.3 and appendix C).

    Equal numbers of steps, as published, leave a quarter of them to the user's mask. On small latents that is where the
    thing is decided: it is eaten up again. Ours, `division="noise"`, gives every part an equal fall of log(sigma).

    Args:
        mask: latent mask [B, h, w]; it is binarised at 0.5, because a dilation of soft values has no meaning.
        kernels: odd, falling, ending with 1 (the mask itself); one equal part of the run each.
        invert: edit everything but the mask; inverted before dilation, so that the edited side grows.
        scale_with_size: the paper's kernels were tuned on 32 x 32 cells; keep their share of the shorter side.
        division: "steps", "noise" or "published", see `MaskSchedule`. "published" is the official script in all: it also
            inverts after dilation, which erodes (methods.md, section 16, rows 6 and 7).
    Raises: ShapeError, ParameterError.
    """
    if division not in DIVISIONS:
        raise ParameterError(f"parts are divided by {division!r}: choose one of {', '.join(DIVISIONS)}")
    mask = (check_mask(mask, "mask") >= 0.5).float()
    sizes = [
        scaled_kernel(kernel, min(mask.shape[1:])) if scale_with_size else kernel for kernel in check_kernels(kernels)
    ]
    if invert and division != "published":
        mask = 1 - mask
    masks = [dilate(mask, kernel) for kernel in sizes]
    if invert and division == "published":
        masks = [1 - grown for grown in masks]
    return MaskSchedule(torch.stack(masks)[:, :, None], division)


def check_kernels(kernels: Sequence[int]) -> tuple[int, ...]:
    """Odd, not rising, ending with 1; anything else would not end at the user's mask."""
    kernels = tuple(kernels)
    falling = all(a >= b for a, b in zip(kernels, kernels[1:], strict=False))
    if not kernels or kernels[-1] != 1 or not falling or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
        raise ParameterError(
            f"kernels are {list(kernels)}: give odd sizes in latent cells that fall and end with 1, for example 7, 5, 3, 1"
        )
    return kernels


def parse_kernels(text: str) -> tuple[int, ...]:
    """ "7, 5, 3, 1" as numbers. Raises ParameterError for anything else."""
    try:
        return check_kernels([int(part) for part in text.replace(";", ",").split(",") if part.strip()])
    except ParameterError:
        raise
    except ValueError:
        raise ParameterError(f"kernels is {text!r}: write odd numbers with commas, for example 7,5,3,1") from None


def scaled_kernel(kernel: int, latent_pixels: int) -> int:
    """A kernel that was tuned on 32 cells, for `cells`: its radius keeps its share of the side, at least 1 cell."""
    radius = (kernel - 1) // 2
    return 1 if radius == 0 else 2 * max(1, round(radius * latent_pixels / 32)) + 1
