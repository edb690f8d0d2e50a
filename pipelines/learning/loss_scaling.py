"""Loss scaling: gradients that pass through a network in float16.

The gradients of a mean squared error over a latent start below 1e-5, and the smallest number of float16 is 6e-8. They
underflow in float16, so the loss is scaled by a power of two and the gradients unscaled (Micikevicius et al. 2018,
"Mixed precision training", section 3.2). Here the scale holds inside the network only: gradients are multiplied where
they enter it, at its outputs, and divided where they leave it, at its inputs. A power of two changes no float32 result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.protocols import Context


class LossScaling:
    """The loss scaling of one evaluation of a network.

    It does nothing unless gradients are recorded and the network computes in float16.
    """

    def __init__(self, dtype: torch.dtype | None, factor: float | None = None) -> None:
        """Prepare one evaluation.

        Args:
            dtype: the type that the network computes in; None = do not scale.
            factor: the scale, a power of two. None = the power of two that brings the largest gradient at the network's
                output to between 1 and 2, found in each backward pass. That needs a single output; where gradients enter a
                network in several places, give one factor for all of them.
        """
        self._active = dtype is torch.float16 and torch.is_grad_enabled()
        self._fixed = factor
        self._factor: Tensor | float | None = factor

    def enter(self, value: Tensor) -> Tensor:
        """Mark a float32 input of the network: gradients that leave here are unscaled."""
        if not (self._active and value.requires_grad):
            return value
        value = value.view_as(value)  # the hook belongs to this evaluation, not to a parameter that others use too
        value.register_hook(lambda gradient: gradient if self._factor is None else gradient / self._factor)
        return value

    def contexts(self, contexts: Sequence[Context]) -> list[Context]:
        """`enter` for the tokens of encoded prompts."""
        return [self._context(context) for context in contexts]

    def _context(self, context: Context) -> Context:
        tokens = self.enter(context.tokens)
        return context if tokens is context.tokens else context.with_tokens(tokens)

    def leave(self, value: Tensor) -> Tensor:
        """Mark a float32 output of the network: gradients that enter here are scaled."""
        if self._active and value.requires_grad:
            value.register_hook(self._scaled)
        return value

    def _scaled(self, gradient: Tensor) -> Tensor:
        factor = _power_of_two(gradient) if self._fixed is None else self._fixed
        self._factor = factor
        return gradient * factor


def _power_of_two(gradient: Tensor) -> Tensor:
    """The power of two that brings the largest number of a gradient to between 1 and 2; 1 for a gradient of zeros."""
    size = gradient.abs().amax()
    return torch.where(size > 0, (-size.log2().floor()).exp2(), torch.ones_like(size))
