"""Noise levels: the step grid, the Euler step and the ancestral split.

A *level* is an index into one list of sigmas, S[0] > ... > S[N]; step i goes from S[i] to S[i + 1]; the last is 0.
Everything here holds for VP models in their variance-exploding variable and for flow models (methods.md, 0.2 and 0.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ParameterError


def executed(steps: int, strength: float) -> int:
    """How many of `steps` steps run at `strength` in (0, 1]: 50 steps at 0.75 start at step 12 and run 38."""
    if steps < 1:
        raise ParameterError(f"steps is {steps}: at least 1 is needed")
    if not 0 < strength <= 1:
        raise ParameterError(f"strength is {strength}: give a number above 0 and up to 1 (1 = start from pure noise)")
    return steps - math.floor((1 - strength) * steps + 1e-9)


def leading_sigmas(table: Tensor, steps: int, strength: float = 1.0) -> Tensor:
    """DDIM's leading grid with offset 1, as Stable Diffusion was published: timesteps 981, 961, ..., 1 for 50 steps.

    Args:
        table: sigma of every training timestep, ascending [T].
        steps: steps of the full grid, at most T.
        strength: the last part of the grid to keep, in (0, 1].
    Returns: float32 [n + 1], descending, ending with 0 (methods.md, 0.3).
    """
    size = _check_table(table, steps)
    spacing = size // steps
    offset = 1 if 1 + (steps - 1) * spacing < size else 0
    index = torch.arange(steps - 1, -1, -1, device=table.device) * spacing + offset
    return _finish(table[index], steps, strength)


def even_sigmas(table: Tensor, steps: int, strength: float = 1.0) -> Tensor:
    """Evenly spaced entries from the noisiest down: the grid of flow models, which must start at their largest sigma."""
    size = _check_table(table, steps)
    index = size - 1 - torch.arange(steps, device=table.device) * size // steps
    return _finish(table[index], steps, strength)


def _check_table(table: Tensor, steps: int) -> int:
    if not 1 <= steps <= len(table):
        raise ParameterError(f"steps is {steps}: this model has {len(table)} noise levels, so give 1 to {len(table)}")
    return len(table)


def _finish(levels: Tensor, steps: int, strength: float) -> Tensor:
    kept = levels[steps - executed(steps, strength) :].float()
    return torch.cat([kept, kept.new_zeros(1)])


def check_sigmas(sigmas: Tensor, socket: str = "sigmas") -> Tensor:
    """SIGMAS as float32 [N + 1], N >= 1, strictly descending, not negative. Raises ParameterError otherwise."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        raise ParameterError(
            f"{socket} needs at least two levels in one list: connect EditKit_EditSigmas or a scheduler node"
        )
    sigmas = sigmas.float()
    if not torch.isfinite(sigmas).all() or (sigmas[1:] >= sigmas[:-1]).any() or sigmas[-1] < 0:
        raise ParameterError(f"{socket} must fall strictly and end at 0 or above; it is {_brief(sigmas)}")
    return sigmas


def _brief(sigmas: Tensor) -> str:
    values = [f"{value:.4g}" for value in sigmas.tolist()]
    return ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]])


JUST_ABOVE = 1 + 3e-5  # factor that lifts a grid sigma into the step before it, past the tolerance of `step_of_sigma`


def step_of_sigma(sigma: float, sigmas: Tensor) -> int:
    """The step i with S[i] >= sigma > S[i + 1] (a sampler may evaluate between two levels); ends are clamped."""
    levels = sigmas[:-1].tolist()
    for step in range(len(levels) - 1, -1, -1):
        if sigma <= levels[step] * (1 + 1e-5):
            return step
    return 0


def euler_step(z: Tensor, clean: Tensor, sigma: float, target: float) -> Tensor:
    """One first-order step from level `sigma` to `target`: z + (target - sigma) (z - clean) / sigma.

    Written as an interpolation, so that target 0 gives `clean` exactly. For VP models this is DDIM with eta 0.
    """
    if target == 0:
        return clean
    ratio = target / sigma
    return ratio * z + (1 - ratio) * clean


def ancestral_sigmas(sigma: float, target: float, eta: float, *, flow: bool = False) -> tuple[float, float]:
    """Split a stochastic DDIM step into a deterministic step to `down` and fresh noise of deviation `up`.

    After the step to `down`, z is rescaled by signal(target) / signal(down), then `up` x noise is added. In the ratio
    r = sigma / signal both model kinds share DDIM's formula: r_up = eta r' sqrt(1 - (r' / r)^2) (methods.md, 0.2).
    """
    if not 0 <= eta <= 1:
        raise ParameterError(f"eta is {eta}: give 0 (deterministic) to 1 (as much noise as DDPM)")
    if eta == 0 or target == 0:
        return target, 0.0
    ratio, next_ratio = _noise_ratio(sigma, flow), _noise_ratio(target, flow)
    fraction = next_ratio / ratio if math.isfinite(ratio) else 0.0
    up = min(next_ratio, eta * next_ratio * math.sqrt(max(0.0, 1 - fraction * fraction)))
    down = math.sqrt(max(0.0, next_ratio * next_ratio - up * up))
    signal = 1 - target if flow else 1.0
    return (down / (1 + down) if flow else down), up * signal


def _noise_ratio(sigma: float, flow: bool) -> float:
    if not flow:
        return sigma
    return math.inf if sigma >= 1 else sigma / (1 - sigma)
