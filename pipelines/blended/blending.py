"""Blended Latent Diffusion: denoise everywhere, keep the source outside the mask (Avrahami et al. 2023, algorithm 1).

`blended_denoise` runs one step, a range of steps or the whole loop. Latents are float32 in model scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.guidance import EditPrompts, guided
from ..core.masks import MaskSchedule
from ..core.noise import seeded_noise
from ..core.progress import Progress, silent
from ..core.protocols import Denoiser
from ..core.shapes import match_batch
from ..core.sigmas import ancestral_sigmas, check_sigmas, euler_step
from .pixel_blending import PixelBlending


@dataclass(frozen=True)
class BlendOptions:
    """Choices in which the paper and the official scripts differ (docs/methods.md, section 16, rows 1-5).

    Attributes:
        blend: "after" each step, ending at the clean source (the paper); "before" the model call without a last blend,
            as the LDM script does, whose background is the model's last prediction.
        background_level: "aligned": noised to the sigma that the step reached. The published scripts put the latent of
            the sigma before the step there, so that noise is left outside the mask: "previous" as it is (SDXL's, which
            samples with Euler), "previous (DDIM)" in the variance-preserving scale of DDIM (SD2's, and DiffEdit's).
        background_noise: "fixed" for the whole run (the outside stays on one ODE trajectory, and ranges compose
            exactly); "fresh" at every step, as published.
        eta: stochasticity of the DDIM step, [0, 1]: 0 is deterministic DDIM, 1 is DDPM.
        pixels: blends the last steps in pixels instead, as the LDM script can; not with a trajectory as background.
    """

    blend: str = "after"
    background_level: str = "aligned"
    background_noise: str = "fixed"
    eta: float = 0.0
    pixels: PixelBlending | None = None

    CHOICES = {
        "blend": ("after", "before"),
        "background_level": ("aligned", "previous", "previous (DDIM)"),
        "background_noise": ("fixed", "fresh"),
    }

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ParameterError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.eta <= 1:
            raise ParameterError(f"eta is {self.eta}: give 0 (deterministic) to 1 (as much noise as DDPM)")

    def in_pixels(self, step: int, steps: int) -> bool:
        """Whether `step` (from 0) of a grid of `steps` is blended in pixels."""
        return self.pixels is not None and self.pixels.applies(step, steps)


class SourceTrajectory(Protocol):
    """The known latents of the source at every sigma (a `Trajectory`); used instead of a noised background."""

    @property
    def source(self) -> Tensor:
        """The clean source [B, C, h, w], model scale."""

    def at(self, sigma: float, step: int = 0) -> Tensor:
        """The source [B, C, h, w] at `sigma`; at 0 the clean source itself."""

    def fitted(self, denoiser: Denoiser, sigmas: Tensor, like: Tensor) -> SourceTrajectory:
        """The trajectory for the latent batch `like`. Raises MismatchError for another model, grid or size."""


def blend(edited: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """m edited + (1 - m) background, exact where the mask is 1 or 0. Shapes broadcast."""
    mixed = mask * edited + (1 - mask) * background
    return torch.where(mask >= 1, edited, torch.where(mask <= 0, background, mixed))


@torch.no_grad()
def blended_denoise(
    denoiser: Denoiser,
    z: Tensor,
    source: Tensor | SourceTrajectory,
    sigmas: Tensor,
    schedule: MaskSchedule,
    prompts: EditPrompts,
    *,
    seeds: list[int],
    start: int = 0,
    end: int | None = None,
    options: BlendOptions | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Run steps `start` to `end` of the blended loop (BLD, algorithm 1; docs/methods.md, section 1).

    Args:
        denoiser: the model.
        z: latent at sigmas[start], [B, C, h, w], model scale.
        source: clean source latent, [B or 1, C, h, w], model scale; or its trajectory, and no background noise is drawn.
        sigmas: the full grid [N + 1], on which the mask schedule counts, also where only a range of steps runs.
        schedule, prompts: mask schedule on the latent grid, batch B or 1; positive, negative and guidance scale.
        seeds: one per image; with fixed noise these must be the seeds that noised the start.
        start, end: range of steps, `end` exclusive; None runs to the end of the grid.
        options, progress: where to blend and with what noise; called after every step with the denoised prediction.
    Returns: the latent at sigmas[end], [B, C, h, w]. If that sigma is 0, the outside of the mask equals `source` exactly.
    Raises: ShapeError, ParameterError, MismatchError.
    """
    options = options or BlendOptions()
    sigmas = check_sigmas(sigmas)
    grid = sigmas.cpu()  # read once, so that no step waits for the device
    values = grid.tolist()
    first, last = check_range(start, end, len(values) - 1)
    prompts.check(denoiser, sigmas)
    schedule = schedule.expanded(z.shape[0], *z.shape[-2:]).to(z.device)
    background = _background(denoiser, source, sigmas, z, seeds, options)
    for i in range(first, last):
        mask = schedule.at(i, grid)
        if options.blend == "before" and not options.in_pixels(i, len(values) - 1):
            z = blend(z, background.at(values[i], i), mask)
        denoised = guided(denoiser, z, values[i], prompts.positive, prompts.negative, prompts.guidance_scale)
        z = _ddim_step(denoiser, z, denoised, values, i, eta=options.eta, seeds=seeds)
        if options.pixels is not None and options.in_pixels(i, len(values) - 1):
            whole = options.pixels.composited(denoiser, denoised)
            around = _background(denoiser, whole, sigmas, z, seeds, options)
            z = _background_after(denoiser, around, values, i, options.background_level)
        elif options.blend == "after":
            z = blend(z, _background_after(denoiser, background, values, i, options.background_level), mask)
        progress(i + 1 - first, last - first, denoised)
    return z


def _background(
    denoiser: Denoiser,
    source: Tensor | SourceTrajectory,
    sigmas: Tensor,
    z: Tensor,
    seeds: list[int],
    options: BlendOptions,
) -> Background | SourceTrajectory:
    """The background of the latent batch `z`: the noised source, or its trajectory."""
    fresh = options.background_noise == "fresh"
    if not isinstance(source, Tensor):
        if fresh:
            raise ParameterError(
                "background_noise is 'fresh' but the background is a trajectory, which draws no noise: choose 'fixed'"
            )
        if options.pixels is not None:
            raise ParameterError(
                "pixel_blending needs noise for the composited image, but the background is a trajectory, which has none: "
                "disconnect the trajectory, or set pixel_blending to 0"
            )
        return source.fitted(denoiser, sigmas, z)
    if z.shape[1:] != source.shape[1:]:
        raise ShapeError(
            f"latent is {list(z.shape)} but source latent is {list(source.shape)}: encode both at one size"
        )
    return Background(denoiser, match_batch(source, z.shape[0], "source latent", "latent").to(z), seeds, fresh=fresh)


def _background_after(
    denoiser: Denoiser, background: Background | SourceTrajectory, sigmas: list[float], step: int, form: str
) -> Tensor:
    """The background that is blended in after `step`.

    DDIM's scripts take x = z / sqrt(1 + sigma^2) of the sigma before the step for that of the sigma after it. Flow
    models have no other scale.
    """
    sigma, target = sigmas[step], sigmas[step + 1]
    if form == "aligned":
        return background.at(target, step)
    outside = background.at(sigma, step)
    if form == "previous" or denoiser.flow:
        return outside
    return outside * ((1 + target * target) / (1 + sigma * sigma)) ** 0.5


def _ddim_step(
    denoiser: Denoiser, z: Tensor, denoised: Tensor, sigmas: list[float], step: int, *, eta: float, seeds: list[int]
) -> Tensor:
    """One DDIM step. With eta above 0 it adds noise that depends on the seeds and the step, so that ranges compose."""
    sigma = sigmas[step]
    target = sigmas[step + 1]
    down, up = ancestral_sigmas(sigma, target, eta, flow=denoiser.flow)
    z = euler_step(z, denoised, sigma, down)
    if up == 0:
        return z
    if denoiser.flow:
        z = z * ((1 - target) / (1 - down))
    return z + up * seeded_noise(z.shape[1:], seeds, z.device, draw=2 * step + 2)


class Background:
    """The source noised to any sigma, with one noise for the whole run or fresh noise at every step."""

    def __init__(
        self, denoiser: Denoiser, source: Tensor, seeds: list[int], *, fresh: bool = False, noise: Tensor | None = None
    ) -> None:
        """Noise comes from `seeds`, one per image, unless the sampler's noise [B, C, h, w] is given."""
        self.denoiser = denoiser
        self.source = source
        self.seeds = seeds
        if len(seeds) != source.shape[0]:
            raise ShapeError(f"there are {len(seeds)} seeds but {source.shape[0]} images: give one seed per image")
        self._fixed = None if fresh else self._draw(0) if noise is None else noise

    def _draw(self, draw: int) -> Tensor:
        return seeded_noise(self.source.shape[1:], self.seeds, self.source.device, draw=draw)

    def at(self, sigma: float, step: int = 0) -> Tensor:
        """The source [B, C, h, w] at `sigma`; at 0 the clean source itself."""
        if sigma == 0:
            return self.source
        noise = self._draw(2 * step + 1) if self._fixed is None else self._fixed
        return self.denoiser.noise(self.source, noise, sigma)


def check_range(start: int, end: int | None, steps: int) -> tuple[int, int]:
    """The range of steps as (first, last); `end` None or beyond the grid means the end of the grid."""
    last = steps if end is None else min(end, steps)
    if not 0 <= start < steps:
        raise ParameterError(f"start_step is {start}: these sigmas have steps 0 to {steps - 1}")
    if last <= start:
        raise ParameterError(f"end_step is {end}: it must lie above start_step {start}")
    return start, last


def unscale_over_source(
    denoiser: Denoiser, z: Tensor, source: Tensor, schedule: MaskSchedule, sigmas: Tensor
) -> Tensor:
    """Unscale a clean result and put the source back outside the mask (`restore_source`).

    Args:
        denoiser: gives the scale.
        z: clean result [B, C, h, w], model scale.
        source: source latent, unscaled, [B or 1, C, h, w].
        schedule: mask schedule on the latent grid; the mask of the last step counts.
        sigmas: the grid [N + 1] of the schedule.
    Returns: unscaled latent [B, C, h, w] with the bits of `source` where the mask is 0.
    Raises: ShapeError.
    """
    return restore_source(denoiser.scale_out(z), source, schedule, sigmas)


def restore_source(latent: Tensor, source: Tensor, schedule: MaskSchedule, sigmas: Tensor) -> Tensor:
    """Put the source back bit for bit: scaling a latent in and out rounds its last digit.

    Args:
        latent: clean result, unscaled, [B, C, h, w].
        source: source latent, unscaled, [B or 1, C, h, w].
        schedule: mask schedule on the latent grid; the mask of the last step counts.
        sigmas: the grid [N + 1] of the schedule.
    Returns: `source` where the mask is 0, `latent` elsewhere, [B, C, h, w].
    Raises: ShapeError.
    """
    batch = len(latent)
    mask = schedule.expanded(batch, *latent.shape[-2:]).at(len(sigmas) - 2, sigmas).to(latent)
    return torch.where(mask <= 0, match_batch(source, batch, "source latent", "latent").to(latent), latent)
