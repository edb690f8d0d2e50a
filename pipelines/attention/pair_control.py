"""What all attention edits share: the source row of each target row, steps found by sigma, and what a loop asks."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.attention_sites import Branch, Passive, Row
from ..core.errors import MismatchError
from ..core.sigmas import check_sigmas, step_of_sigma

NO_BRANCH: frozenset[Branch] = frozenset()


class Partners(NamedTuple):
    """The source row of each target row in one model call.

    Attributes:
        targets: batch rows of the edited targets, int64 [pairs].
        sources: batch rows of their sources, int64 [pairs].
        source_of: for every batch row the row whose attention it uses, int64 [rows]: a target's source, else the row itself.
        pairs: the meaning of `targets` and `sources`, as (target, source).
    """

    targets: Tensor
    sources: Tensor
    source_of: Tensor
    pairs: tuple[tuple[Row, Row], ...]


class PairControl(Passive):
    """An attention edit of a target by its source. It may keep state for the length of one run: call `reset` before.

    Attributes:
        sigmas: the whole grid, float32 [N + 1]; step ranges are fractions of it, also where a run starts later.
        shared_source: the source runs on its own prompt only, and serves both branches of the target.
    """

    shared_source = False

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = check_sigmas(sigmas).cpu()
        self.steps = len(self.sigmas) - 1
        self._step_of: dict[float, int] = {}
        self._partners: dict[tuple, Partners] = {}

    def reset(self) -> None:
        """Forget what a run has collected."""
        self._partners.clear()

    def needs(self, step: int) -> frozenset[Branch]:
        """The branches in which the source must run beside the target at `step`."""
        return NO_BRANCH

    def active(self, step: int) -> bool:
        """Whether the control does anything at `step`."""
        return bool(self.needs(step))

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        """The target's latent [B, C, h, w] after `step`, given the source's at the same sigma."""
        return target

    def step(self, sigma: float) -> int:
        """The step that a model call at `sigma` belongs to."""
        if sigma not in self._step_of:
            self._step_of[sigma] = step_of_sigma(sigma, self.sigmas)
        return self._step_of[sigma]

    def partners(self, rows: tuple[Row, ...], branches: Collection[Branch], device: torch.device) -> Partners | None:
        """The targets in `branches` and their sources; None if there is no such target.

        Raises: MismatchError for a target whose source is not in the call.
        """
        key = (rows, tuple(sorted(branches)), device)
        if key not in self._partners:
            self._partners[key] = _partners(rows, _pairs(rows, branches), device)
        return self._partners[key] if self._partners[key].pairs else None


def _partners(rows: tuple[Row, ...], pairs: list[tuple[int, int]], device: torch.device) -> Partners:
    source_of = list(range(len(rows)))
    for target, source in pairs:
        source_of[target] = source
    return Partners(
        targets=torch.tensor([target for target, _ in pairs], device=device),
        sources=torch.tensor([source for _, source in pairs], device=device),
        source_of=torch.tensor(source_of, device=device),
        pairs=tuple((rows[target], rows[source]) for target, source in pairs),
    )


def _pairs(rows: tuple[Row, ...], branches: Collection[Branch]) -> list[tuple[int, int]]:
    """(target, source) for every target in `branches`: the source in the same branch, or the only one in the call."""
    sources = {(row.image, row.branch): i for i, row in enumerate(rows) if row.role == "source"}
    any_branch = {row.image: i for i, row in enumerate(rows) if row.role == "source"}
    found = []
    for i, row in enumerate(rows):
        if row.role == "target" and row.branch in branches:
            source = sources.get((row.image, row.branch), any_branch.get(row.image))
            if source is None:
                raise MismatchError(
                    "an attention edit met a target without its source: source and target must be two latents of one "
                    "batch under one prompt with a row for each"
                )
            found.append((i, source))
    return found
