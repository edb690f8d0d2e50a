"""Noise levels: the published grids, the Euler step and the ancestral split (T1, T2, T3, T5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.sigmas import (
    ancestral_sigmas,
    check_sigmas,
    euler_step,
    even_sigmas,
    executed_steps,
    leading_sigmas,
    step_of_sigma,
)
from editkit.tests.toys import sd_table


def test_table_has_the_values_of_stable_diffusion():
    table = sd_table()
    for index, value in {0: 0.0292, 1: 0.0413, 20: 0.138, 740: 3.93, 980: 13.04, 981: 13.12, 999: 14.61}.items():
        assert table[index].item() == pytest.approx(value, rel=4e-3)


def test_leading_grid_is_the_published_one():
    table = sd_table()
    sigmas = leading_sigmas(table, 50)
    assert len(sigmas) == 51 and sigmas[-1] == 0
    assert torch.equal(sigmas[:-1], table[torch.arange(981, 0, -20)])
    assert torch.equal(leading_sigmas(table, 30)[:-1], table[torch.arange(958, 0, -33)])


@pytest.mark.parametrize("steps", [334, 450, 499, 501, 750, 998, 999, 101, 150, 251])
def test_a_dense_grid_starts_at_the_last_training_timestep(steps):
    table = sd_table()
    assert leading_sigmas(table, steps)[0] == table[-1]


@pytest.mark.parametrize(
    "steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000, 30, 60, 99, 333, 999]
)
def test_a_grid_that_divides_the_training_timesteps_is_diffusers_leading_one(steps):
    """And so is every grid of up to T / 10 steps."""
    table, spacing = sd_table(), 1000 // steps
    timesteps = [i * spacing + (steps < 1000) for i in reversed(range(steps))]
    assert torch.equal(leading_sigmas(table, steps)[:-1], table[timesteps])


def test_strength_keeps_the_last_part_of_the_same_grid():
    table = sd_table()
    full = leading_sigmas(table, 50)
    assert executed_steps(50, 0.75) == 38
    assert torch.equal(leading_sigmas(table, 50, 0.75), full[12:])
    assert executed_steps(50, 0.28) == 14, "(1 - 0.28) x 50 is 35.999... in floating point"
    assert [executed_steps(10, s) for s in (1.0, 0.9, 0.5, 0.1, 0.05)] == [10, 9, 5, 1, 1]


@given(st.integers(1, 1000), st.floats(0.01, 1))
def test_grids_fall_strictly_and_end_at_zero(steps, strength):
    for grid in (
        leading_sigmas(sd_table(), steps, strength),
        even_sigmas(torch.linspace(0.001, 1, 1000), steps, strength),
    ):
        assert len(check_sigmas(grid)) == executed_steps(steps, strength) + 1 and grid[-1] == 0


def test_flow_grid_starts_at_pure_noise():
    assert even_sigmas(torch.linspace(0.001, 1, 1000), 7)[0] == 1


@pytest.mark.parametrize("steps, strength", [(0, 1.0), (1001, 1.0), (10, 0.0), (10, 1.5)])
def test_impossible_grids_are_refused(steps, strength):
    with pytest.raises(ParameterError):
        leading_sigmas(sd_table(), steps, strength)


def test_t1_linear_denoiser_multiplies_by_a_known_factor():
    x, sigmas, a = torch.ones(1, dtype=torch.float64), [8.0, 4.0, 2.0, 1.0, 0.0], 0.5
    for sigma, target in zip(sigmas, sigmas[1:], strict=False):
        x = euler_step(x, a * x, sigma, target)
    assert x.item() == pytest.approx(0.2109375, abs=1e-12)


def test_t2_point_mass_ends_exactly_at_its_point():
    x, mu = torch.randn(8, generator=torch.Generator().manual_seed(1)), torch.tensor(0.3)
    for sigma, target in [(9.0, 3.0), (3.0, 0.4), (0.4, 0.0)]:
        x = euler_step(x, mu.expand(8), sigma, target)
    assert torch.equal(x, mu.expand(8))


@pytest.mark.parametrize("levels, ratio", [(10, 0.8422), (20, 0.9219), (40, 0.9612), (80, 0.9806)])
def test_t3_euler_is_first_order_on_the_gaussian(levels, ratio):
    high, low = sd_table().double()[[999, 0]].tolist()
    grid = [high * (low / high) ** (i / (levels - 1)) for i in range(levels)]  # the vector counts levels, not steps
    x = torch.tensor(math.sqrt(1 + high**2), dtype=torch.float64)
    for sigma, target in zip(grid, grid[1:], strict=False):
        x = euler_step(x, x / (1 + sigma**2), sigma, target)
    assert (x / math.sqrt(1 + low**2)).item() == pytest.approx(ratio, abs=1e-4)


def test_t5_sigma_space_is_ddim():
    abar, following = 0.3, 0.6
    generator = torch.Generator().manual_seed(0)
    x_vp, eps = (torch.randn(64, dtype=torch.float64, generator=generator) for _ in range(2))
    clean = (x_vp - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    ddim = math.sqrt(following) * clean + math.sqrt(1 - following) * eps
    sigma, target = (math.sqrt((1 - a) / a) for a in (abar, following))
    ours = euler_step(x_vp / math.sqrt(abar), clean, sigma, target)
    assert (ours - ddim / math.sqrt(following)).abs().max() < 2e-15


def test_t5_ancestral_split():
    sigma, target = (math.sqrt((1 - a) / a) for a in (0.3, 0.6))
    down, up = ancestral_sigmas(sigma, target, 0.7)
    assert up == pytest.approx(0.48305, abs=1e-5) and down == pytest.approx(0.65828, abs=1e-5)
    vp = 0.7 * math.sqrt((1 - 0.6) / (1 - 0.3) * (1 - 0.3 / 0.6))
    assert up == pytest.approx(vp / math.sqrt(0.6), abs=1e-12)


@given(st.floats(0.05, 1), st.floats(0.01, 0.95), st.floats(0, 1))
def test_ancestral_split_of_a_flow_keeps_the_variance(sigma, share, eta):
    target = sigma * share
    down, up = ancestral_sigmas(sigma, target, eta, flow=True)
    rescale = (1 - target) / (1 - down)
    assert (rescale * down) ** 2 + up**2 == pytest.approx(target**2, rel=1e-6, abs=1e-12)


def test_step_is_found_by_sigma():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    assert [step_of_sigma(s, sigmas) for s in (99.0, 8.0, 5.0, 4.0, 3.0, 1.0, 0.5, 0.0)] == [0, 0, 0, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("bad", [[1.0], [1.0, 2.0], [1.0, 1.0], [1.0, -0.1], [float("nan"), 0.0]])
def test_broken_sigmas_are_refused(bad):
    with pytest.raises(ParameterError, match="sigmas"):
        check_sigmas(torch.tensor(bad))
