"""Laws of flow inversion's solvers and of FlowEdit, on closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit.pipelines.core.errors import FamilyError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.noise import seeded_noise
from editkit.pipelines.inversion.flow import (
    EULER,
    FIREFLOW,
    IMPLICIT,
    RF_INVERSION,
    RF_SOLVER,
    SOLVERS,
    FlowInversionOptions,
    SourceGuidance,
    invert_flow,
    sample_inverted,
    solver_step,
    velocity_of,
)
from editkit.pipelines.inversion.flow_edit import FlowEditOptions, flow_edit

from ..toys import ToyDenoiser, linear, pointwise, prompt, random_latent

S = 0.5  # deviation of the data of `gaussian_flow`
X = random_latent(2, 4, 3, 3)
PLAIN = EditPrompts(prompt(), None, 1.0)


def gaussian_flow(z: Tensor, sigma: float, value: float) -> Tensor:
    """The exact prediction for data N(value, S^2): deviation S around the value."""
    spread = ((1 - sigma) * S) ** 2 + sigma**2
    return value + (1 - sigma) * S**2 * (z - (1 - sigma) * value) / spread


def exponential(z: Tensor, sigma: float) -> Tensor:
    """A velocity field whose solutions are z = x exp(sin sigma)."""
    return math.cos(sigma) * z


def exact(x: Tensor, sigma: float) -> Tensor:
    return x * math.exp(math.sin(sigma))


def by_value(z: Tensor, sigma: float, value: float) -> Tensor:
    """A model whose data is one point, which the prompt names."""
    return torch.full_like(z, value)


# ---------------------------------------------------------------------------------------------------------- the solvers
@pytest.mark.parametrize(("solver", "order"), [(EULER, 1), (RF_SOLVER, 2), (FIREFLOW, 2)])
@pytest.mark.parametrize("up", [True, False])
def test_the_order_of_convergence(solver, order, up) -> None:
    errors = []
    for steps in (16, 32, 64):
        grid = torch.linspace(0.05, 0.95, steps + 1, dtype=torch.float64).tolist()
        grid = grid if up else grid[::-1]
        step = solver_step(solver, velocity_of(lambda z, sigma: z - sigma * exponential(z, sigma)))
        z = exact(X.double(), grid[0])
        for sigma, target in zip(grid[:-1], grid[1:], strict=True):
            z = step(z, sigma, target)
        errors.append(float((z - exact(X.double(), grid[-1])).abs().max()))
    rates = [errors[0] / errors[1], errors[1] / errors[2]]
    assert all(2**order * 0.8 < rate < 2**order * 1.3 for rate in rates), (errors, rates)


@pytest.mark.parametrize(("solver", "calls"), [(EULER, 10), (RF_INVERSION, 10), (RF_SOLVER, 20), (FIREFLOW, 11)])
def test_model_calls_of_an_inversion(solver, calls) -> None:
    model = ToyDenoiser(gaussian_flow, flow=True)
    invert_flow(model, X, prompt(), model.schedule(10), options=FlowInversionOptions(solver), seeds=[1, 2])
    assert model.calls == calls
    assert model.forward_passes == calls * len(X)


@pytest.mark.parametrize("solver", [EULER, IMPLICIT, RF_SOLVER, FIREFLOW])
def test_there_and_back(solver) -> None:
    """The better the solver, the nearer the source: the published order, implicit exact."""
    model = ToyDenoiser(gaussian_flow, flow=True)
    options = FlowInversionOptions(solver, iterations=100, tolerance=1e-7)
    trajectory = invert_flow(model, X, prompt(), model.schedule(20), options=options)
    back = sample_inverted(model, trajectory, PLAIN, solver=solver)
    limit = {EULER: 0.5, IMPLICIT: 1e-5, RF_SOLVER: 0.02, FIREFLOW: 0.04}[solver]
    error = float((back - X).abs().max())
    assert error < limit
    if solver in (RF_SOLVER, FIREFLOW):
        plain = sample_inverted(
            model, invert_flow(model, X, prompt(), model.schedule(20), options=FlowInversionOptions(EULER)), PLAIN
        )
        assert error < 0.3 * float((plain - X).abs().max())


def test_full_control_leads_to_the_noise_of_the_seed_and_none_is_euler() -> None:
    model, sigmas = ToyDenoiser(gaussian_flow, flow=True), ToyDenoiser(gaussian_flow, flow=True).schedule(10)
    made = {
        gamma: invert_flow(
            model, X, prompt(), sigmas, options=FlowInversionOptions(RF_INVERSION, gamma=gamma), seeds=[3, 4]
        )
        for gamma in (0.0, 0.5, 1.0)
    }
    noise = seeded_noise(X.shape[1:], [3, 4])
    assert torch.allclose(made[1.0].latents[0], noise, atol=1e-5)
    euler_step_at_start = velocity_of(lambda z, sigma: model.rule(z, sigma, 0.0))(X, 0.0)
    assert torch.allclose(made[0.0].latents[-2], X + float(sigmas[-2]) * euler_step_at_start, atol=1e-6)
    between = (made[0.5].latents[0] - noise).norm()
    assert between < (made[0.0].latents[0] - noise).norm()


def test_full_guidance_returns_the_source_and_acts_in_its_steps_only() -> None:
    model = ToyDenoiser(by_value, flow=True)
    trajectory = invert_flow(model, X, prompt(0.3), model.schedule(8), options=FlowInversionOptions(EULER))
    held = sample_inverted(model, trajectory, EditPrompts(prompt(1.0), None, 1.0), guidance=SourceGuidance(1.0, 0, 1))
    assert torch.allclose(held, X, atol=1e-6)
    free = sample_inverted(model, trajectory, EditPrompts(prompt(1.0), None, 1.0), guidance=SourceGuidance(1.0, 0, 0.5))
    assert torch.allclose(free, torch.ones_like(X), atol=1e-6)
    assert [SourceGuidance(0.9, 0.25, 0.75).share(i, 4) for i in range(4)] == [0.0, 0.9, 0.9, 0.0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_image_depends_on_its_batch(solver) -> None:
    model, options = ToyDenoiser(pointwise(), flow=True), FlowInversionOptions(solver)
    sigmas = model.schedule(6)
    both = invert_flow(model, X, prompt(), sigmas, options=options, seeds=[1, 2])
    for i in range(2):
        one = invert_flow(model, X[i : i + 1], prompt(), sigmas, options=options, seeds=[i + 1])
        assert torch.equal(one.latents[:, 0], both.latents[:, i])


def test_what_cannot_be_inverted_is_refused() -> None:
    vp, flow = ToyDenoiser(linear(0.5)), ToyDenoiser(linear(0.5), flow=True)
    with pytest.raises(FamilyError, match="DDIM Inversion"):
        invert_flow(vp, X, prompt(), vp.schedule(5))
    with pytest.raises(ShapeError, match="seeds"):
        invert_flow(flow, X, prompt(), flow.schedule(5), options=FlowInversionOptions(RF_INVERSION))
    for wrong in ({"solver": "Heun"}, {"gamma": 1.5}):
        with pytest.raises(ParameterError):
            FlowInversionOptions(**wrong)
    for wrong in ({"eta": 2.0}, {"start": 0.5, "stop": 0.2}):
        with pytest.raises(ParameterError):
            SourceGuidance(**wrong)


# -------------------------------------------------------------------------------------------------------------- FlowEdit
def edit(model: ToyDenoiser, target: float = 1.0, scale: float = 1.0, x: Tensor = X, **more: Any) -> Tensor:
    """FlowEdit from prompt 0.2 to `target` in 10 steps."""
    seeds = more.pop("seeds", [5, 6])
    options = FlowEditOptions(**{"n_max": 10, **more.pop("options", {})})
    source, new = EditPrompts(prompt(0.2), prompt(0.0), scale), EditPrompts(prompt(target), prompt(0.0), scale)
    return flow_edit(model, x, source, new, model.schedule(10), seeds=seeds, options=options, **more)


@pytest.mark.parametrize("flow", [True, False])
def test_equal_prompts_return_the_source(flow) -> None:
    model = ToyDenoiser(pointwise(), flow=flow)
    assert torch.equal(edit(model, 0.2, 4.0), X)
    assert torch.equal(edit(model, 0.2, options={"n_avg": 3}), X)


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_data_of_one_point_moves_by_the_difference_of_the_points(flow, scale) -> None:
    made = edit(ToyDenoiser(by_value, flow=flow), 1.0, scale)
    assert torch.allclose(made, X + scale * 0.8, atol=1e-5)


@pytest.mark.parametrize("flow", [True, False])
def test_fewer_steps_stay_closer_to_the_source(flow) -> None:
    rule = (lambda z, sigma, value: z / (1 + sigma) + value * min(1.0, sigma)) if flow else linear(0.1)
    model = ToyDenoiser(rule if flow else (lambda z, sigma, value: z / (1 + sigma * sigma) + value * sigma), flow=flow)
    moved = [float((edit(model, options={"n_max": n}) - X).norm()) for n in (2, 5, 10)]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_forward_passes_of_an_edit() -> None:
    for options, scale, passes in (
        ({}, 1.0, 20),
        ({}, 3.0, 40),
        ({"n_avg": 2, "n_max": 4}, 3.0, 32),
        ({"n_min": 4}, 1.0, 16),
    ):
        model = ToyDenoiser(pointwise(), flow=True)
        edit(model, scale=scale, options=options)
        assert model.forward_passes == passes * len(X), options


def test_only_the_masked_part_changes_and_the_rest_keeps_its_bits() -> None:
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., :2] = 1
    for options in ({}, {"n_min": 3}):
        made = edit(ToyDenoiser(by_value, flow=True, scale=0.7), masks=constant_schedule(mask), options=options)
        assert torch.equal(made[..., 2], X[..., 2])
        assert (made[..., :2] - X[..., :2]).abs().mean() > 0.1


def test_noise_belongs_to_image_step_and_number() -> None:
    model = ToyDenoiser(lambda z, sigma, value: torch.tanh(z) * (1 + value), flow=True)
    both = edit(model, options={"n_avg": 2})
    for i in range(2):
        assert torch.equal(edit(model, x=X[i : i + 1], seeds=[5 + i], options={"n_avg": 2}), both[i : i + 1])
    assert not torch.allclose(edit(model, seeds=[7, 8], options={"n_avg": 2}), both, atol=1e-4)
    spread = [
        torch.stack([edit(model, seeds=[s, s + 1], options={"n_avg": n}) for s in range(0, 40, 2)]).std(0).mean()
        for n in (1, 8)
    ]
    assert spread[1] < 0.6 * spread[0], "an average over more noises varies less"


def test_the_last_steps_sample_the_target_alone() -> None:
    made = edit(ToyDenoiser(by_value, flow=True), options={"n_max": 10, "n_min": 10})
    assert torch.allclose(made, torch.ones_like(X), atol=1e-6)


def test_what_cannot_be_edited_is_refused() -> None:
    model = ToyDenoiser(pointwise(), flow=True)
    for wrong in ({"n_max": 0}, {"n_max": 3, "n_min": 4}, {"n_avg": 0}):
        with pytest.raises(ParameterError):
            FlowEditOptions(**wrong)
    with pytest.raises(ShapeError, match="seeds"):
        edit(model, seeds=[1])
    with pytest.raises(ParameterError, match="end at 0"):
        flow_edit(model, X, PLAIN, PLAIN, torch.tensor([1.0, 0.5]), seeds=[1, 2])
