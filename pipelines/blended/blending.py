"""Blended Latent Diffusion: denoise everywhere, keep the source outside the mask (Avrahami et al. 2023, algorithm 1).

One function does a step, a range or the whole loop. State is float32 and model-scaled.
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


@dataclass(frozen=True)
class BlendOptions:
    """Where we differ from the official scripts, and how to get their behaviour (methods.md, section 16, rows 1-5).

    Attributes:
        blend: "after" each step, ending at the clean source (the paper); "before" the model call with no last blend,
            as the LDM script, whose background is the model's own last prediction.
        background_level: "aligned" with the level just reached; "previous", one level too noisy, as the SD2 and SDXL
            scripts, whose result keeps noise outside the mask.
        background_noise: "fixed" for the whole run (the outside stays on one ODE path, and ranges compose exactly);
            "fresh" at every step, as published.
        eta: 0 is deterministic DDIM, 1 is DDPM.
    """

    blend: str = "after"
    background_level: str = "aligned"
    background_noise: str = "fixed"
    eta: float = 0.0

    CHOICES = {
        "blend": ("after", "before"),
        "background_level": ("aligned", "previous"),
        "background_noise": ("fixed", "fresh"),
    }

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ParameterError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.eta <= 1:
            raise ParameterError(f"eta is {self.eta}: give 0 (deterministic) to 1 (as much noise as DDPM)")


class SourceTrajectory(Protocol):
    """The source at every level, known beforehand: a `Trajectory`. It takes the place of a noised background."""

    @property
    def source(self) -> Tensor:
        """The clean source [B, C, h, w], model scale."""

    def at(self, sigma: float, step: int = 0) -> Tensor:
        """The source at level `sigma`; at 0 the clean source itself."""

    def fitted(self, denoiser: Denoiser, sigmas: Tensor, like: Tensor) -> SourceTrajectory:
        """The path for the latent batch `like`. Raises MismatchError for another model, grid or size."""


def blend(edited: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """`edited` where the mask is 1, `background` where it is 0, both exactly; a mix in between. Shapes broadcast."""
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
    """Run steps `start` to `end` (exclusive; None = all) of the blended loop.

    Args:
        z: latent at level sigmas[start], [B, C, h, w], model scale.
        source: clean source latent, [B or 1, C, h, w], model scale; or a trajectory, whose latents are then the
            background level by level, without any noise drawn.
        sigmas: the full grid [N + 1]; mask parts count on it, so a range of it is the same range of the whole run.
        schedule: mask schedule on the latent grid, batch B or 1.
        seeds: one per image; with fixed noise these must be the seeds the start was noised with.
    Returns: the latent at level sigmas[end]. If that is 0, the outside of the mask equals `source` exactly.
    Raises: ShapeError, ParameterError, MismatchError.
    """
    options = options or BlendOptions()
    sigmas = check_sigmas(sigmas)
    grid = sigmas.cpu()  # read once, so that no step waits for the device
    levels = grid.tolist()
    first, last = check_range(start, end, len(levels) - 1)
    prompts.check(denoiser, sigmas)
    schedule = schedule.expanded(z.shape[0], *z.shape[-2:]).to(z.device)
    background = _background(denoiser, source, sigmas, z, seeds, options)
    for i in range(first, last):
        mask = schedule.at(i, grid)
        if options.blend == "before":
            z = blend(z, background.at(levels[i], i), mask)
        clean = guided(denoiser, z, levels[i], prompts.positive, prompts.negative, prompts.guidance_scale)
        z = _advance(denoiser, z, clean, levels, i, eta=options.eta, seeds=seeds)
        if options.blend == "after":
            level = levels[i + 1] if options.background_level == "aligned" else levels[i]
            z = blend(z, background.at(level, i), mask)
        progress(i + 1 - first, last - first, clean)
    return z


def _background(
    denoiser: Denoiser,
    source: Tensor | SourceTrajectory,
    sigmas: Tensor,
    z: Tensor,
    seeds: list[int],
    options: BlendOptions,
) -> Background | SourceTrajectory:
    """What lies outside the mask, for the latent batch `z`."""
    fresh = options.background_noise == "fresh"
    if not isinstance(source, Tensor):
        if fresh:
            raise ParameterError(
                "background_noise is 'fresh' but the background is a trajectory, which draws no noise: choose 'fixed'"
            )
        return source.fitted(denoiser, sigmas, z)
    if z.shape[1:] != source.shape[1:]:
        raise ShapeError(
            f"latent is {list(z.shape)} but source latent is {list(source.shape)}: encode both at one size"
        )
    return Background(denoiser, match_batch(source, z.shape[0], "source latent", "latent").to(z), seeds, fresh=fresh)


def _advance(
    denoiser: Denoiser, z: Tensor, clean: Tensor, levels: list[float], step: int, *, eta: float, seeds: list[int]
) -> Tensor:
    """One DDIM step, with fresh noise where eta is above 0 (drawn from the seeds and the step: ranges compose)."""
    sigma, target = levels[step], levels[step + 1]
    down, up = ancestral_sigmas(sigma, target, eta, flow=denoiser.flow)
    z = euler_step(z, clean, sigma, down)
    if up == 0:
        return z
    if denoiser.flow:
        z = z * ((1 - target) / (1 - down))
    return z + up * seeded_noise(z.shape[1:], seeds, z.device, draw=2 * step + 2)


class Background:
    """The source at any level, with one noise for the whole run or a new one per step."""

    def __init__(
        self, denoiser: Denoiser, source: Tensor, seeds: list[int], *, fresh: bool = False, noise: Tensor | None = None
    ) -> None:
        """`noise` [B, C, h, w] is the run's noise where a sampler has drawn it already."""
        self.denoiser, self.source, self.seeds = denoiser, source, seeds
        if len(seeds) != source.shape[0]:
            raise ShapeError(f"there are {len(seeds)} seeds but {source.shape[0]} images: give one seed per image")
        self._fixed = None if fresh else self._draw(0) if noise is None else noise

    def _draw(self, draw: int) -> Tensor:
        return seeded_noise(self.source.shape[1:], self.seeds, self.source.device, draw=draw)

    def at(self, sigma: float, step: int = 0) -> Tensor:
        """[B, C, h, w]; at level 0 the source itself."""
        if sigma == 0:
            return self.source
        noise = self._draw(2 * step + 1) if self._fixed is None else self._fixed
        return self.denoiser.noise(self.source, noise, sigma)


def check_range(start: int, end: int | None, steps: int) -> tuple[int, int]:
    """A range of steps as numbers; `end` None or beyond the grid means all of it."""
    last = steps if end is None else min(end, steps)
    if not 0 <= start < steps:
        raise ParameterError(f"start_step is {start}: these sigmas have steps 0 to {steps - 1}")
    if last <= start:
        raise ParameterError(f"end_step is {end}: it must lie above start_step {start}")
    return start, last


def finished_latent(samples: Tensor, source: Tensor, schedule: MaskSchedule, sigmas: Tensor) -> Tensor:
    """An unscaled result whose outside is the unscaled source bit for bit (scaling in and out rounds the last digit)."""
    mask = schedule.expanded(samples.shape[0], *samples.shape[-2:]).at(len(sigmas) - 2, sigmas).to(samples)
    return torch.where(mask <= 0, match_batch(source, samples.shape[0], "source latent", "latent").to(samples), samples)
