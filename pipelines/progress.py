"""How long work reports itself and how it is cancelled.

A `Progress` is called once per step. A host's implementation may raise to cancel; no code in `pipelines/` swallows it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Progress(Protocol):
    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        """`done` of `total` steps are finished; `preview` is a clean latent [B, C, h, w] in model scale, if there is one."""


def silent(done: int, total: int, preview: Tensor | None = None) -> None:
    """Report to nobody."""
