"""The blended loop: exact outside, plain sampling inside, ranges that compose (T1, T19 and methods.md, section 1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.blended.blending import BlendOptions, blend, blended_denoise, restore_source
from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, dilation_schedule
from editkit.pipelines.core.noise import folded_seed, image_seeds, seeded_noise, start_latent
from editkit.tests.toys import ToyDenoiser, linear, neighbourly, point, pointwise, prompt, random_latent

B, C, H, W = 2, 4, 6, 5
SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])


def box() -> torch.Tensor:
    mask = torch.zeros(1, H, W)
    mask[:, 2:4, 1:4] = 1
    return mask


def run(denoiser, mask=None, *, sigmas=SIGMAS, seeds=(5, 6), schedule=None, prompts=None, source=None, **kwargs):
    seeds = list(seeds)
    source = random_latent(len(seeds), C, H, W, seed=3) if source is None else source
    schedule = schedule or constant_schedule(box() if mask is None else mask)
    noise = seeded_noise((C, H, W), seeds)
    z = kwargs.pop("z", None)
    z = denoiser.noise(source, noise, float(sigmas[kwargs.get("start", 0)])) if z is None else z
    prompts = prompts or EditPrompts(prompt(1.0), prompt(0.0), 3.0)
    return source, blended_denoise(denoiser, z, source, sigmas, schedule, prompts, seeds=seeds, **kwargs)


def plain(denoiser, z, sigmas, prompts):
    """Plain DDIM in the textbook form, written apart from the library's step."""
    for sigma, target in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        c, u = denoiser.denoise(z, sigma, [prompts.positive, prompts.negative])
        clean = u + prompts.guidance_scale * (c - u)
        z = z + (target - sigma) * (z - clean) / sigma
    return z


@pytest.mark.parametrize("flow", [False, True])
def test_empty_mask_returns_the_source_bit_for_bit(flow):
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0]) if flow else SIGMAS
    source, out = run(ToyDenoiser(pointwise(), flow=flow), torch.zeros(1, H, W), sigmas=sigmas)
    assert torch.equal(out, source)


@pytest.mark.parametrize("flow", [False, True])
def test_full_mask_is_plain_sampling(flow):
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0]) if flow else SIGMAS
    denoiser, prompts = ToyDenoiser(pointwise(), flow=flow), EditPrompts(prompt(1.0), prompt(0.0), 3.0)
    source, out = run(denoiser, torch.ones(1, H, W), sigmas=sigmas, prompts=prompts)
    z = denoiser.noise(source, seeded_noise((C, H, W), [5, 6]), float(sigmas[0]))
    assert torch.allclose(out, plain(denoiser, z, sigmas, prompts), atol=2e-6)


def test_t1_closed_form_inside_source_outside():
    denoiser, mask = ToyDenoiser(linear(0.5)), box()
    source, out = run(denoiser, mask, prompts=EditPrompts(prompt(), None, 1.0))
    start = source + 8 * seeded_noise((C, H, W), [5, 6])
    inside = mask[:, None].expand_as(out) == 1
    assert torch.allclose(out[inside], 0.2109375 * start[inside], rtol=1e-5)
    assert torch.equal(out[~inside], source[~inside])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.booleans(), st.sampled_from(["fixed", "fresh"]), st.sampled_from([0.0, 0.6]))
def test_t19_ranges_compose_bit_for_bit(cut, shrinking, noise, eta):
    denoiser = ToyDenoiser(neighbourly())
    schedule = dilation_schedule(box(), (3, 1)) if shrinking else constant_schedule(box())
    options = BlendOptions(background_noise=noise, eta=eta)
    _, whole = run(denoiser, schedule=schedule, options=options)
    _, first = run(denoiser, schedule=schedule, options=options, end=cut)
    _, both = run(denoiser, schedule=schedule, options=options, start=cut, z=first)
    assert torch.equal(whole, both)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_steps_keep_the_level_and_draw_anew(flow, eta):
    """With a known clean latent, z at every level is signal x clean + sigma x unit noise, whatever eta."""
    sigmas, clean = torch.tensor([0.9, 0.7, 0.4, 0.2, 0.0]), torch.full((4, 64, 64), 2.0)
    denoiser, full = ToyDenoiser(point(clean), flow=flow), constant_schedule(torch.ones(1, 64, 64))
    z, drawn = denoiser.noise(clean[None], seeded_noise((4, 64, 64), [1]), 0.9), []
    for step in range(3):
        z = blended_denoise(
            denoiser, z, clean[None], sigmas, full, EditPrompts(prompt(), None, 1.0), seeds=[1], start=step, end=step + 1,
            options=BlendOptions(eta=eta),
        )  # fmt: skip
        level = float(sigmas[step + 1])
        noise = (z - (1 - level if flow else 1) * clean) / level
        assert abs(float(noise.mean())) < 0.03 and float(noise.std()) == pytest.approx(1, abs=0.03)
        drawn.append(noise.flatten())
    correlation = float(torch.corrcoef(torch.stack(drawn[1:]))[0, 1])
    if eta == 1.0 and not flow:
        assert correlation == pytest.approx((0.2 / 0.4), abs=0.05)  # the part of the old noise that DDPM keeps


def test_outside_stays_on_the_line_of_the_source():
    denoiser, noise = ToyDenoiser(pointwise()), seeded_noise((C, H, W), [5, 6])
    outside = (box()[:, None] == 0).expand(B, C, H, W)
    for step in range(1, 4):
        source, z = run(denoiser, end=step)
        assert torch.equal(z[outside], (source + float(SIGMAS[step]) * noise)[outside])


def test_batch_equals_single_runs():
    denoiser, source = ToyDenoiser(pointwise()), random_latent(3, C, H, W, seed=9)
    masks = (random_latent(3, H, W, seed=4) > 0).float()
    _, together = run(denoiser, masks, seeds=(7, 8, 9), source=source)
    for i in range(3):
        _, alone = run(denoiser, masks[i : i + 1], seeds=(7 + i,), source=source[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_neighbouring_seeds_share_no_candidate():
    drawn = [float(seeded_noise((1,), [number])) for seed in range(41, 49) for number in image_seeds(seed, 24)]
    assert len(set(drawn)) == 8 * 24


def test_an_image_keeps_its_seed_however_its_batch_is_split():
    whole = image_seeds(41, 9)
    assert whole[0] == 41 and image_seeds(41, 2, [4, 7]) == [whole[4], whole[7]]
    assert image_seeds(41, 3, [4, 7]) == whole[:3]  # indices of another batch
    assert not torch.equal(seeded_noise((8,), [1]), seeded_noise((8,), [1], draw=1))


def test_all_64_bits_of_a_seed_count():
    seeds = [5, 5 + 2**32, 5 + 2**33, 5 + 2**63, 2**64 - 1, 2**32 - 1]
    for draw in (0, 3):
        drawn = [float(seeded_noise((1,), [seed], draw=draw)) for seed in seeds]
        assert len(set(drawn)) == len(seeds)
    assert [folded_seed(seed) for seed in (0, 5, 2**32 - 1)] == [0, 5, 2**32 - 1]
    generator = torch.Generator("cpu").manual_seed(5)
    assert torch.equal(seeded_noise((8,), [5])[0], torch.randn(8, generator=generator))  # the host's noise of one image


def test_rows_are_two_per_step_and_one_without_guidance():
    for prompts, rows in (
        (EditPrompts(prompt(1.0), prompt(0.0), 3.0), 16),
        (EditPrompts(prompt(1.0), prompt(0.0), 1.0), 8),
    ):
        denoiser = ToyDenoiser(pointwise())
        run(denoiser, prompts=prompts)
        assert denoiser.forward_passes == rows


def test_guidance_extrapolates():
    denoiser = ToyDenoiser(lambda z, sigma, value: torch.full_like(z, value))
    _, out = run(denoiser, torch.ones(1, H, W), prompts=EditPrompts(prompt(1.0), prompt(0.25), 3.0))
    assert torch.allclose(out, torch.full_like(out, 0.25 + 3 * 0.75))


def test_disjoint_masks_in_one_pass_equal_separate_passes():
    denoiser = ToyDenoiser(pointwise())
    left, right = torch.zeros(1, H, W), torch.zeros(1, H, W)
    left[..., :2], right[..., 3:] = 1, 1
    source, both = run(denoiser, left + right)
    _, a = run(denoiser, left)
    _, b = run(denoiser, right)
    assert torch.equal(both, torch.where(left[:, None] == 1, a, torch.where(right[:, None] == 1, b, source)))


def test_published_background_keeps_noise_of_the_previous_level():
    denoiser, noise = ToyDenoiser(pointwise()), seeded_noise((C, H, W), [5, 6])
    outside = (box()[:, None] == 0).expand(B, C, H, W)
    source, out = run(denoiser, options=BlendOptions(background_level="previous"))
    assert torch.equal(out[outside], (source + 1.0 * noise)[outside])


def test_published_preblend_ends_with_the_models_own_background():
    denoiser = ToyDenoiser(lambda z, sigma, value: torch.full_like(z, 7.0))
    _, out = run(denoiser, options=BlendOptions(blend="before"))
    assert (out == 7).all()


def test_fresh_noise_changes_the_way_but_not_the_end_outside():
    denoiser = ToyDenoiser(pointwise())
    source, fixed = run(denoiser, end=2)
    _, fresh = run(denoiser, end=2, options=BlendOptions(background_noise="fresh"))
    _, done = run(denoiser, options=BlendOptions(background_noise="fresh"))
    outside = (box()[:, None] == 0).expand(B, C, H, W)
    assert not torch.equal(fixed[outside], fresh[outside]) and torch.equal(done[outside], source[outside])


def drawn(mask_value: float, step: int, **options) -> torch.Tensor:
    """The unit noise that `step` draws for every latent pixel, with the source and every prediction at 0."""
    side, zero = 64, torch.zeros(1, C, 64, 64)
    z = blended_denoise(
        ToyDenoiser(point(zero[0])),
        zero,
        zero,
        SIGMAS,
        constant_schedule(torch.full((1, side, side), mask_value)),
        EditPrompts(prompt(), None, 1.0),
        seeds=[3],
        start=step,
        end=step + 1,
        options=BlendOptions(**options),
    )
    return (z / z.std()).flatten()


def test_fresh_noise_is_new_at_every_step():
    fresh = torch.stack([drawn(0.0, step, background_noise="fresh") for step in range(3)])
    fixed = torch.stack([drawn(0.0, step) for step in range(3)])
    assert torch.allclose(torch.corrcoef(torch.cat([fresh, fixed[:1]])), torch.eye(4), atol=0.05)
    assert torch.allclose(torch.corrcoef(fixed), torch.ones(3, 3))


def test_the_noise_of_eta_is_not_that_of_the_background():
    noises = [drawn(1.0, step, eta=1.0) for step in range(3)]
    noises += [drawn(0.0, step, background_noise="fresh") for step in range(3)] + [drawn(0.0, 0)]
    assert torch.allclose(torch.corrcoef(torch.stack(noises)), torch.eye(7), atol=0.05)


def test_restore_source_keeps_soft_latent_pixels():
    latent, source = torch.full((1, C, 1, 3), 5.0), torch.full((1, C, 1, 3), 2.0)
    schedule = constant_schedule(torch.tensor([[[0.0, 0.5, 1.0]]]))
    assert restore_source(latent, source, schedule, SIGMAS)[0, 0, 0].tolist() == [2.0, 5.0, 5.0]


def test_soft_masks_mix_and_blend_is_exact_at_the_ends():
    a, b = torch.tensor([1.0, float("inf"), 3.0]), torch.tensor([5.0, 6.0, float("inf")])
    assert torch.equal(blend(a, b, torch.tensor([0.25, 0.0, 1.0])), torch.tensor([4.0, 6.0, 3.0]))


def test_pure_noise_start_is_unit_variance_at_the_networks_input():
    noise = random_latent(1, 4, 64, 64)
    z = start_latent(ToyDenoiser(pointwise()), noise * 0, 3.0, noise, from_source=False)
    assert (z / (1 + 3.0**2) ** 0.5).std().item() == pytest.approx(noise.std().item(), rel=1e-6)
    flow = start_latent(ToyDenoiser(pointwise(), flow=True), noise * 0, 0.5, noise, from_source=False)
    assert torch.equal(flow, noise)


def test_restore_source_gives_back_the_unscaled_source_bits():
    source = random_latent(2, C, H, W, seed=8)
    rounded = (source * 0.18215) / 0.18215
    assert not torch.equal(rounded, source)
    out = restore_source(rounded, source, constant_schedule(box()), torch.linspace(1, 0, 5))
    outside = (box()[:, None] == 0).expand_as(out)
    assert torch.equal(out[outside], source[outside]) and torch.equal(out[~outside], rounded[~outside])


def test_progress_counts_and_a_raise_cancels():
    seen = []
    run(ToyDenoiser(pointwise()), start=1, progress=lambda done, total, preview=None: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    class Cancelled(Exception):
        pass

    def cancel(done, total, preview=None):
        raise Cancelled

    with pytest.raises(Cancelled):
        run(ToyDenoiser(pointwise()), progress=cancel)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": 4}, "start_step is 4"),
        ({"start": -1}, "start_step is -1"),
        ({"start": 2, "end": 2}, "end_step is 2"),
        ({"options": dict(eta=1.5)}, "eta"),
        ({"options": dict(blend="sideways")}, "sideways"),
    ],
)
def test_impossible_parameters_are_refused(change, message):
    with pytest.raises(ParameterError, match=message):
        if "options" in change:
            change = {"options": BlendOptions(**change["options"])}
        run(ToyDenoiser(pointwise()), z=random_latent(B, C, H, W), **change)


def test_other_sizes_are_refused():
    with pytest.raises(ShapeError, match="latent"):
        run(ToyDenoiser(pointwise()), torch.ones(1, H + 1, W))
    with pytest.raises(ShapeError, match="seeds"):
        denoiser = ToyDenoiser(pointwise())
        z = random_latent(2, C, H, W)
        prompts = EditPrompts(prompt(), None, 1.0)
        blended_denoise(denoiser, z, z, SIGMAS, constant_schedule(box()), prompts, seeds=[1])
