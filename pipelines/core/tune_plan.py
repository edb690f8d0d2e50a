"""Which weights of a network learn when a copy of it is tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import ParameterError

KINDS = ("full", "lora")


@dataclass(frozen=True)
class TunePlan:
    """Which weights of a network learn.

    Attributes:
        kind: "full", every weight and bias; "lora", low-rank additions to the attention projections (LoRA).
        rank: of the additions, >= 1.
        seed: of the initial `down` matrices; `up` starts at 0, so the additions start at 0.
        compute_dtype: of the arithmetic: None = float32; torch.bfloat16 halves memory. The learned weights are float32 in
            both cases.
    """

    kind: str = "full"
    rank: int = 16
    seed: int = 0
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ParameterError(f"kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.rank < 1:
            raise ParameterError(f"rank is {self.rank}: give 1 or more (16 is usual)")
        if self.compute_dtype not in (None, torch.bfloat16):
            raise ParameterError(
                f"precision is {self.compute_dtype}, in which small gradients underflow to 0: choose bfloat16 or float32"
            )

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The type of the copy's weights."""
        return torch.float32 if self.compute_dtype is None or self.kind == "full" else self.compute_dtype

    @property
    def autocast(self) -> torch.dtype | None:
        """The type for `optimise.autocast`: a full fine-tune keeps float32 weights and may compute in bfloat16."""
        return self.compute_dtype if self.kind == "full" else None
