"""Null-text inversion: unconditional embeddings with which guided sampling follows an inversion (Mokady et al. 2023).

One embedding per sampling step is learned, because one embedding for all steps cannot correct the errors that guidance
accumulates (docs/methods.md, sections 11.3 and 17). The loop over steps is `learning.per_step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import match_batch
from ..core.trajectory import Trajectory
from ..learning.optimise import learning_mode, own, own_context
from ..learning.per_step import StepSettings, TrajectoryStep, learn_per_step
from .negative_embeddings import Embeddings

PUBLISHED_STEPS = 100  # the published learning rate is 0 there


@dataclass(frozen=True)
class NullTextOptions:
    """How the embeddings are learned; the defaults are those of the published code.

    Attributes:
        guidance_scale: the scale of the reconstruction and of later edits.
        inner: most updates per sampling step.
        lr: Adam's step size in the first step; it falls linearly to half of that (published: 1 - i / 100, in 50 steps).
        tolerance, tolerance_growth: an image stops learning in step i when its loss, the mean squared distance from the
            trajectory in variance-preserving scale, is below tolerance + i tolerance_growth.
        published_rate: a step size of 1 - i / 100 in step i whatever the number of steps, which is at most 100.
    """

    guidance_scale: float = 7.5
    inner: int = 10
    lr: float = 1e-2
    tolerance: float = 1e-5
    tolerance_growth: float = 2e-5
    published_rate: bool = False

    def __post_init__(self) -> None:
        if self.inner < 0:
            raise ParameterError(f"inner steps are {self.inner}: give 0 or more (10 as published)")
        if not self.lr > 0:
            raise ParameterError(f"lr is {self.lr}: give a learning rate above 0 (0.01 as published)")

    def updates(self, step: int) -> int:
        """Most updates in `step`; 0 at scale 1, where the unconditional prediction cancels out of guidance."""
        return 0 if self.guidance_scale == 1 else self.inner

    def rate(self, step: int, steps: int) -> float:
        """Adam's step size in `step` of a grid of `steps`."""
        if not self.published_rate:
            return self.lr * (1 - step / (2 * steps))
        if steps > PUBLISHED_STEPS:
            raise ParameterError(
                f"the inversion has {steps} steps, but the published rate ends at {PUBLISHED_STEPS}: invert with fewer"
            )
        return self.lr * (1 - step / PUBLISHED_STEPS)

    def threshold(self, step: int) -> float:
        """The loss below which an image stops learning in `step`."""
        return self.tolerance + step * self.tolerance_growth


@dataclass(frozen=True)
class NullTextResult:
    """The learned embeddings.

    Attributes:
        embeddings: one per step.
        rebuilt: the reconstruction: where guided sampling with the embeddings ends, [B, C, h, w] in model scale.
        losses: last measured loss of each step, mean over the batch; before the last update, as published.
        updates: updates made in each step.
    """

    embeddings: Embeddings
    rebuilt: Tensor
    losses: list[float]
    updates: list[int]


def null_text(
    denoiser: Denoiser,
    trajectory: Trajectory,
    source: Context,
    null: Context,
    *,
    options: NullTextOptions | None = None,
    progress: Progress = silent,
) -> NullTextResult:
    """Learn one unconditional embedding per step, so that guided sampling follows the trajectory.

    Forward passes per step and image: 1 conditional, 1 unconditional per update, and 1 unconditional to take the step.
    Only the embeddings receive gradients; the model must pass gradients to its context. Images do not influence each other.

    Args:
        denoiser: the model that made the trajectory.
        trajectory: the inversion, [N + 1 - first, B, C, h, w].
        source: the prompt of the inversion, [1 or B, T, D].
        null: the empty prompt, from which the embeddings start, [1 or B, T, D].
        options: see `NullTextOptions`.
        progress: called after every update; raising there cancels.
    Returns: the embeddings, and the reconstruction that the loop arrives at.
    Raises: MismatchError for another model or prompt than the trajectory's; ShapeError; EditError.
    Source: Mokady et al. 2023, "Null-text inversion", section 3.3 and algorithm 1; docs/methods.md, section 11.3.
    """
    options = options or NullTextOptions()
    trajectory.check(denoiser)
    trajectory.check_prompt(source, "positive")
    with learning_mode():
        learner = _EmbeddingLearner(denoiser, trajectory, source, own_context(null), options)
        result = learn_per_step(learner, denoiser, trajectory, progress=progress)
        tokens = torch.stack(learner.learned)
    embeddings = Embeddings(
        null,
        tokens,
        trajectory.sigmas,
        trajectory.family,
        trajectory.fingerprint,
        trajectory.prompt,
        options.guidance_scale,
    )
    return NullTextResult(embeddings, result.reconstruction, result.losses, result.updates)


class _EmbeddingLearner:
    """The unconditional embedding of the current step (a `StepLearner`).

    Attributes:
        embedding: what learns, [B, T, D].
        learned: its value after each step.
    """

    def __init__(
        self, denoiser: Denoiser, trajectory: Trajectory, source: Context, null: Context, options: NullTextOptions
    ) -> None:
        self.denoiser = denoiser
        self.source = source
        self.null = null
        self.options = options
        self.steps = trajectory.steps
        start = match_batch(null.tokens, trajectory.batch, "negative", "trajectory")
        self.embedding = own(start.contiguous(), trajectory.latents.device)
        self.learned: list[Tensor] = []

    @property
    def parameters(self) -> list[Tensor]:
        return [self.embedding]

    def settings(self, index: int) -> StepSettings:
        options = self.options
        return StepSettings(options.updates(index), options.rate(index, self.steps), options.threshold(index))

    def begin(self, step: TrajectoryStep) -> None:
        """Predict under the source prompt once: this prediction does not depend on the embedding."""
        self.step = step
        self.cond = self.denoiser.denoise(step.z, step.sigma, [self.source])[0]

    def guided(self) -> Tensor:
        """The guided denoised prediction [B, C, h, w] with the embedding as it is now."""
        step, scale = self.step, self.options.guidance_scale
        if scale == 1:
            return self.cond
        null = self.null.with_tokens(self.embedding)
        uncond = self.denoiser.denoise(step.z, step.sigma, [null])[0]
        return self.denoiser.combine(step.z, step.sigma, self.cond, uncond, scale, [self.source, null])

    def loss(self) -> Tensor:
        """The squared distance [B] of the guided step from the trajectory."""
        return self.step.distance(self.guided())

    def finish(self) -> Tensor:
        self.learned.append(self.embedding.detach().clone())
        return self.guided()


__all__ = ["NullTextOptions", "NullTextResult", "null_text"]
