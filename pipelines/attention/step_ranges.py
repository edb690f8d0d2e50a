"""The steps in which an attention edit applies, and the edit of one such step as two weight matrices.

Step ranges are given as fractions of the steps (tau_c, tau_s, tau_u) and rounded as in the official code of Prompt-to-Prompt
(docs/methods.md, section 7.4): self-attention counts N steps, cross-attention a table of N + 1 rows. Of 50 steps, 0.8 is 40
for both; of 30 steps, 0.97 is 30 for cross-attention and 29 for self-attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import ParameterError
from .joint import WordMix
from .prompts.prompt_edit import PromptEdit


def check_fraction(name: str, value: float) -> float:
    """A fraction of the steps as a float. Raises ParameterError outside 0 to 1."""
    if not 0 <= value <= 1:
        raise ParameterError(f"{name} is {value}: give a fraction of the steps from 0 (none) to 1 (all)")
    return float(value)


def whole(value: float) -> int:
    """Round down to a whole number of steps; 0.29 x 100, which is 28.999... in binary, gives 29."""
    return math.floor(value + 1e-9)


def step_table(edit: PromptEdit, cross_until: float, steps: int) -> Tensor:
    """The steps in which the cross-attention of each target token is edited: float32 [steps, T] in {0, 1}, on the CPU.

    Args:
        edit: its `step_ranges` replace (0, tau_c) for single tokens.
        cross_until: tau_c, a fraction of the steps.
        steps: N, the steps of the whole grid.
    """
    table = torch.zeros(steps, edit.token_count)
    for token in range(edit.token_count):
        first, last = edit.step_ranges.get(token, (0.0, cross_until))
        table[whole(first * (steps + 1)) : whole(last * (steps + 1)), token] = 1
    return table


def folded_weights(edit: PromptEdit, edited: Tensor) -> tuple[Tensor, Tensor]:
    """Fold an edit of the cross-attention maps into the values, so that no map is materialised.

    With M = mapper, a = alphas, c = equalizer and w = `edited` (one row of `step_table`), the edited map is

        A = w (c (a (A_source M) + (1 - a) A_target)) + (1 - w) A_target,    token by token,

    and A V = A_source (W1 V) + A_target (W2 V) with (docs/methods.md, section 0.6)

        W1 = M diag(a c w)    and    W2 = diag((1 - a) c w + 1 - w).

    Args:
        edit: the mapper, alphas and equalizer of T tokens.
        edited: w, float32 [T], 1 = the token is edited in this step.
    Returns: W1 [T, T] and the diagonal of W2 [T], float64 on the CPU.
    """
    w, a = edited.double(), edit.alphas.double()
    cw = edit.equalizer.double() * w
    return edit.mapper.double() * (a * cw), (1 - a) * cw + 1 - w


def word_mix(edit: PromptEdit, edited: Tensor) -> WordMix:
    """The same fold for joint attention, with what it takes from the source and leaves to the target (section 18.4).

    Args:
        edit, edited: see `folded_weights`.
    Returns: float64 on the CPU.
    """
    w1, w2 = folded_weights(edit, edited)
    taken = edit.alphas.double() * edited.double()
    return WordMix(w1, w2, 1 - edit.mapper.double() @ taken, 1 - taken)
