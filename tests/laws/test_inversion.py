"""Inversion: closed forms of the three modes, exact round trips, and trajectories that know what they belong to (T2, T4)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from editkit.pipelines.blended.blending import BlendOptions, blended_denoise
from editkit.pipelines.blended.prediction import blended_predictor
from editkit.pipelines.core.errors import FamilyError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, dilation_schedule
from editkit.pipelines.core.samplers import predictor, sample
from editkit.pipelines.core.trajectory import Trajectory, context_digest
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from editkit.tests.toys import ToyDenoiser, gaussian, linear, point, prompt, random_latent

B, C, H, W = 2, 4, 6, 5
POWERS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
EXACT = InversionOptions("implicit", iterations=60, tolerance=1e-10)


def source(batch: int = B, seed: int = 3) -> torch.Tensor:
    return random_latent(batch, C, H, W, seed=seed).double()


def curved(z, sigma, value):
    """Derivative sin(z) + value: smooth, non-linear, and clean = z at level 0 as with a trained model."""
    return z - sigma * (torch.sin(z) + value)


def even(steps: int, high: float = 2.0, low: float = 0.0) -> torch.Tensor:
    return torch.linspace(high, low, steps + 1)


def round_trip(denoiser, sigmas, options, z=None, context=None) -> float:
    """Relative error of inverting and sampling back."""
    z, context = source() if z is None else z, context or prompt(0.25)
    back = reconstruct(denoiser, invert(denoiser, z, context, sigmas, options=options), context)
    return float((back - z).norm() / z.norm())


def test_t4_implicit_is_the_reciprocal_of_the_sampler():
    z, a = source(), 0.5
    path = invert(ToyDenoiser(linear(a)), z, prompt(), POWERS, options=EXACT)
    for index, (high, low) in enumerate([(8.0, 4.0), (4.0, 2.0), (2.0, 1.0), (1.0, 0.0)]):
        assert torch.allclose(
            path.latent(index), path.latent(index + 1) / (a + (1 - a) * low / high), rtol=1e-9, atol=0
        )
    assert torch.allclose(path.latent(0), z / 0.2109375, rtol=1e-8, atol=0)


def test_t4_current_leaves_a_known_residue():
    denoiser = ToyDenoiser(lambda z, sigma, value: z - sigma * 0.8 * z)
    z, sigmas = source(), 0.3 + 0.3 * torch.arange(10, -1, -1)
    path = invert(denoiser, z, prompt(), sigmas, options=InversionOptions("current"))
    assert torch.allclose(reconstruct(denoiser, path, prompt()), z * (1 - 0.0576) ** 10, rtol=1e-4)
    assert torch.allclose(reconstruct(denoiser, path, prompt()), z * 0.55253, rtol=1e-4)


def test_next_evaluates_the_rescaled_latent_at_the_next_level():
    """z + (S' - S) (x - a x) / S' with x = z sqrt((1 + S'^2) / (1 + S^2)); for D = a z a factor per step."""
    z, factor = source(), 1.0
    path = invert(ToyDenoiser(linear(0.5)), z, prompt(), POWERS, options=InversionOptions("next"))
    for index, (low, high) in enumerate([(0.0, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 8.0)], 1):
        factor *= 1 + (high - low) / high * 0.5 * math.sqrt((1 + high**2) / (1 + low**2))
        assert torch.allclose(path.latent(4 - index), z * factor, rtol=1e-9)


@pytest.mark.parametrize("flow, factor", [(False, 1 + 0.5 * math.sqrt(1.25)), (True, 1.5)])
def test_the_step_from_level_zero_is_evaluated_above_it(flow, factor):
    """The clean latent at the scale of the level above; a flow network takes it as it is. D = z / 2, levels 0 and 0.5."""
    denoiser, z = ToyDenoiser(linear(0.5), flow=flow), source()
    path = invert(denoiser, z, prompt(), even(2, 1.0), options=InversionOptions("current"))
    assert torch.allclose(path.latent(1), z * factor, rtol=1e-9)
    assert torch.allclose(path.latent(0), z * factor * 1.5, rtol=1e-9)  # from 0.5 to 1, evaluated at 0.5


@pytest.mark.parametrize("mode", ["next", "current", "implicit"])
def test_t2_a_constant_prediction_is_inverted_exactly(mode):
    mu = torch.full((1, C, 1, 1), 0.3, dtype=torch.float64)
    denoiser, z = ToyDenoiser(point(mu)), mu.expand(1, C, H, W) + torch.zeros(1, C, H, W).double()
    assert round_trip(denoiser, POWERS, InversionOptions(mode), z=z) < 1e-12


@pytest.mark.parametrize("mode", ["current", "implicit"])
def test_t2_a_point_mass_pulls_along_a_straight_line(mode):
    """From a latent that is not the point: the derivative is constant on the line, and at level 0 only the point is left."""
    mu, z = torch.full((1, C, 1, 1), 0.3, dtype=torch.float64), source()
    denoiser, sigmas = ToyDenoiser(point(mu)), even(6, 3.0, 0.5)
    path = invert(denoiser, z, prompt(), sigmas, options=InversionOptions(mode, iterations=60, tolerance=1e-12))
    for index, sigma in enumerate(sigmas.tolist()):
        assert torch.allclose(path.latent(index), mu + (z - mu) * sigma / 0.5, rtol=1e-9)
    assert torch.allclose(reconstruct(denoiser, path, prompt()), z, rtol=1e-9)
    to_zero = torch.cat([sigmas, torch.zeros(1)])
    ends = sample("euler", predictor(denoiser, EditPrompts(prompt(), None, 1.0)), path.latent(0), to_zero)
    assert torch.equal(ends, mu.expand_as(z))


@pytest.mark.parametrize("mode", ["next", "current", "implicit"])
def test_a_likely_picture_ends_with_the_spread_of_its_level(mode):
    """Latents that the model thinks likely, N(0, 1), have deviation sqrt(1 + S^2) at every level."""
    denoiser, z = ToyDenoiser(gaussian(1.0)), random_latent(1, C, 64, 64, seed=3)
    options = InversionOptions(mode, iterations=30)
    path = invert(denoiser, z, prompt(), denoiser.schedule(200), options=options)
    for index in (0, 60, 120):
        expected = math.sqrt(1 + float(path.sigmas[index]) ** 2)
        assert float(path.latent(index).std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("flow", [False, True])
def test_current_is_exact_where_the_derivative_does_not_depend_on_the_latent(flow):
    field = random_latent(B, C, H, W, seed=8).double()
    denoiser = ToyDenoiser(lambda z, sigma, value: z - sigma * field, flow=flow)
    assert round_trip(denoiser, even(7, 1.0), InversionOptions("current")) < 1e-12


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("rule", [curved, gaussian(0.7)])
def test_implicit_round_trip_is_exact(rule, flow):
    sigmas = even(20, 1.0) if flow else even(20)
    assert round_trip(ToyDenoiser(rule, flow=flow), sigmas, EXACT) < 1e-9
    assert round_trip(ToyDenoiser(rule, flow=flow), sigmas, InversionOptions("current")) > 1e-3


def test_implicit_round_trip_on_the_published_grid():
    denoiser = ToyDenoiser(gaussian(1.0))
    assert round_trip(denoiser, denoiser.schedule(50), EXACT) < 1e-6


def test_halving_the_step_halves_the_error_of_current():
    errors = [round_trip(ToyDenoiser(curved), even(n), InversionOptions("current")) for n in (10, 20, 40, 80)]
    assert errors[0] > 0.05
    assert all(fine <= coarse / 2 for coarse, fine in zip(errors, errors[1:], strict=False)), errors


def test_flow_and_diffusion_agree_on_the_same_ode():
    sigmas = even(8, 1.0)
    for mode in ("current", "implicit"):
        paths = [
            invert(
                ToyDenoiser(curved, flow=flow), source(), prompt(0.5), sigmas, options=InversionOptions(mode)
            ).latents
            for flow in (False, True)
        ]
        # the first level is reached from 0, where the two kinds scale a latent differently
        tolerance = 1e-4 if mode == "implicit" else 5e-2
        assert (paths[0] - paths[1]).abs().max() < tolerance * paths[0].abs().max()


def test_next_is_refused_for_flow():
    with pytest.raises(FamilyError, match=r"toy-flow.*implicit"):
        invert(ToyDenoiser(curved, flow=True), source(), prompt(), even(4, 1.0))


def test_nothing_is_evaluated_at_level_zero():
    seen = []
    denoiser = ToyDenoiser(lambda z, sigma, value: seen.append(sigma) or 0.9 * z)
    for mode in ("next", "current", "implicit"):
        assert torch.isfinite(
            invert(denoiser, source(), prompt(), POWERS, options=InversionOptions(mode)).latents
        ).all()
    assert min(seen) > 0


@pytest.mark.parametrize("mode", ["next", "current"])
def test_one_row_per_step(mode):
    denoiser = ToyDenoiser(gaussian())
    invert(denoiser, source(1), prompt(), denoiser.schedule(50), options=InversionOptions(mode))
    assert denoiser.forward_passes == 50


def test_ratio_climbs_only_its_part_and_keeps_the_whole_grid():
    denoiser = ToyDenoiser(gaussian())
    sigmas = denoiser.schedule(50)
    part = invert(denoiser, source(1), prompt(), sigmas, ratio=0.8)
    assert denoiser.forward_passes == 40 and part.first == 10 and torch.equal(part.sigmas, sigmas)
    whole = invert(denoiser, source(1), prompt(), sigmas)
    assert torch.equal(part.latent(10), whole.latent(10)) and torch.equal(part.source, whole.source)
    with pytest.raises(MismatchError, match="latents 10 to 50 of its grid but number 9"):
        part.latent(9)


def test_implicit_stops_when_it_has_converged():
    field = random_latent(1, C, H, W, seed=8).double()
    straight = ToyDenoiser(lambda z, sigma, value: z - sigma * field)  # the guess of every later step is right
    invert(straight, source(1), prompt(), even(10), options=InversionOptions("implicit", iterations=9))
    assert straight.forward_passes <= 2 + 9
    loose, tight = ToyDenoiser(curved), ToyDenoiser(curved)
    invert(loose, source(1), prompt(), even(10), options=InversionOptions("implicit", 60, tolerance=1e-3))
    invert(tight, source(1), prompt(), even(10), options=InversionOptions("implicit", 60, tolerance=1e-9))
    assert 10 < loose.forward_passes < tight.forward_passes < 300


def test_damping_converges_where_the_plain_iteration_diverges():
    steep = ToyDenoiser(lambda z, sigma, value: z + 2 * sigma * z)  # derivative -2 z, contraction 2 |h| = 1.25
    exact = source() / (1 + 1.25)
    for damping in (1.0, 0.5):
        options = InversionOptions("implicit", iterations=80, damping=damping, tolerance=1e-10)
        path = invert(steep, source(), prompt(), torch.tensor([1.25, 0.625]), options=options)
        assert torch.allclose(path.latent(0), exact, rtol=1e-8)


@pytest.mark.parametrize("mode", ["next", "current", "implicit"])
def test_batch_equals_single_runs(mode):
    """Images of very different sizes need different numbers of iterations."""
    z = source(3) * torch.tensor([0.01, 1.0, 5.0]).view(3, 1, 1, 1)
    options = InversionOptions(mode, iterations=8, tolerance=1e-3)
    together = invert(ToyDenoiser(curved), z, prompt(0.1), even(6), options=options)
    for i in range(3):
        alone = invert(ToyDenoiser(curved), z[i : i + 1], prompt(0.1), even(6), options=options)
        assert torch.equal(together.latents[:, i : i + 1], alone.latents)


def test_guided_inversion_uses_both_prompts():
    denoiser = ToyDenoiser(lambda z, sigma, value: z - sigma * value)
    z = source(1)
    path = invert(
        denoiser, z, prompt(1.0), even(4), negative=prompt(0.5), guidance_scale=3.0,
        options=InversionOptions("current"),
    )  # fmt: skip
    assert torch.allclose(path.latent(0), z + 2 * (0.5 + 3 * 0.5)) and denoiser.forward_passes == 8


def test_progress_counts_and_a_raise_cancels():
    seen = []
    invert(
        ToyDenoiser(curved),
        source(),
        prompt(),
        even(3),
        progress=lambda done, total, preview=None: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]

    class Cancelled(Exception):
        pass

    def cancel(done, total, preview=None):
        raise Cancelled

    with pytest.raises(Cancelled):
        invert(ToyDenoiser(curved), source(), prompt(), even(3), progress=cancel)


@pytest.mark.parametrize(
    "change",
    [{"mode": "sideways"}, {"iterations": 0}, {"damping": 0.0}, {"damping": 1.5}, {"tolerance": 0.0}],
)
def test_impossible_options_are_refused(change):
    with pytest.raises(ParameterError, match=next(iter(change))):
        InversionOptions(**change)


# trajectories


def trajectory(scale: float = 1.0, batch: int = B, **kwargs) -> tuple[ToyDenoiser, Trajectory]:
    denoiser = ToyDenoiser(curved, scale=scale)
    return denoiser, invert(denoiser, random_latent(batch, C, H, W, seed=3), prompt(0.25), even(8), **kwargs)


def test_a_trajectory_holds_every_level_and_the_source_bits():
    denoiser, path = trajectory(scale=0.18215)
    z = random_latent(B, C, H, W, seed=3)
    assert path.latents.shape == (9, B, C, H, W) and path.steps == 8 and path.first == 0 and path.batch == B
    assert torch.equal(path.source_latent, z) and torch.equal(path.source, denoiser.scale_in(z))
    for index, sigma in enumerate(path.sigmas.tolist()):
        assert torch.equal(path.at(sigma), path.latent(index))


def test_between_levels_a_trajectory_is_the_line_of_the_step():
    _, path = trajectory()
    quarter = path.at(float(3 * path.sigmas[2] + path.sigmas[3]) / 4)
    assert torch.allclose(quarter, (3 * path.latent(2) + path.latent(3)) / 4, atol=1e-6)
    with pytest.raises(MismatchError, match=r"2\.5"):
        path.at(2.5)


def test_a_trajectory_cannot_be_changed():
    _, path = trajectory()
    with pytest.raises(dataclasses.FrozenInstanceError):
        path.latents = path.latents * 0
    latent, sigmas = random_latent(B, C, H, W, seed=3), even(8)
    path = invert(ToyDenoiser(curved), latent, prompt(), sigmas)
    latent.zero_(), sigmas.zero_()  # what it was made from may be used again
    assert torch.equal(path.source_latent, random_latent(B, C, H, W, seed=3)) and torch.equal(path.sigmas, even(8))


def test_other_models_grids_sizes_batches_and_prompts_are_refused_by_name():
    denoiser, path = trajectory()
    other = ToyDenoiser(curved)
    other.fingerprint = "with a LoRA"
    z = path.latent(0)
    with pytest.raises(MismatchError, match=r"another model.*with a LoRA"):
        path.fitted(other, path.sigmas, z)
    for wrong in (even(4), even(8, 3.0), path.sigmas[:-1], even(9)):
        with pytest.raises(MismatchError, match="8 steps from sigma 2 to 0"):
            path.fitted(denoiser, wrong, z)
    with pytest.raises(MismatchError, match=r"\[4, 6, 5\].*\[4, 7, 5\]"):
        path.fitted(denoiser, path.sigmas, torch.zeros(B, C, H + 1, W))
    with pytest.raises(ShapeError, match="trajectory has 2"):
        path.fitted(denoiser, path.sigmas, torch.zeros(3, C, H, W))
    with pytest.raises(MismatchError, match="positive is not the prompt"):
        path.check_prompt(prompt(0.5), "positive")
    path.check_prompt(prompt(0.25), "positive")
    path.fitted(denoiser, path.sigmas[3:], z)  # the last part of the grid is the same grid


def test_digest_sees_tokens_pooled_and_shape():
    a = prompt(0.5)
    others = [prompt(0.6), dataclasses.replace(a, pooled=torch.ones(1, 4)), a.with_tokens(a.tokens.reshape(1, 3, 2))]
    assert len({context_digest(context) for context in [a, *others]}) == 4
    assert context_digest(dataclasses.replace(a, text="another", host=object())) == context_digest(a)


# trajectories as the background of a blended edit


def box() -> torch.Tensor:
    mask = torch.zeros(1, H, W)
    mask[:, 2:4, 1:4] = 1
    return mask


PROMPTS = EditPrompts(prompt(1.0), prompt(0.0), 3.0)


def blended(denoiser, path, mask=None, z=None, sigmas=None, **kwargs):
    schedule = constant_schedule(box() if mask is None else mask)
    z = path.latent(0) if z is None else z
    sigmas = path.sigmas if sigmas is None else sigmas
    return blended_denoise(
        denoiser, z, path, sigmas, kwargs.pop("schedule", schedule), PROMPTS, seeds=[0] * len(z), **kwargs
    )


def test_outside_is_on_the_trajectory_after_every_step():
    denoiser, path = trajectory()
    outside = (box()[:, None] == 0).expand(B, C, H, W)
    for end in range(1, 9):
        z = blended(denoiser, path, end=end)
        assert torch.equal(z[outside], path.latent(end)[outside])
        assert not torch.equal(z[~outside], path.latent(end)[~outside])


def test_a_trajectory_background_draws_no_noise(monkeypatch):
    denoiser, path = trajectory()
    monkeypatch.setattr("editkit.pipelines.blended.blending.seeded_noise", None)
    z = blended(denoiser, path, schedule=dilation_schedule(box(), (3, 1)))
    assert torch.equal(z[(box()[:, None] == 0).expand_as(z)], path.source[(box()[:, None] == 0).expand_as(z)])


def test_ranges_and_parts_of_the_grid_compose():
    denoiser, path = trajectory()
    whole, first = blended(denoiser, path), blended(denoiser, path, end=3)
    assert torch.equal(whole, blended(denoiser, path, z=first, start=3))
    assert torch.equal(whole, blended(denoiser, path, z=first, sigmas=path.sigmas[3:]))


def test_a_single_trajectory_serves_a_batch_of_candidates():
    denoiser, path = trajectory(batch=1)
    z = torch.cat([path.latent(0), path.latent(0) + 1])
    both = blended(denoiser, path, z=z)
    assert torch.equal(both[:1], blended(denoiser, path)) and not torch.equal(both[:1], both[1:])


def test_a_trajectory_of_something_else_is_refused_as_a_background():
    denoiser, path = trajectory()
    with pytest.raises(MismatchError, match="SIGMAS"):
        blended(denoiser, path, sigmas=even(9))
    with pytest.raises(ParameterError, match="trajectory"):
        blended(denoiser, path, options=BlendOptions(background_noise="fresh"))


def test_any_sampler_can_blend_with_a_trajectory():
    denoiser, path = trajectory()
    schedule = constant_schedule(box())
    predict = blended_predictor(predictor(denoiser, PROMPTS), path, schedule, path.sigmas)
    outside = (box()[:, None] == 0).expand(B, C, H, W)
    for name in ("euler", "dpmpp_2m"):
        z = sample(name, predict, path.latent(0), path.sigmas)
        assert torch.equal(z[outside], path.source[outside])
