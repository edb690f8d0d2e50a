"""Gradients through a network in half precision.

float16 ends at 6e-8, and the gradients of a mean squared error over a latent begin below 1e-5: most would arrive as
zero. So they pass the network enlarged by a power of two, which is taken back where they leave it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.protocols import Context


class LossScaling:
    """The factor of one evaluation: inside the network, the largest gradient at its output is about 1.

    Idle unless gradients are asked for and the network computes in float16.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._active = dtype is torch.float16 and torch.is_grad_enabled()
        self._factor: Tensor | None = None

    def enter(self, value: Tensor) -> Tensor:
        """An input on its way into the network, in float32."""
        if not (self._active and value.requires_grad):
            return value
        value = value.view_as(value)  # so that the hook belongs to this evaluation, not to a parameter
        value.register_hook(lambda gradient: gradient if self._factor is None else gradient / self._factor)
        return value

    def contexts(self, contexts: Sequence[Context]) -> list[Context]:
        """The same for encoded prompts."""
        return [self._context(context) for context in contexts]

    def _context(self, context: Context) -> Context:
        tokens = self.enter(context.tokens)
        return context if tokens is context.tokens else context.with_tokens(tokens)

    def leave(self, value: Tensor) -> Tensor:
        """What was predicted, in float32."""
        if self._active and value.requires_grad:
            value.register_hook(self._enlarged)
        return value

    def _enlarged(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().amax()
        self._factor = torch.where(size > 0, (-size.log2().floor()).exp2(), torch.ones_like(size))
        return gradient * self._factor
