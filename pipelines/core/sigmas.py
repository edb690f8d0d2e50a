"""Sigma grids, the Euler step, and the deterministic and stochastic parts of an ancestral step.

A grid is S[0] > ... > S[N]; step i goes from S[i] to S[i + 1], and the last sigma is usually 0. Everything here holds for
VP models in their variance-exploding variable and for flow models (docs/methods.md, sections 0.2 and 0.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ParameterError

SIGMA_TOLERANCE = 1e-5  # relative; a sampler may pass a sigma on in another precision
ENDS = ("0 (denoised)", "first training sigma")
ROUNDINGS = ("up", "down")
SPACINGS = ("leading", "trailing", "linspace")  # of a grid's timesteps, by diffusers' names
JUST_ABOVE = 1 + 3e-5  # sigma * JUST_ABOVE belongs to the step that ended at sigma, beyond the tolerance


def executed_steps(steps: int, strength: float) -> int:
    """How many of `steps` steps run at `strength` in (0, 1]: of 50 steps at 0.75, the last 38."""
    if steps < 1:
        raise ParameterError(f"steps is {steps}: at least 1 is needed")
    if not 0 < strength <= 1:
        raise ParameterError(f"strength is {strength}: give a number above 0 and up to 1 (1 = start from pure noise)")
    return steps - math.floor((1 - strength) * steps + 1e-9)


def leading_sigmas(table: Tensor, steps: int, strength: float = 1.0) -> Tensor:
    """DDIM's leading grid with offset 1, as Stable Diffusion was published: timesteps 981, 961, ..., 1 for 50 steps.

    The spacing is rounded down. Above T / 10 steps that can leave a large share of the noisiest timesteps out (of 501
    steps the half); such grids are spaced evenly from the last timestep down (`even_sigmas`).

    Args:
        table: sigma of every training timestep, ascending [T].
        steps: steps of the full grid, at most T.
        strength: fraction of the steps to keep, the last ones, in (0, 1].
    Returns: float32 [n + 1], descending, ending with 0 (docs/methods.md, section 0.3).
    """
    size = _check_table(table, steps)
    spacing = size // steps
    left_out = size - steps * spacing
    if steps > size // 10 and left_out >= max(2, spacing):
        return even_sigmas(table, steps, strength)
    offset = 1 if 1 + (steps - 1) * spacing < size else 0
    index = torch.arange(steps - 1, -1, -1, device=table.device) * spacing + offset
    return _last_steps(table[index], steps, strength)


@dataclass(frozen=True)
class PublishedGrid:
    """Choices in which published scripts and `leading_sigmas` differ (docs/methods.md, section 0.3).

    Attributes:
        offset: of the timesteps: 1 (981 ... 1 of 50 steps), or 0 (980 ... 0, the SD2 script of BLD).
        end: the last sigma: 0, or that of the first training timestep (`set_alpha_to_one=False`, every script here).
        rounding: of steps x strength: "up", or "down" as diffusers counts.
    """

    offset: int = 1
    end: str = ENDS[0]
    rounding: str = ROUNDINGS[0]

    def __post_init__(self) -> None:
        if self.offset not in (0, 1) or self.end not in ENDS or self.rounding not in ROUNDINGS:
            raise ParameterError(
                f"offset is {self.offset}, end is {self.end!r} and rounding is {self.rounding!r}: give 0 or 1, one of "
                f"{', '.join(ENDS)} and one of {', '.join(ROUNDINGS)}"
            )

    def sigmas(self, table: Tensor, steps: int, strength: float = 1.0) -> Tensor:
        """The grid.

        Args:
            table: sigma of every training timestep, ascending [T].
            steps: steps of the full grid, at most T.
            strength: fraction of the steps to keep, the last ones, in (0, 1].
        Returns: float32 [n + 1], descending. Offset 0 and the end at the first training sigma leave out the last step of
            the script, which goes from that sigma to itself and changes nothing.
        Raises: ParameterError.
        """
        count = executed_steps(steps, strength)
        if self.rounding == "down":
            count = int(steps * strength)
            if count < 1:
                raise ParameterError(f"strength is {strength}: of {steps} steps none is left; give a higher strength")
        full = leading_sigmas(table, steps)
        if self.offset == 0:
            spacing = len(table) // steps
            full = torch.cat([table[torch.arange(steps - 1, -1, -1, device=table.device) * spacing].float(), full[-1:]])
        kept = full[steps - count :]
        if self.end == ENDS[0]:
            return kept
        return check_sigmas(torch.cat([kept[kept > table[0]], table[:1].float()]))


def even_sigmas(table: Tensor, steps: int, strength: float = 1.0) -> Tensor:
    """Evenly spaced entries of `table` from the largest down: the grid of flow models, which start at pure noise.

    Arguments and result as in `leading_sigmas`.
    """
    size = _check_table(table, steps)
    index = size - 1 - torch.arange(steps, device=table.device) * size // steps
    return _last_steps(table[index], steps, strength)


def shifted_sigmas(shift: float, count: int = 1000) -> Tensor:
    """The table of a flow model: even times t = 1 / count, ..., 1 shifted to s t / (1 + (s - 1) t), ascending float32 [count].

    Args:
        shift: s, above 0; 1 = even, above 1 = more of the run at high noise (Esser et al. 2024, equation 23).
        count: number of sigmas, at least 1.
    Raises: ParameterError.
    """
    if not shift > 0 or count < 1:
        raise ParameterError(f"shift is {shift} and count is {count}: give a shift above 0 and at least one sigma")
    times = torch.arange(1, count + 1) / count
    return shift * times / (1 + (shift - 1) * times)


def spaced_sigmas(table: Tensor, steps: int, strength: float = 1.0, spacing: str = "leading") -> Tensor:
    """The grid whose timesteps are spaced as diffusers' DDIM scheduler does by the setting `spacing`.

    Args:
        table: sigma of every training timestep, ascending [T].
        steps: steps of the full grid, at most T.
        strength: fraction of the steps to keep, the last ones, in (0, 1].
        spacing: "leading" is `leading_sigmas`; "trailing" starts at the last timestep; "linspace" also ends at the first.
    Returns: float32 [n + 1], descending, ending with 0.
    Raises: ParameterError.
    """
    if spacing == "leading":
        return leading_sigmas(table, steps, strength)
    size = _check_table(table, steps)
    if spacing == "trailing":
        index = torch.arange(steps, 0, -1, dtype=torch.float64).mul(size).div(steps).round().long() - 1
    elif spacing == "linspace":
        index = torch.linspace(0, size - 1, steps, dtype=torch.float64).round().long().flip(0)
    else:
        raise ParameterError(f"timestep spacing is {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return _last_steps(table[index.to(table.device)], steps, strength)


def _check_table(table: Tensor, steps: int) -> int:
    if not 1 <= steps <= len(table):
        raise ParameterError(f"steps is {steps}: this model has {len(table)} sigmas, so give 1 to {len(table)}")
    return len(table)


def _last_steps(sigmas: Tensor, steps: int, strength: float) -> Tensor:
    kept = sigmas[steps - executed_steps(steps, strength) :].float()
    return torch.cat([kept, kept.new_zeros(1)])


def check_sigmas(sigmas: Tensor, socket: str = "sigmas") -> Tensor:
    """SIGMAS as float32 [N + 1], N >= 1, strictly descending, not negative. Raises ParameterError otherwise."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        raise ParameterError(
            f"{socket} needs at least two sigmas in one list: connect EditKit_EditSigmas or a scheduler node"
        )
    sigmas = sigmas.float()
    if not torch.isfinite(sigmas).all() or (sigmas[1:] >= sigmas[:-1]).any() or sigmas[-1] < 0:
        raise ParameterError(f"{socket} must fall strictly and end at 0 or above; it is {_brief(sigmas)}")
    return sigmas


def _brief(sigmas: Tensor) -> str:
    values = [f"{value:.4g}" for value in sigmas.tolist()]
    return ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]])


def step_of_sigma(sigma: float, sigmas: Tensor) -> int:
    """The step i with S[i] >= sigma > S[i + 1], within SIGMA_TOLERANCE; sigmas outside the grid belong to its ends.

    A sampler may evaluate the model between two sigmas of the grid.
    """
    starts = sigmas[:-1].tolist()
    for step in range(len(starts) - 1, -1, -1):
        if sigma <= starts[step] * (1 + SIGMA_TOLERANCE):
            return step
    return 0


def euler_step(z: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """One first-order step from `sigma` to `target`: z + (target - sigma) (z - denoised) / sigma.

    It is written as an interpolation, so that target 0 gives `denoised` exactly. For VP models this is DDIM with eta 0
    (docs/methods.md, section 0.2).

    Args:
        z: the latent [B, C, h, w] at `sigma`, model scale.
        denoised: the prediction of the noise-free latent, [B, C, h, w].
        sigma: above 0.
        target: the sigma to step to; above `sigma` when inverting.
    Returns: the latent [B, C, h, w] at `target`.
    """
    if target == 0:
        return denoised
    ratio = target / sigma
    return ratio * z + (1 - ratio) * denoised


def ancestral_sigmas(sigma: float, target: float, eta: float, *, flow: bool = False) -> tuple[float, float]:
    """Split a stochastic DDIM step into a deterministic step to `down` and fresh noise of deviation `up`.

    After the step to `down`, z is rescaled by signal(target) / signal(down), then `up` x noise is added. In the ratio
    r = sigma / signal both kinds of model share DDIM's formula, r_up = eta r' sqrt(1 - (r' / r)^2) (Song et al. 2021,
    equation 16; docs/methods.md, section 0.2).

    Args:
        sigma, target: where the step starts and ends.
        eta: 0 (deterministic) to 1 (as much noise as DDPM).
        flow: True for flow models, whose signal is 1 - sigma; otherwise the signal is 1.
    Returns: (down, up).
    Raises: ParameterError.
    """
    if not 0 <= eta <= 1:
        raise ParameterError(f"eta is {eta}: give 0 (deterministic) to 1 (as much noise as DDPM)")
    if eta == 0 or target == 0:
        return target, 0.0
    ratio = _noise_ratio(sigma, flow)
    next_ratio = _noise_ratio(target, flow)
    fraction = next_ratio / ratio if math.isfinite(ratio) else 0.0
    up = min(next_ratio, eta * next_ratio * math.sqrt(max(0.0, 1 - fraction * fraction)))
    down = math.sqrt(max(0.0, next_ratio * next_ratio - up * up))
    signal = 1 - target if flow else 1.0
    return (down / (1 + down) if flow else down), up * signal


def _noise_ratio(sigma: float, flow: bool) -> float:
    """Noise over signal at `sigma`."""
    if not flow:
        return sigma
    return math.inf if sigma >= 1 else sigma / (1 - sigma)
