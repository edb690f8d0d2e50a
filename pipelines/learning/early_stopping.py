"""Early stopping: rules that end an optimisation, and the freezing of single images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StopRule(Protocol):
    """Decides from the loss history whether to end an optimisation."""

    @property
    def every(self) -> int:
        """Iterations between two calls; each call synchronises host and device once."""

    def __call__(self, history: Tensor) -> bool:
        """`history` is float32 [n, K] on the CPU: the K loss terms of the n steps so far."""


@dataclass(frozen=True)
class Plateau:
    """Stop when the best value of the last `every` steps is less than `gain` better than the best before them.

    Attributes:
        every: steps without progress that are tolerated (patience), >= 1.
        gain: least relative improvement that counts as progress.
        term: index of the loss term to watch; None watches the sum of all terms.
    """

    every: int
    gain: float = 0.01
    term: int | None = None

    def __call__(self, history: Tensor) -> bool:
        values = history.sum(1) if self.term is None else history[:, self.term]
        if len(values) <= self.every:
            return False
        recent, before = values[-self.every :].min(), values[: -self.every].min()
        return bool(recent >= before * (1 - self.gain))


@dataclass(frozen=True)
class MeanPlateau:
    """Stop when the mean of the last `every` steps is less than `gain` below the mean of the `every` steps before them.

    For losses with a random sigma in every step: their single values fluctuate, so only means can be compared.
    """

    every: int
    gain: float = 0.01

    def __call__(self, history: Tensor) -> bool:
        values = history.sum(1)
        if len(values) < 2 * self.every:
            return False
        recent, before = values[-self.every :].mean(), values[-2 * self.every : -self.every].mean()
        return bool(recent >= before * (1 - self.gain))


@dataclass(frozen=True)
class AllBelow:
    """Stop when the loss of every image has been below `threshold` at least once."""

    threshold: float
    every: int = 1

    def __call__(self, history: Tensor) -> bool:
        return bool((history < self.threshold).any(0).all())


class PerImageEarlyStop:
    """Freeze each image of a batch once its loss is below a threshold, while the rest of the batch continues.

    The published loops make an update from a loss before they compare that loss with the threshold. An image is therefore
    frozen one update after its first loss below the threshold. `watch` keeps this order; call `freeze` once more after
    the last update.

    Attributes:
        parameters: what learns, [B, ...] each, changed in place.
        threshold: the loss below which an image is finished.
    """

    def __init__(self, parameters: Sequence[Tensor], threshold: float) -> None:
        self.parameters, self.threshold = parameters, threshold
        first = parameters[0]
        self._frozen = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        self._loss = torch.full((len(first),), torch.inf, device=first.device)
        self._kept = [parameter.detach().clone() for parameter in parameters]

    @property
    def rule(self) -> AllBelow:
        """The rule that ends the optimisation when every image is finished."""
        return AllBelow(self.threshold)

    def watch(self, loss: Callable[[], Tensor]) -> Callable[[int], Tensor]:
        """A per-image loss [B] as `optimise` calls it, with freezing before and observing after each evaluation."""

        def watched(step: int) -> Tensor:
            self.freeze()
            value = loss()
            self.observe(value)
            return value

        return watched

    def observe(self, loss: Tensor) -> None:
        """Note the losses [B] of the parameters as they are now."""
        self._loss = loss.detach()

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the parameters of images that have just finished, and restore those of images that finished before."""
        if len(self._frozen) == 1:  # a single image needs no restoring, because `rule` ends its loop
            return
        newly = (self._loss < self.threshold) & ~self._frozen
        self._frozen = self._frozen | newly
        for index, parameter in enumerate(self.parameters):
            shape = (-1, *[1] * (parameter.ndim - 1))
            self._kept[index] = torch.where(newly.view(shape), parameter, self._kept[index])
            parameter.copy_(torch.where(self._frozen.view(shape), self._kept[index], parameter))
