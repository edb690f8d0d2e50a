"""FlowEdit (Kulikov et al., ICCV 2025): an edit without inversion (docs/methods.md, section 18.3).

The edited latent moves by the difference of two derivatives, under the target and under the source prompt, at latents that
share their noise. In sigma space this needs the derivative dz/dsigma = (z - denoised) / sigma only, which eps and v models
have as flow models do, so one loop serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.guidance import EditPrompts
from ..core.masks import MaskSchedule
from ..core.noise import seeded_noise
from ..core.progress import Progress, silent
from ..core.protocols import Denoiser
from ..core.samplers import Predict, predictor
from ..core.shapes import check_latent
from ..core.sigmas import check_sigmas, euler_step


@dataclass(frozen=True)
class FlowEditOptions:
    """Which steps of the grid do what, counted from the end as in the paper.

    Attributes:
        n_max: the edit begins where this many steps are left; fewer = closer to the source. SD3: 33 of 50, Flux: 24 of 28.
        n_min: the last steps are plain sampling under the target prompt; 0 = none, as published.
        n_avg: noises that every step averages over, >= 1.
    """

    n_max: int = 33
    n_min: int = 0
    n_avg: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.n_min <= self.n_max or self.n_max < 1:
            raise ParameterError(
                f"n_min is {self.n_min} and n_max {self.n_max}: give 0 <= n_min <= n_max, n_max at least 1"
            )
        if self.n_avg < 1:
            raise ParameterError(f"n_avg is {self.n_avg}: at least 1 noise per step is needed")


@torch.no_grad()
def flow_edit(
    denoiser: Denoiser,
    latent: Tensor,
    source: EditPrompts,
    target: EditPrompts,
    sigmas: Tensor,
    *,
    seeds: Sequence[int],
    options: FlowEditOptions | None = None,
    masks: MaskSchedule | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Edit an image by its source and target prompts.

    Args:
        denoiser: the model; flow, eps or v.
        latent: clean source latent, unscaled, [B, C, h, w].
        source, target: prompts with their guidance scales (SD3: 3.5 and 13.5, Flux: 1.5 and 5.5).
        sigmas: the whole grid [N + 1], falling to 0.
        seeds: one per image; noise number k of step i is draw i x n_avg + k.
        options: which steps do what.
        masks: latent masks, 1 = edit; outside the last one, the latent keeps the source's bits. None = everywhere.
        progress: called after every step with the edited latent.
    Returns: edited latent, unscaled, [B, C, h, w].
    Raises: ShapeError, ParameterError, MismatchError.
    Source: Kulikov et al. 2025, algorithm 1 and equation 9; the masks are ours.
    """
    options = options or FlowEditOptions()
    latent, sigmas = check_latent(latent, "latent", denoiser.channels), check_sigmas(sigmas)
    _check(latent, sigmas, seeds, options)
    source.check(denoiser, sigmas)
    target.check(denoiser, sigmas)
    steps = len(sigmas) - 1
    first, plain = max(0, steps - options.n_max), steps - options.n_min
    x = denoiser.scale_in(latent)
    difference = _Difference(
        denoiser, x, predictor(denoiser, source), predictor(denoiser, target), seeds, options.n_avg
    )
    masks = None if masks is None else masks.expanded(len(x), *x.shape[2:]).to(x.device)
    edited = x
    grid = sigmas.tolist()
    for i in range(first, plain):
        change = (grid[i + 1] - grid[i]) * difference(edited, grid[i], i)
        edited = edited + (change if masks is None else masks.at(i, sigmas) * change)
        progress(i - first + 1, steps - first, edited)
    if options.n_min:
        sampled = _sample_rest(difference, edited, grid, plain, first, progress)
        edited = sampled if masks is None else torch.lerp(x, sampled, masks.at(steps - 1, sigmas))
    result = denoiser.scale_out(edited)
    return result if masks is None else torch.where(masks.at(steps - 1, sigmas) == 0, latent.to(result), result)


def _check(latent: Tensor, sigmas: Tensor, seeds: Sequence[int], options: FlowEditOptions) -> None:
    if len(seeds) != len(latent):
        raise ShapeError(f"there are {len(seeds)} seeds but {len(latent)} images: give one seed per image")
    if float(sigmas[-1]) != 0:
        raise ParameterError(
            "sigmas must end at 0: FlowEdit ends at the clean latent; connect the whole grid of a scheduler"
        )
    if options.n_min > len(sigmas) - 1:
        raise ParameterError(f"n_min is {options.n_min} but the grid has {len(sigmas) - 1} steps: give fewer")


@dataclass(frozen=True)
class _Difference:
    """V_target - V_source at latents that share their noise (equation 9), averaged over `n_avg` noises."""

    denoiser: Denoiser
    source_latent: Tensor
    source: Predict
    target: Predict
    seeds: Sequence[int]
    n_avg: int

    def __call__(self, edited: Tensor, sigma: float, step: int) -> Tensor:
        """The difference [B, C, h, w] for the edited latent at `sigma`, model scale."""
        total = torch.zeros_like(edited)
        for k in range(self.n_avg):
            noised, moved = self.pair(edited, sigma, step * self.n_avg + k)
            # (moved - target) - (noised - source) without the noise, which cancels: small differences stay exact
            total += (edited - self.source_latent) - (self.target(moved, sigma) - self.source(noised, sigma))
        return total / (sigma * self.n_avg)

    def pair(self, edited: Tensor, sigma: float, draw: int) -> tuple[Tensor, Tensor]:
        """The source noised to `sigma`, and the edited latent moved by the same noise."""
        x = self.source_latent
        noised = self.denoiser.noise(x, seeded_noise(x.shape[1:], self.seeds, x.device, draw), sigma)
        return noised, noised + (edited - x)  # the same bits where nothing has moved


def _sample_rest(
    difference: _Difference,
    edited: Tensor,
    grid: Sequence[float],
    plain: int,
    first: int,
    progress: Progress,
) -> Tensor:
    """The last steps: plain Euler under the target prompt, from the edited latent with the source's noise.

    Args:
        difference: gives the pair of latents and the target's prediction.
        edited: the edited latent [B, C, h, w], model scale.
        grid: all sigmas.
        plain: index of the first plain step.
        first: index of the first step of the edit, for the progress.
        progress: called after every step.
    Returns: the edited latent [B, C, h, w], model scale.
    Raises: nothing.
    Source: Kulikov et al. 2025, algorithm 1, the loop from n_min down.
    """
    steps = len(grid) - 1
    _, z = difference.pair(edited, grid[plain], plain * difference.n_avg)
    for i in range(plain, steps):
        z = euler_step(z, difference.target(z, grid[i]), grid[i], grid[i + 1])
        progress(i - first + 1, steps - first, z)
    return z
