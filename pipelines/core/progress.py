"""How long work reports itself and how it is cancelled.

A `Progress` is called once per step. A host's implementation may raise to cancel; no code in `pipelines/` swallows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class Progress(Protocol):
    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        """`done` of `total` steps are finished; `preview` is a clean latent [B, C, h, w] in model scale, if there is one."""


@runtime_checkable
class LossProgress(Progress, Protocol):
    """A `Progress` that can also show how far an optimisation has come."""

    def losses(self, values: Sequence[float]) -> None:
        """Total losses of the steps so far, oldest first; told every few steps, before the step is reported."""


def silent(done: int, total: int, preview: Tensor | None = None) -> None:
    """Report to nobody."""


class Legs:
    """One progress for a run of several parts: `Legs(progress, (10, 40))(1)` is the progress of the second part."""

    def __init__(self, progress: Progress, lengths: tuple[int, ...]) -> None:
        self.progress, self.lengths = progress, lengths

    def __call__(self, leg: int) -> Progress:
        kind = _LossLeg if isinstance(self.progress, LossProgress) else _Leg
        return kind(self.progress, sum(self.lengths[:leg]), sum(self.lengths))


class _Leg:
    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self.progress, self.before, self.total = progress, before, total

    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        self.progress(self.before + done, self.total, preview)


class _LossLeg(_Leg):
    progress: LossProgress

    def losses(self, values: Sequence[float]) -> None:
        self.progress.losses(values)
