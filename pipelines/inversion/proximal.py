"""ProxNPI: cut down what guidance changes, so that a small edit stays small (Han et al. 2024; methods.md, 11.5).

Guidance moves the prediction by w times the difference of the conditional and the unconditional prediction. The
proximal step sets small differences to zero; where nothing is left, the picture may be pulled back to the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import MismatchError, ParameterError
from ..core.masks import dilate
from ..core.sigmas import euler_step, step_of_sigma
from ..core.trajectory import Trajectory

TARGETS = ("source", "path")


def soft(delta: Tensor, level: Tensor) -> Tensor:
    """Soft threshold: everything moves towards 0 by `level`. The published mode "l0"."""
    return delta - delta.clamp(-level, level)


def hard(delta: Tensor, level: Tensor) -> Tensor:
    """Hard threshold: what is above `level` stays as it is, the rest is 0."""
    return torch.where(delta.abs() > level, delta, torch.zeros_like(delta))


def published_l1(delta: Tensor, level: Tensor) -> Tensor:
    """The published mode "l1", whose chained cases shrink twice and turn the sign of small negatives."""
    delta = soft(delta, level)
    delta = torch.where(delta > 0, delta - level, delta)
    return torch.where(delta < 0, delta + level, delta)


SHRINK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"soft": soft, "hard": hard, "published l1": published_l1}


def quantile(values: Tensor, share: float) -> Tensor:
    """Linear quantile of each row of [B, n], as [B]; `torch.quantile` refuses more than 16 M values."""
    ordered = values.sort(dim=1).values
    place = share * (values.shape[1] - 1)
    low = math.floor(place)
    return torch.lerp(ordered[:, low], ordered[:, min(low + 1, values.shape[1] - 1)], place - low)


@dataclass(frozen=True)
class Proximal:
    """What to cut, and whether to pull the rest back.

    Attributes:
        mode: "soft", "hard" or "published l1".
        quantile: share of a picture's differences to remove, [0, 1]; 0 removes none, 1 all. The default equals the
            published 0.7, which was taken over source and target rows together.
        threshold: a fixed level >= 0 in units of noise (eps) instead of the quantile; None = quantile.
        batch_quantile: as published: one quantile over the whole batch and as many zeros (the source rows of NPI).
        pull: share [0, 1] of the way back to the source where nothing is left of the difference; 0 = off.
        pull_below: noise level under which the pull acts (published: timestep 400).
        pull_to: "source", the clean picture; or "path", its inversion at the level that the step reaches.
        dilation: cells by which what may change is grown before the rest is pulled, >= 0.
        mask_of_shrunk: as published: test the shrunk difference, so that soft modes test against twice the level.
    """

    mode: str = "soft"
    quantile: float = 0.4
    threshold: float | None = None
    batch_quantile: bool = False
    pull: float = 0.0
    pull_below: float = math.inf
    pull_to: str = "path"
    dilation: int = 1
    mask_of_shrunk: bool = False

    def __post_init__(self) -> None:
        if self.mode not in SHRINK:
            raise ParameterError(f"prox mode is {self.mode!r}: choose one of {', '.join(SHRINK)}")
        if self.pull_to not in TARGETS:
            raise ParameterError(f"pull_to is {self.pull_to!r}: choose one of {', '.join(TARGETS)}")
        for name in ("quantile", "pull"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")
        if self.threshold is not None and self.threshold < 0:
            raise ParameterError(f"threshold is {self.threshold}: give 0 or more, or leave it out for the quantile")
        if self.dilation < 0:
            raise ParameterError(f"dilation is {self.dilation}: give 0 or more latent cells")

    def level(self, delta: Tensor, sigma: float) -> Tensor:
        """The threshold of differences [B, C, h, w] of clean predictions, broadcastable over them.

        Such a difference is sigma times that of the noise predictions, for diffusion and flow models alike.
        """
        if self.threshold is not None:
            return delta.new_tensor(self.threshold * sigma)
        if self.quantile == 0:
            return delta.new_zeros(())
        size = delta.abs()
        if self.batch_quantile:
            return quantile(torch.cat([torch.zeros_like(size), size]).reshape(1, -1), self.quantile).view(1, 1, 1, 1)
        return quantile(size.flatten(1), self.quantile).view(-1, 1, 1, 1)

    def guide(
        self, z: Tensor, sigma: float, cond: Tensor, uncond: Tensor, path: Trajectory | None,
        guidance: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """The guided clean prediction [B, C, h, w] of one step; `guidance` mixes a conditional and an unconditional one."""
        delta = cond - uncond
        level = self.level(delta, sigma)
        shrunk = SHRINK[self.mode](delta, level)
        clean = guidance(uncond + shrunk, uncond)
        if self.pull == 0 or sigma >= self.pull_below:
            return clean
        if path is None:
            raise MismatchError("pull is above 0 but these embeddings carry no trajectory: make them from a TRAJECTORY")
        changed = ((shrunk if self.mask_of_shrunk else delta).abs() > level).to(delta)
        share = self.pull * (1 - dilate(changed, 2 * self.dilation + 1))
        return clean - share * self._distance(z, sigma, clean, path.expanded(len(z)).to(z.device))

    def _distance(self, z: Tensor, sigma: float, clean: Tensor, path: Trajectory) -> Tensor:
        """How far the clean prediction is off. The path is met by the latent after the step, so that a share of this
        taken from the prediction takes the same share from the difference there (one first-order step).
        """
        if self.pull_to == "source":
            return clean - path.source
        step = step_of_sigma(sigma, path.sigmas)
        target = float(path.sigmas[step + 1])
        return (euler_step(z, clean, sigma, target) - path.level(step + 1)) / (1 - target / sigma)
