"""When an edit of the attention is in force: parts of the run as steps, with the published rounding (methods.md, 7.4).

Prompt-to-Prompt counts cross-attention on a table with one row more than there are steps, and self-attention on the steps
themselves: of 50 steps, 0.8 is 40 for either, but of 30 steps 0.3 is 9 and 0.97 is 30 for cross-attention and 29 for self.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import ParameterError
from .prompts.prompt_edit import PromptEdit


def check_fraction(name: str, value: float) -> float:
    """A part of the run as a float. Raises ParameterError outside 0 to 1."""
    if not 0 <= value <= 1:
        raise ParameterError(f"{name} is {value}: give a part of the run from 0 (never) to 1 (all of it)")
    return float(value)


def whole(value: float) -> int:
    """Rounded down, but 0.29 x 100 is 29."""
    return math.floor(value + 1e-9)


def step_table(edit: PromptEdit, cross_until: float, steps: int) -> Tensor:
    """Whether the cross-attention of a target token is edited at a step: float32 [steps, T] in {0, 1}, on the CPU."""
    table = torch.zeros(steps, edit.token_count)
    for token in range(edit.token_count):
        first, last = edit.windows.get(token, (0.0, cross_until))
        table[whole(first * (steps + 1)) : whole(last * (steps + 1)), token] = 1
    return table


def folded_weights(edit: PromptEdit, gate: Tensor) -> tuple[Tensor, Tensor]:
    """What the target's values are multiplied with, so that two plain attentions give the edited one (methods.md, 0.6).

    With M = mapper, a = edit.gate, c = edit.scale and w = `gate` [T], the edited map is
    w (a c (A_source M) + (1 - a) c A_target) + (1 - w) A_target, column by column; so
    out = A_source (W1 V) + A_target (W2 V) with W1 = M diag(a c w) and W2 = diag((1 - a) c w + 1 - w).

    Returns: W1 [T, T] and the diagonal of W2 [T], float64 on the CPU.
    """
    gate, own = gate.double(), edit.gate.double()
    strength = edit.scale.double() * gate
    return edit.mapper.double() * (own * strength), (1 - own) * strength + 1 - gate
