"""Images of one batch that finish learning at different times: what is done stays, while others go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Held:
    """Parameters [B, ...] of which each image keeps what it had when its loss first fell below a threshold.

    Published loops test the loss after the update that it led to, so an image stops one update after the loss that
    satisfied it. Call `saw` with every loss, and `hold` before the next one and at the end.
    """

    def __init__(self, parameters: Sequence[Tensor], threshold: float) -> None:
        self.parameters, self.threshold = parameters, threshold
        first = parameters[0]
        self.done = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        self.loss = torch.full((len(first),), torch.inf, device=first.device)
        self.kept = [parameter.detach().clone() for parameter in parameters]

    @property
    def stop(self) -> AllBelow:
        """The rule that ends the loop when every image is done."""
        return AllBelow(self.threshold)

    def saw(self, loss: Tensor) -> None:
        """Losses [B] of the parameters as they are."""
        self.loss = loss.detach()

    @torch.no_grad()
    def hold(self) -> None:
        """Put back what has moved since its image was done. A single image needs none: the loop ends with it."""
        if len(self.done) == 1:
            return
        newly = (self.loss < self.threshold) & ~self.done
        self.done = self.done | newly
        for index, parameter in enumerate(self.parameters):
            shape = (-1, *[1] * (parameter.ndim - 1))
            self.kept[index] = torch.where(newly.view(shape), parameter, self.kept[index])
            parameter.copy_(torch.where(self.done.view(shape), self.kept[index], parameter))


@dataclass(frozen=True)
class AllBelow:
    """A `StopRule`: stop when every image's loss has been below the threshold; asked after every update, as published."""

    threshold: float
    every: int = 1

    def __call__(self, history: Tensor) -> bool:
        return bool((history < self.threshold).any(0).all())
