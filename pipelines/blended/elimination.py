"""Early elimination: of a batch of candidates only the best run to the end.

The denoised prediction at a middle step shows already what a candidate becomes, so the ranker can score it there
(docs/methods.md, section 4). Everything is deterministic: equal scores keep the candidate that came first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError
from ..core.guidance import EditPrompts
from ..core.masks import MaskSchedule
from ..core.noise import seeded_noise, start_latent
from ..core.progress import Progress, StagedProgress, silent
from ..core.protocols import Denoiser
from .blending import BlendOptions, blended_denoise, unscale_over_source


@dataclass(frozen=True)
class Elimination:
    """When to score the candidates, and how many to keep.

    Attributes:
        keep: candidates that run to the end, >= 1; all of them where there are not more.
        at: fraction of the steps after which they are scored, between 0 and 1.
        score: gives a number for each denoised prediction, unscaled latents [B, C, h, w] with the source outside the mask;
            the highest stay.
    """

    keep: int
    at: float
    score: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ParameterError(f"keep is {self.keep!r}: give a whole number of candidates, 1 or more")
        if not 0 < self.at < 1:
            raise ParameterError(f"keep_at is {self.at}: give a fraction of the steps between 0 and 1")

    def step(self, steps: int) -> int:
        """The first step that only the kept candidates run."""
        if steps < 2:
            raise ParameterError(f"there is {steps} step to run: elimination needs 2 or more")
        return min(max(1, round(self.at * steps)), steps - 1)

    def kept(self, denoised: Tensor) -> Tensor:
        """Indices of the candidates that stay, in their order."""
        scores = self.score(denoised).float().cpu()
        return torch.sort(scores, descending=True, stable=True).indices[: self.keep].sort().values


def sample_eliminating(
    denoiser: Denoiser,
    source: Tensor,
    sigmas: Tensor,
    schedule: MaskSchedule,
    prompts: EditPrompts,
    elimination: Elimination,
    *,
    seeds: list[int],
    options: BlendOptions | None = None,
    progress: Progress = silent,
) -> Tensor:
    """`sample_blended` with all candidates up to a middle step and the best of them to the end.

    Args:
        denoiser: the model.
        source: clean source latent of one image, unscaled, [1, C, h, w].
        sigmas: grid [N + 1] that ends with 0, N >= 2.
        schedule: mask schedule of one image.
        prompts: positive, negative and guidance scale, for all candidates.
        elimination: when to score, and how many to keep.
        seeds: one per candidate.
        options, progress: see `blended_denoise`.
    Returns: clean latents of the kept candidates in their order; bit for bit those of the plain batch if all are kept.
    Raises: ShapeError, ParameterError, MismatchError.
    """
    scaled = denoiser.scale_in(source).expand(len(seeds), -1, -1, -1)
    middle, steps = elimination.step(len(sigmas) - 1), len(sigmas) - 1
    staged = StagedProgress(progress, (middle, steps - middle))
    first, last = staged(0), None

    def watched(done: int, total: int, preview: Tensor | None = None) -> None:
        nonlocal last
        last = preview
        first(done, total, preview)

    noise = seeded_noise(scaled.shape[1:], seeds, scaled.device)
    z = start_latent(denoiser, scaled, float(sigmas[0]), noise)
    run = (sigmas, schedule, prompts)
    z = blended_denoise(denoiser, z, scaled, *run, seeds=seeds, end=middle, options=options, progress=watched)
    if last is None:
        raise ParameterError("elimination needs the denoised prediction of a step, which no step reported")
    kept = elimination.kept(unscale_over_source(denoiser, last, source, schedule, sigmas))
    z, scaled = z[kept.to(z.device)], scaled[: len(kept)]
    left = [seeds[index] for index in kept.tolist()]
    z = blended_denoise(denoiser, z, scaled, *run, seeds=left, start=middle, options=options, progress=staged(1))
    return unscale_over_source(denoiser, z, source, schedule, sigmas)
