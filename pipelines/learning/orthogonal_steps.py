"""Steps of equal size in every direction of a weight matrix, for losses without noise.

Adam needs many small steps, because one of its large steps moves all weights of a layer by the same amount whatever they do
together. Replacing the gradient matrix G = U S V' by U V' moves every input direction of the layer equally far (Jordan et
al. 2024, "Muon"). The loss here is the same in every step, so there is no noise to average: the rule keeps no momentum and
no other state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Quintic Newton-Schulz iteration of Muon: brings singular values from (0, 1] to about 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class OrthogonalSteps(torch.optim.Optimizer):
    """Gradient descent along U V' of each weight matrix, relative to the size that the weights had at the start.

    The learning rate is a share: 0.02 moves each direction by 2 % of the layer's root mean square singular value. A
    convolution counts as a matrix of outputs x everything else. Vectors (biases, norms) are refused: leave them out.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self._sizes = [_size(parameter.detach()) for parameter in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        group = self.param_groups[0]
        for parameter, size in zip(group["params"], self._sizes, strict=True):
            if parameter.grad is not None:
                direction = orthogonalised(parameter.grad.flatten(1))
                parameter.sub_((group["lr"] * size * direction).view_as(parameter))


def orthogonalised(gradient: Tensor) -> Tensor:
    """About U V' of a matrix U S V' [m, n]; zero stays zero."""
    tall = gradient.shape[0] > gradient.shape[1]
    value = gradient.T if tall else gradient
    value = value / (value.norm() + torch.finfo(value.dtype).tiny)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = value @ value.T
        value = first * value + (third * square + fifth * square @ square) @ value
    return value.T if tall else value


def cosine_rate(rate: float, steps: int) -> Callable[[int], float]:
    """A learning rate that falls from `rate` to 0 along half a cosine; each step takes the middle of its stretch."""
    return lambda step: rate * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / max(1, steps)))


def _size(weight: Tensor) -> Tensor:
    """Root mean square singular value of a weight matrix."""
    matrix = weight.flatten(1)
    return matrix.norm() / math.sqrt(min(matrix.shape))
