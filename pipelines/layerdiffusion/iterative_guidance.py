"""LayerDiffusion's sampling: iterative guidance (Li et al. 2023, equation 8; docs/methods.md, section 10).

I_{t-1} = D(I_t | e_a)     for even t, the object's embedding alone
I_{t-1} = D(I_t | e_opt)   for odd t, the mix of object and background
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.protocols import Context, Denoiser
from ..core.sigmas import SIGMA_TOLERANCE, step_of_sigma
from ..core.trajectory import check_grid


def takes_object(step: int, steps: int, phase: int = 0) -> bool:
    """Whether a step follows the object's embedding alone (equation 8).

    Args:
        step: index of the step, from 0.
        steps: number of steps; t counts down from `steps` to 1, so 50 steps begin with the object and end with the mix.
        phase: 0 as published; 1 swaps the two conditions.
    """
    return (steps - step + phase) % 2 == 0


@dataclass(frozen=True)
class IterativeGuidance:
    """Positive prompts that alternate from step to step (a `guidance.Positive`).

    Attributes:
        object: the object's embedding e_a, [1 or B, T, D].
        mixed: the mix e_opt, [1 or B, T, D].
        sigmas: the grid on which steps are counted, [N + 1]; its last steps count the same, because t counts down.
        phase: 0 as published; 1 swaps the two.
    """

    object: Context
    mixed: Context
    sigmas: Tensor
    phase: int = 0

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """See `guidance.Positive`; the prompts suit any model of their text encoder."""
        self.check_sigmas(sigmas)

    def check_sigmas(self, sigmas: Tensor) -> None:
        """Raises MismatchError unless `sigmas` is the grid, or consecutive sigmas of it."""
        if len(sigmas) > 1:
            until_last = self.sigmas >= float(sigmas[-1]) * (1 - SIGMA_TOLERANCE)
            check_grid(self.sigmas[until_last], sigmas, "the alternating guider")

    def at_sigma(self, sigma: float) -> Context:
        """The prompt of the step that contains `sigma`. All evaluations of a multi-evaluation sampler's step share it."""
        step = step_of_sigma(float(sigma), self.sigmas)
        return self.object if takes_object(step, len(self.sigmas) - 1, self.phase) else self.mixed
