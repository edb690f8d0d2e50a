"""Progress of long work, and its cancellation.

A `Progress` is called once per step. A host's implementation may raise to cancel; no code in `pipelines/` swallows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class Progress(Protocol):
    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        """Report `done` of `total` steps; `preview` is a denoised latent [B, C, h, w] in model scale, if there is one."""


@runtime_checkable
class LossProgress(Progress, Protocol):
    """A `Progress` that also shows the losses of an optimisation."""

    def losses(self, values: Sequence[float]) -> None:
        """Total losses of the steps so far, oldest first. Called every few steps, before the step is reported."""


@runtime_checkable
class StoppableProgress(Progress, Protocol):
    """A `Progress` whose user may end an optimisation early and keep what it has learned."""

    def stop_requested(self) -> bool:
        """Whether the optimisation should end after the step that was just reported."""

    def proceed(self) -> None:
        """Forget the request, because another stage of the work starts."""


def refresh_seconds(progress: Progress) -> float:
    """Seconds after which a progress wants the losses anew, whatever the number of steps; infinite if it does not say."""
    return float(getattr(progress, "refresh", math.inf))


def stop_requested(progress: Progress) -> bool:
    """Whether to end an optimisation here and keep what it has learned."""
    return isinstance(progress, StoppableProgress) and progress.stop_requested()


def silent(done: int, total: int, preview: Tensor | None = None) -> None:
    """Report nothing."""


class StagedProgress:
    """One progress bar for work in stages: `StagedProgress(progress, (10, 40))(1)` is the progress of the second."""

    def __init__(self, progress: Progress, lengths: tuple[int, ...]) -> None:
        self.progress = progress
        self.lengths = lengths

    def __call__(self, stage: int) -> Progress:
        if isinstance(self.progress, StoppableProgress):
            self.progress.proceed()
        kind = _LossStage if isinstance(self.progress, LossProgress) else Stage
        return kind(self.progress, sum(self.lengths[:stage]), sum(self.lengths))


class Stage:
    """The progress of one stage: `before` of `total` steps are done when it starts."""

    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self.progress = progress
        self.before = before
        self.total = total

    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        self.progress(self.before + done, self.total, preview)

    def stop_requested(self) -> bool:
        """See `StoppableProgress.stop_requested`."""
        return stop_requested(self.progress)

    def proceed(self) -> None:
        """See `StoppableProgress.proceed`."""


class _LossStage(Stage):
    progress: LossProgress

    @property
    def refresh(self) -> float:
        return refresh_seconds(self.progress)

    def losses(self, values: Sequence[float]) -> None:
        self.progress.losses(values)
