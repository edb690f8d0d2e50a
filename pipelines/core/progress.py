"""Progress of long work, and its cancellation.

A `Progress` is called once per step. A host's implementation may raise to cancel; no code in `pipelines/` swallows it.
"""

from __future__ import annotations

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


def silent(done: int, total: int, preview: Tensor | None = None) -> None:
    """Report nothing."""


class StagedProgress:
    """One progress bar for work in stages: `StagedProgress(progress, (10, 40))(1)` is the progress of the second."""

    def __init__(self, progress: Progress, lengths: tuple[int, ...]) -> None:
        self.progress = progress
        self.lengths = lengths

    def __call__(self, stage: int) -> Progress:
        kind = _LossStage if isinstance(self.progress, LossProgress) else _Stage
        return kind(self.progress, sum(self.lengths[:stage]), sum(self.lengths))


class _Stage:
    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self.progress = progress
        self.before = before
        self.total = total

    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        self.progress(self.before + done, self.total, preview)


class _LossStage(_Stage):
    progress: LossProgress

    def losses(self, values: Sequence[float]) -> None:
        self.progress.losses(values)
