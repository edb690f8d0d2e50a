"""DiffEdit: the mask from two prompts, and the masked decode of an inverted picture (Couairon et al. 2022; methods.md, 6).

Where two prompts make a model predict different things from the same noised picture, there the edit belongs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .blended.blending import BlendOptions, blended_denoise, finished_latent
from .core.errors import ParameterError, ShapeError
from .core.guidance import EditPrompts, Negative
from .core.masks import MaskSchedule, constant_schedule, remove_islands
from .core.noise import seeded_noise
from .core.progress import Legs, Progress, silent
from .core.protocols import Context, Denoiser
from .core.shapes import check_latent, crop_to
from .core.sigmas import executed
from .core.trajectory import Trajectory
from .inversion.ddim import InversionOptions, invert

log = logging.getLogger("editkit")

MASK_STEPS = 50  # grid on which a mask's strength is counted, as in diffusers: 0.5 is timestep 481 of SD
NOTHING = 1e-5  # differences below this share of the prediction are rounding


@dataclass(frozen=True)
class MaskRule:
    """From differences to a mask.

    Attributes:
        clip_ratio: differences above this many times the picture's mean are cut off there (3 as published), > 0.
        threshold: share of that ceiling above which a cell is edited, (0, 1).
        smooth: odd side, in cells, of the square over which differences are averaged first; 1 = as published.
        smallest_island: connected parts of the mask with fewer cells are dropped; 0 keeps all.
        batch_mean: take the mean over the whole batch, as the published code: pictures then change each other's mask.
    """

    clip_ratio: float = 3.0
    threshold: float = 0.5
    smooth: int = 1
    smallest_island: int = 0
    batch_mean: bool = False

    def __post_init__(self) -> None:
        if not self.clip_ratio > 0:
            raise ParameterError(f"clip_ratio is {self.clip_ratio}: give a number above 0 (3 as published)")
        if not 0 < self.threshold < 1:
            raise ParameterError(f"threshold is {self.threshold}: give a number between 0 and 1 (0.5 as published)")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ParameterError(f"smooth is {self.smooth}: give an odd number of latent cells (1 = no smoothing)")

    def __call__(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and heat, float32 [B, h, w], of mean absolute differences [B, h, w]. No difference gives an empty mask.

        Heat is the clipped difference in [0, 1]; the published rule min(g, 3 mean) / (3 mean) > 0.5 is g > 1.5 mean.
        """
        if self.smooth > 1:
            pad = self.smooth // 2
            difference = F.avg_pool2d(difference[:, None], self.smooth, 1, pad, count_include_pad=False)[:, 0]
        mean = difference.mean() if self.batch_mean else difference.mean(dim=(1, 2), keepdim=True)
        ceiling = (mean * self.clip_ratio).expand(len(difference), 1, 1)
        heat = torch.where(ceiling > 0, difference / ceiling, torch.zeros_like(difference)).clamp(max=1)
        return remove_islands((heat > self.threshold).float(), self.smallest_island), heat


@dataclass(frozen=True)
class DiffEditMask:
    """What the two prompts say.

    Attributes:
        mask: latent mask, float32 [B, h, w], 1 = edit.
        heat: clipped differences in [0, 1], [B, h, w].
        empty: pictures without a single cell to edit.
    """

    mask: Tensor
    heat: Tensor
    empty: list[int]


def strength_sigma(denoiser: Denoiser, strength: float, steps: int = MASK_STEPS) -> float:
    """The noise level at `strength` in (0, 1] of the way from the picture (0) to pure noise (1)."""
    return float(denoiser.schedule(steps, strength)[0])


@torch.no_grad()
def diffedit_mask(
    denoiser: Denoiser,
    latent: Tensor,
    source: Context,
    target: Context,
    *,
    seeds: list[int],
    maps: int = 10,
    sigma: float | None = None,
    rule: MaskRule | None = None,
    rows: int | None = None,
    progress: Progress = silent,
) -> DiffEditMask:
    """The mask of what must change for `source` to become `target`; 2 x maps model rows per picture.

    Guidance would add rows and change nothing: with one negative for both prompts it scales all differences alike.
    Neither does the model's kind matter: differences of clean, eps and v predictions are proportional.

    Args:
        latent: clean, unscaled, [B, C, h, w].    seeds: one per image; map j of an image draws its own noise from it.
        source: what the picture shows (or an empty prompt).    target: what it should show.
        sigma: noise level to compare at; None takes strength 0.5.
        rows: most latents in one model call (each is evaluated for both prompts); None tries all, and halves when
            memory runs out. The mask does not depend on it.
    Raises: ShapeError, ParameterError. Warns of empty masks.
    """
    if maps < 1:
        raise ParameterError(f"maps is {maps}: at least 1 is needed (10 as published)")
    z = denoiser.scale_in(check_latent(latent, "latent", denoiser.channels))
    if len(seeds) != len(z):
        raise ShapeError(f"there are {len(seeds)} seeds but {len(z)} images: give one seed per image")
    sigma = strength_sigma(denoiser, 0.5) if sigma is None else sigma
    total, size = torch.zeros_like(z[:, 0]), z.new_zeros(len(z))
    calls = _differences(denoiser, z, sigma, (source, target), seeds, maps, rows)
    for done, (difference, magnitude) in enumerate(calls, 1):
        total, size = total + difference, size + magnitude
        progress(done, maps)
    real = total.mean(dim=(1, 2), keepdim=True) > NOTHING * size.view(-1, 1, 1)
    mask, heat = (rule or MaskRule())(torch.where(real, total / maps, torch.zeros_like(total)))
    empty = [i for i, latent_pixels in enumerate(mask.sum(dim=(1, 2)).tolist()) if latent_pixels == 0]
    if empty:
        log.warning(
            "DiffEdit found nothing to change in image %s: do the prompts differ? Try a lower threshold or another strength",
            ", ".join(map(str, empty)),
        )
    return DiffEditMask(mask, heat, empty)


def _differences(
    denoiser: Denoiser, z: Tensor, sigma: float, contexts: tuple[Context, Context], seeds: list[int], maps: int,
    rows: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Per map: mean absolute difference over channels [B, h, w], and the mean size of the predictions [B]."""
    together = min(maps, max(1, rows // len(z)) if rows else maps)
    done = 0
    while done < maps:
        count = min(together, maps - done)
        try:
            noised = [_noised(denoiser, z, sigma, seeds, j) for j in range(done, done + count)]
            clean = denoiser.denoise(torch.cat(noised), sigma, [_repeated(context, count) for context in contexts])
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise
            together = count // 2
            log.warning("out of memory with %d noises in one call: trying %d", count, together)
            continue
        source, target = clean.view(2, count, *z.shape)
        for j in range(count):
            yield (target[j] - source[j]).abs().mean(1), source[j].abs().mean(dim=(1, 2, 3))
        done += count


def _noised(denoiser: Denoiser, z: Tensor, sigma: float, seeds: list[int], draw: int) -> Tensor:
    return denoiser.noise(z, seeded_noise(z.shape[1:], seeds, z.device, draw=draw), sigma)


def _repeated(context: Context, count: int) -> Context:
    """A context with a row per image, for `count` copies of the batch; one row serves all as it is."""
    if count == 1 or context.tokens.shape[0] == 1:
        return context
    pooled = None if context.pooled is None else context.pooled.repeat(count, 1)
    return replace(context, tokens=context.tokens.repeat(count, 1, 1), pooled=pooled)


def mask_in_pixels(mask: Tensor, factor: int, height: int, width: int) -> Tensor:
    """A latent mask or heat [B, h, w] at image size [B, height, width]: each cell is a square of `factor` pixels."""
    return crop_to(mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2), height, width)


def heat_image(heat: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Heat [B, h, w] as an IMAGE [B, height, width, 3]: black, red, yellow, white."""
    value = mask_in_pixels(heat, factor, height, width)[..., None] * 3
    return (value - torch.arange(3, device=value.device)).clamp(0, 1)


def masked_decode(
    denoiser: Denoiser,
    trajectory: Trajectory,
    schedule: MaskSchedule,
    prompts: EditPrompts,
    *,
    ratio: float = 0.8,
    legacy_offset: bool = False,
    progress: Progress = silent,
) -> Tensor:
    """Denoise an inverted picture towards the prompts under the mask and along its own path outside; 2 r N rows.

    Args:
        schedule: mask on the latent grid (`constant_schedule` of DiffEdit's, or any other).
        ratio: encoding ratio r in (0, 1]: how far up the path to start. More changes more.
        legacy_offset: put back the path one level too late, as diffusers does (methods.md, section 16, row 12): the
            outside then ends at the level before the source.
    Returns: latent [B, C, h, w] in model scale; outside the mask the trajectory's source bit for bit.
    Raises: MismatchError, ShapeError, ParameterError.
    """
    start = trajectory.steps - executed(trajectory.steps, ratio)
    batch = max(trajectory.batch, schedule.batch)
    z = trajectory.expanded(batch).level(start)
    options = BlendOptions(background_level="previous" if legacy_offset else "aligned")
    return blended_denoise(
        denoiser, z, trajectory, trajectory.sigmas, schedule, prompts,
        seeds=[0] * batch, start=start, options=options, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class DiffEditSettings:
    """The whole method's numbers; defaults as published (methods.md, section 6).

    Attributes:
        steps, ratio: the grid and the part of it that is climbed and decoded.
        maps, strength: noises compared for the mask, and how much of them.
        guidance_scale: of the decode; the mask and the inversion are not guided.
    """

    steps: int = 50
    ratio: float = 0.8
    maps: int = 10
    strength: float = 0.5
    guidance_scale: float = 7.5
    legacy_offset: bool = False
    rule: MaskRule = field(default_factory=MaskRule)
    inversion: InversionOptions = field(default_factory=InversionOptions)


@dataclass(frozen=True)
class DiffEditResult:
    """An edit: unscaled latents [B, C, h, w], the mask behind it, and the path (None where nothing was to be edited)."""

    latent: Tensor
    mask: DiffEditMask
    trajectory: Trajectory | None


def diffedit(
    denoiser: Denoiser,
    latent: Tensor,
    source: Context,
    target: Context,
    negative: Negative | None,
    *,
    seeds: list[int],
    settings: DiffEditSettings | None = None,
    inversion: Context | None = None,
    rows: int | None = None,
    progress: Progress = silent,
) -> DiffEditResult:
    """Mask, inversion and masked decode: 2 n + r N + 2 r N rows per picture (140 for n = 10, N = 50, r = 0.8).

    Args:
        latent: clean, unscaled, [B, C, h, w].    negative: of the decode; not needed at guidance scale 1.
        inversion: the prompt of the inversion; None takes `source`. The paper inverts with an empty prompt.
    Returns: outside the mask the latent has the bits of `latent`; pictures with an empty mask come back unchanged.
    Raises: ShapeError, ParameterError, FamilyError.
    """
    settings = settings or DiffEditSettings()
    legs = Legs(progress, (settings.maps, *[executed(settings.steps, settings.ratio)] * 2))
    found = diffedit_mask(
        denoiser, latent, source, target, seeds=seeds, maps=settings.maps,
        sigma=strength_sigma(denoiser, settings.strength), rule=settings.rule, rows=rows, progress=legs(0),
    )  # fmt: skip
    if len(found.empty) == len(latent):
        return DiffEditResult(latent, found, None)
    path = invert(
        denoiser, latent, source if inversion is None else inversion, denoiser.schedule(settings.steps),
        options=settings.inversion, ratio=settings.ratio, progress=legs(1),
    )  # fmt: skip
    schedule = constant_schedule(found.mask)
    z = masked_decode(
        denoiser, path, schedule, EditPrompts(target, negative, settings.guidance_scale),
        ratio=settings.ratio, legacy_offset=settings.legacy_offset, progress=legs(2),
    )  # fmt: skip
    edited = denoiser.scale_out(z)
    if not settings.legacy_offset:
        edited = finished_latent(edited, path.source_latent, schedule, path.sigmas)
    return DiffEditResult(edited, found, path)
