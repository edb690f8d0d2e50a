"""The learning loop of methods that learn something for each sampling step (docs/methods.md, section 17).

Null-text inversion learns an unconditional embedding per step (Mokady et al. 2023), StyleDiffusion a mapping network per
step (Li et al. 2023). Both do the following in each step i of a trajectory z*_0, ..., z*_N:

    1. learn, so that the guided Euler step from z_i reaches z*_{i + 1};
    2. take that step with the learned parameters, from z_i to z_{i + 1};
    3. continue with the same parameters in step i + 1 (warm start).

A method states what it learns and with which loss: it is a `StepLearner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.progress import LossProgress, Progress, Stage, silent, stop_requested
from ..core.protocols import Denoiser
from ..core.sigmas import euler_step
from ..core.trajectory import Trajectory
from .early_stopping import PerImageEarlyStop
from .memory import check_step_memory
from .optimise import OptimiseResult, optimise, own


@dataclass(frozen=True)
class StepSettings:
    """How one sampling step is learned.

    Attributes:
        updates: most Adam updates, >= 0.
        lr, betas: Adam's step size and decay rates.
        threshold: an image stops learning when its loss is below this.
    """

    updates: int
    lr: float
    threshold: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class TrajectoryStep:
    """One sampling step and the latent that it should reach.

    Attributes:
        index: of the step, counted on the whole grid.
        sigma, next_sigma: where it starts and ends.
        z: the latent [B, C, h, w] that sampling has reached, model scale.
        goal: the trajectory's latent at `next_sigma`, [B, C, h, w].
        weight: of the squared distance: 1 / (1 + next_sigma^2) for eps and v models, 1 for flow models. The published
            tolerances are meant for variance-preserving latents.
    """

    index: int
    sigma: float
    next_sigma: float
    z: Tensor
    goal: Tensor
    weight: float

    def take(self, denoised: Tensor) -> Tensor:
        """The latent [B, C, h, w] after a step with this prediction."""
        return euler_step(self.z, denoised, self.sigma, self.next_sigma)

    def distance(self, denoised: Tensor) -> Tensor:
        """Mean squared distance [B] from the trajectory after a step with this prediction, in variance-preserving scale."""
        return (self.take(denoised) - self.goal).square().flatten(1).mean(1) * self.weight


class StepLearner(Protocol):
    """What a method learns in every sampling step. Its parameters go from step to step (warm start)."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What learns: float32 leaves [B, ...], the same ones in every step."""

    def settings(self, index: int) -> StepSettings:
        """How step `index` of the whole grid is learned."""

    def begin(self, step: TrajectoryStep) -> None:
        """Prepare a step: evaluate what does not depend on the parameters. Called without gradients."""

    def loss(self) -> Tensor:
        """Losses [B] of the current step, with the parameters as they are now."""

    def finish(self) -> Tensor:
        """Store what the step has learned; return its guided prediction [B, C, h, w]. Called without gradients."""


@dataclass(frozen=True)
class PerStepResult:
    """The course of the loop.

    Attributes:
        reconstruction: where sampling with the learned parameters ends, [B, C, h, w] in model scale.
        losses: last loss of each step, mean over the batch, measured before the last update; 0 without updates.
        updates: updates made in each step.
    """

    reconstruction: Tensor
    losses: list[float]
    updates: list[int]


def learn_per_step(
    learner: StepLearner,
    denoiser: Denoiser,
    trajectory: Trajectory,
    *,
    memory_name: str | None = None,
    progress: Progress = silent,
) -> PerStepResult:
    """Learn in every step of a trajectory, and sample along it. Call it in `learning_mode`.

    Images do not influence each other: each has its own loss and early stopping.

    Args:
        learner: what is learned.
        denoiser: the model that the learner evaluates.
        trajectory: latents to reach, [N + 1 - first, B, C, h, w].
        memory_name: a name for the error about too little memory. None = do not estimate the memory; the estimate costs
            one evaluation of the loss.
        progress: called after every update and every sampling step, in units of these; raising there cancels. A
            `LossProgress` receives the last loss of every step. Once a `StoppableProgress` asks to stop, nothing more is
            learned: the remaining steps are sampled with the parameters as they are.
    Returns: where sampling ends, [B, C, h, w] in model scale, and the last loss and the updates of each step.
    Raises: EditError where an update does not fit into memory or the loss is no longer a number; what the learner raises.
    """
    indices = range(trajectory.first, trajectory.steps)
    total = progress_units(lambda index: learner.settings(index).updates, trajectory)
    done, z = 0, own(trajectory.latents[0])
    losses: list[float] = []
    updates: list[int] = []
    for index in indices:
        step = _step(denoiser, trajectory, index, z)
        with torch.no_grad():
            learner.begin(step)
        if memory_name is not None and index == trajectory.first:
            check_step_memory(learner.parameters, learner.loss, denoiser, memory_name)
        result = _learn(learner, index, done, total, progress)
        with torch.no_grad():
            denoised = learner.finish()
            z = step.take(denoised)
        losses.append(result.losses[-1] / trajectory.batch if result.losses else 0.0)
        updates.append(result.steps)
        done += learner.settings(index).updates + 1
        if isinstance(progress, LossProgress):
            progress.losses(losses)
        progress(done, total, denoised)
    return PerStepResult(z, losses, updates)


def progress_units(updates: Callable[[int], int], trajectory: Trajectory) -> int:
    """The total that `learn_per_step` reports to its progress, where step i makes at most `updates(i)` updates."""
    return sum(updates(index) + 1 for index in range(trajectory.first, trajectory.steps))


def _step(denoiser: Denoiser, trajectory: Trajectory, index: int, z: Tensor) -> TrajectoryStep:
    sigma, next_sigma = trajectory.sigmas[index : index + 2].tolist()
    weight = 1.0 if denoiser.flow else 1 / (1 + next_sigma * next_sigma)
    return TrajectoryStep(index, sigma, next_sigma, z, own(trajectory.latent(index + 1)), weight)


def _learn(learner: StepLearner, index: int, before: int, total: int, progress: Progress) -> OptimiseResult:
    """Optimise the parameters in one sampling step, until every image is below its threshold."""
    settings = learner.settings(index)
    early_stop = PerImageEarlyStop(learner.parameters, settings.threshold)
    result = optimise(
        learner.parameters,
        early_stop.watch(learner.loss),
        steps=0 if stop_requested(progress) else settings.updates,
        lr=settings.lr,
        betas=settings.betas,
        stop=early_stop.rule,
        progress=Stage(progress, before, total),
    )
    early_stop.freeze()
    return result


__all__ = ["PerStepResult", "StepLearner", "StepSettings", "TrajectoryStep", "learn_per_step", "progress_units"]
