"""Inversion of flow models by the literature's solvers, and sampling back with them (docs/methods.md, section 18.2).

    Euler         the sampler's own step, evaluated at the cleaner end
    implicit      the exact inverse of the Euler sampler, by fixed-point iteration (`ddim.py`)
    RF-Inversion  a controlled ODE towards given noise, and back towards the source (Rout et al. 2024)
    RF-Solver     second order by a Taylor term (Wang et al. 2024): two model calls a step
    FireFlow      second order with the midpoint's velocity of the step before (Deng et al. 2024): one model call a step

z_sigma = (1 - sigma) x + sigma noise and v = dz/dsigma = (z - denoised) / sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.errors import FamilyError, ParameterError, ShapeError
from ..core.guidance import EditPrompts
from ..core.noise import seeded_noise
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.samplers import Predict, predictor
from ..core.shapes import check_latent
from ..core.sigmas import check_sigmas, executed_steps
from ..core.trajectory import Trajectory, made_trajectory
from .ddim import InversionOptions, invert

EULER = "Euler"
IMPLICIT = "implicit"
RF_INVERSION = "RF-Inversion"
RF_SOLVER = "RF-Solver"
FIREFLOW = "FireFlow"
SOLVERS = (EULER, IMPLICIT, RF_INVERSION, RF_SOLVER, FIREFLOW)
SMALLEST = 1e-3  # the sigma at which the velocity of the clean latent is evaluated: a prediction at 0 says nothing

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class FlowInversionOptions:
    """How to invert a flow model.

    Attributes:
        solver: one of SOLVERS.
        gamma: RF-Inversion: share of the velocity towards the given noise, 0 (plain Euler) to 1; 0.5 as published.
        iterations: implicit: most model calls per step, >= 1.
        tolerance: implicit: an image has converged when its iterate moves less than this, relative to its norm.
    """

    solver: str = IMPLICIT
    gamma: float = 0.5
    iterations: int = 5
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_solver(self.solver)
        if not 0 <= self.gamma <= 1:
            raise ParameterError(f"gamma is {self.gamma}: give 0 (plain inversion) to 1 (the given noise)")


@dataclass(frozen=True)
class SourceGuidance:
    """RF-Inversion's controller on the way back: the prediction is drawn to the source.

    Attributes:
        eta: share of the source in the prediction, 0 to 1; 0.9 as published.
        start, stop: fractions of the steps between which it acts; 0 to 0.25 as published for edits that keep the layout.
    """

    eta: float = 0.9
    start: float = 0.0
    stop: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ParameterError(f"eta is {self.eta}: give 0 (no guidance) to 1 (the source)")
        if not 0 <= self.start <= self.stop <= 1:
            raise ParameterError(f"start is {self.start} and stop is {self.stop}: give 0 <= start <= stop <= 1")

    def share(self, step: int, steps: int) -> float:
        """The share of the source in the prediction of a step."""
        return self.eta if self.start * steps <= step < self.stop * steps else 0.0


def check_solver(solver: str) -> None:
    """Raises ParameterError for a name that is not in SOLVERS."""
    if solver not in SOLVERS:
        raise ParameterError(f"solver is {solver!r}: choose one of {', '.join(SOLVERS)}")


@torch.no_grad()
def invert_flow(
    denoiser: Denoiser,
    latent: Tensor,
    context: Context,
    sigmas: Tensor,
    *,
    options: FlowInversionOptions | None = None,
    ratio: float = 1.0,
    seeds: Sequence[int] = (),
    progress: Progress = silent,
) -> Trajectory:
    """Invert a clean latent with a flow model at guidance 1.

    Args:
        denoiser: a flow model.
        latent: clean latent, unscaled, [B, C, h, w].
        context: inversion prompt; RF-Inversion is published with the empty prompt.
        sigmas: the whole grid [N + 1], falling to 0.
        options: how to invert.
        ratio: encoding ratio in (0, 1]: fraction of the steps to invert, counted from the clean end.
        seeds: RF-Inversion: one per image, of the noise that the latent is drawn to.
        progress: called after every step.
    Returns: the trajectory from the end of the grid to its start, source included.
    Raises: ShapeError, ParameterError, FamilyError for a model that is not a flow model.
    Source: see the module.
    """
    options = options or FlowInversionOptions()
    if not denoiser.flow:
        raise FamilyError(f"this is no flow model ({denoiser.family!r}): use 'DDIM Inversion' for eps and v models")
    sigmas = check_sigmas(sigmas)
    if options.solver in (EULER, IMPLICIT):
        mode = "current" if options.solver == EULER else "implicit"
        own = InversionOptions(mode, iterations=options.iterations, tolerance=options.tolerance)
        return invert(denoiser, latent, context, sigmas, options=own, ratio=ratio, progress=progress)
    z = denoiser.scale_in(check_latent(latent, "latent", denoiser.channels))
    velocity = velocity_of(predictor(denoiser, EditPrompts(context, None, 1.0)))
    if options.solver == RF_INVERSION:
        velocity = _controlled(velocity, _target_noise(z, seeds), options.gamma)
    count = executed_steps(len(sigmas) - 1, ratio)
    rising = sigmas.flip(0).tolist()[: count + 1]
    latents = [z]
    step = solver_step(options.solver, velocity)
    for i, (low, high) in enumerate(pairwise(rising)):
        latents.append(step(latents[-1], low, high))
        progress(i + 1, count, latents[-1])
    return made_trajectory(denoiser, latent, latents, sigmas, context)


def _target_noise(z: Tensor, seeds: Sequence[int]) -> Tensor:
    if len(seeds) != len(z):
        raise ShapeError(f"there are {len(seeds)} seeds but {len(z)} images: RF-Inversion needs one seed per image")
    return seeded_noise(z.shape[1:], seeds, z.device)


def _controlled(velocity: Velocity, noise: Tensor, gamma: float) -> Velocity:
    """v + gamma (v_1 - v) with v_1 = (noise - z) / (1 - sigma) (Rout et al. 2024, equation 8)."""

    def controlled(z: Tensor, sigma: float) -> Tensor:
        return torch.lerp(velocity(z, sigma), (noise - z) / (1 - sigma), gamma)

    return controlled


def velocity_of(predict: Predict) -> Velocity:
    """dz/dsigma of a prediction. At sigma 0 the prediction at SMALLEST stands for it."""

    def velocity(z: Tensor, sigma: float) -> Tensor:
        at = max(sigma, SMALLEST)
        return (z - predict(z, at)) / at

    return velocity


def solver_step(solver: str, velocity: Velocity) -> Callable[[Tensor, float, float], Tensor]:
    """One step of a solver, up or down, as a function of the latent and the sigmas of its two ends.

    Args:
        solver: EULER, RF_INVERSION (Euler on a controlled velocity), RF_SOLVER or FIREFLOW; one that remembers the step
            before serves one run.
        velocity: dz/dsigma.
    """
    if solver == RF_SOLVER:
        return _Taylor(velocity)
    return _ReusedMidpoint(velocity) if solver == FIREFLOW else _Euler(velocity)


@dataclass
class _Euler:
    velocity: Velocity

    def __call__(self, z: Tensor, sigma: float, target: float) -> Tensor:
        return z + (target - sigma) * self.velocity(z, sigma)


@dataclass
class _Taylor:
    """z + h v + h^2 / 2 v', with v' from a step to the middle (Wang et al. 2024, algorithm 1)."""

    velocity: Velocity

    def __call__(self, z: Tensor, sigma: float, target: float) -> Tensor:
        h = target - sigma
        v = self.velocity(z, sigma)
        rate = (self.velocity(z + h / 2 * v, sigma + h / 2) - v) / (h / 2)
        return z + h * v + h * h / 2 * rate


@dataclass
class _ReusedMidpoint:
    """The midpoint rule whose first half step takes the velocity of the last midpoint (Deng et al. 2024, algorithm 1)."""

    velocity: Velocity
    last: Tensor | None = None

    def __call__(self, z: Tensor, sigma: float, target: float) -> Tensor:
        h = target - sigma
        start = self.velocity(z, sigma) if self.last is None else self.last
        self.last = self.velocity(z + h / 2 * start, sigma + h / 2)
        return z + h * self.last


@torch.no_grad()
def sample_inverted(
    denoiser: Denoiser,
    trajectory: Trajectory,
    prompts: EditPrompts,
    *,
    solver: str = EULER,
    guidance: SourceGuidance | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Sample from the noisiest latent of an inversion under the prompts of an edit.

    Args:
        denoiser: the model that inverted.
        trajectory: of `invert_flow` or `ddim.invert`.
        prompts: positive, negative and guidance scale of the edit.
        solver: one of SOLVERS; "implicit" and "RF-Inversion" sample by Euler steps.
        guidance: RF-Inversion's guidance to the source; None = none.
        progress: called after every step.
    Returns: edited latent, unscaled, [B, C, h, w].
    Raises: ParameterError, MismatchError for another model.
    Source: Rout et al. 2024, algorithm 2; Wang et al. 2024; Deng et al. 2024.
    """
    check_solver(solver)
    trajectory.check(denoiser)
    grid = trajectory.sigmas[trajectory.first :].tolist()
    prompts.check(denoiser, trajectory.sigmas[trajectory.first :])
    predict = predictor(denoiser, prompts)
    steps = len(grid) - 1
    z = trajectory.latents[0]
    share = [0.0 if guidance is None else guidance.share(i, steps) for i in range(steps)]
    current = 0

    def guided_to_source(z: Tensor, sigma: float) -> Tensor:
        # v + eta (v_0 - v) with v_0 = (z - x_0) / sigma is the velocity of this mean of predictions
        return torch.lerp(predict(z, sigma), trajectory.source.to(z), share[current])

    step = solver_step(solver, velocity_of(guided_to_source if any(share) else predict))
    for i, (sigma, target) in enumerate(pairwise(grid)):
        current = i
        z = step(z, sigma, target)
        progress(i + 1, steps, z)
    return denoiser.scale_out(z)
