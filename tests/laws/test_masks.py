"""Latent masks and the shrinking schedule (T6, T7 and the invariants of methods.md, sections 0.4 and 2)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.core.errors import EditError, ParameterError, ShapeError
from editkit.pipelines.core.masks import (
    MODES,
    constant_schedule,
    dilate,
    dilation_schedule,
    downsample,
    parse_kernels,
    parse_shares,
    scaled_kernel,
)
from editkit.pipelines.core.sigmas import leading_sigmas


def line() -> torch.Tensor:
    mask = torch.zeros(1, 32, 32)
    mask[0, 16, 10:20] = 1
    return mask


def test_t6_dilation_counts():
    assert [int(dilate(line(), k).sum()) for k in (1, 3, 5, 7)] == [10, 36, 70, 112]


def falling(steps: int, first: float = 14.6, last: float = 0.04) -> torch.Tensor:
    """Sigmas that fall by the same factor in every step, and 0."""
    return torch.cat([torch.logspace(math.log10(first), math.log10(last), steps), torch.zeros(1)])


def lengths(sigmas: torch.Tensor | int, **options: object) -> list[int]:
    sigmas = falling(sigmas) if isinstance(sigmas, int) else sigmas
    schedule = dilation_schedule(line(), **options)
    stages = [schedule.stage(i, sigmas) for i in range(len(sigmas) - 1)]
    return [stages.count(i) for i in range(4)]


def test_t7_stages_of_equal_steps():
    wanted = {5: [2, 1, 1, 1], 9: [3, 2, 2, 2], 30: [8, 7, 8, 7], 38: [10, 9, 10, 9], 50: [13, 12, 13, 12]}
    assert {steps: lengths(steps) for steps in wanted} == wanted


def test_t7_published_stages():
    wanted = {50: [13, 13, 13, 11], 38: [10, 10, 10, 8], 30: [8, 8, 8, 6], 20: [6, 6, 6, 2]}
    assert {steps: lengths(steps, spacing="published") for steps in wanted} == wanted
    assert all(lengths(steps, spacing="published")[-1] == 0 for steps in (4, 5, 6, 8, 9, 12))


def test_stages_have_their_shares_of_the_steps():
    assert lengths(20, shares=(40, 20, 20, 20)) == [8, 4, 4, 4]
    assert lengths(20, shares=(0.5, 0, 0.25, 0.25)) == [10, 0, 5, 5]
    assert lengths(4, shares=(97, 1, 1, 1))[-1] == 1  # the last step has the user's mask
    for steps in (1, 5, 9, 30, 50, 101):
        assert lengths(steps, shares=(3, 3, 3, 3)) == lengths(steps)
    assert parse_shares("40, 20;20,20") == (40, 20, 20, 20) and parse_shares(" ") == ()
    for wrong in ((1, 1), (0, 0, 0, 0), (-1, 1, 1, 1), (float("nan"), 1, 1, 1)):
        with pytest.raises(ParameterError, match="shares"):
            dilation_schedule(line(), shares=wrong)
    with pytest.raises(ParameterError, match="spaced by 'log-sigma'"):
        dilation_schedule(line(), shares=(1, 1, 1, 1), spacing="log-sigma")
    with pytest.raises(ParameterError, match="numbers with commas"):
        parse_shares("a,b")


def test_stages_of_equal_log_sigma():
    """SD's 50 DDIM levels: log(sigma) falls in the middle of the run far slower than at its end."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    sigmas = leading_sigmas(((1 - alphas) / alphas).sqrt().float(), 50)
    bounds = [float(sigmas[0]) * (float(sigmas[-2]) / float(sigmas[0])) ** (k / 4) for k in range(1, 4)]
    above = [sum(float(sigma) > bound for sigma in sigmas[:-1]) for bound in bounds]
    counts = [above[0], above[1] - above[0], above[2] - above[1], 50 - above[2]]
    assert lengths(sigmas, spacing="log-sigma") == counts and counts[3] <= 3 < 12 < counts[0]
    assert lengths(sigmas) == [13, 12, 13, 12]


def test_equal_factors_are_equal_steps_and_pure_noise_does_not_count():
    assert lengths(falling(42), spacing="log-sigma") == [11, 10, 10, 11]
    # a first level without any signal (zero terminal SNR) does not count in the spacing
    cut, raised = falling(40, first=15.0), falling(40, first=15.0)
    raised[0] = 4500.0
    assert lengths(raised, spacing="log-sigma") == lengths(cut, spacing="log-sigma")


def test_a_single_step_has_the_users_mask_by_any_spacing():
    for spacing in ("steps", "log-sigma"):
        schedule = dilation_schedule(line(), spacing=spacing)
        assert torch.equal(schedule.at(0, torch.tensor([3.0, 0.0]))[:, 0], line())
    noise_alone = torch.tensor([30.0, 24.0, 20.0, 18.0, 16.0])
    for grid in (noise_alone, torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]), torch.tensor([5.0, 3.0, 2.0, 0.0, 0.0])):
        assert [dilation_schedule(line(), spacing="log-sigma").stage(i, grid) for i in range(4)] == [0, 0, 0, 3]
    wild = torch.tensor([9.0, 12.0, 0.05, 0.1, 0.0])  # beyond both ends
    assert [dilation_schedule(line(), spacing="log-sigma").stage(i, wild) for i in range(4)] == [0, 0, 3, 3]


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ParameterError, match="stages are spaced by 'sigma': choose one of steps, log-sigma, published"):
        dilation_schedule(line(), spacing="sigma")


@given(st.integers(1, 120), st.sampled_from(["steps", "log-sigma"]))
def test_every_run_ends_with_the_users_mask_and_only_shrinks(steps, spacing):
    mask = line()
    schedule = dilation_schedule(mask, spacing=spacing)
    masks = [schedule.at(i, falling(steps)) for i in range(steps)]
    assert torch.equal(masks[-1][:, 0], mask)
    assert all((a >= b).all() for a, b in zip(masks, masks[1:], strict=False))
    if steps >= 4:
        counts = lengths(steps)
        assert max(counts) - min(counts) <= 1


def test_empty_and_full_masks_stay():
    for value in (0.0, 1.0):
        schedule = dilation_schedule(torch.full((2, 9, 5), value))
        assert (schedule.masks == value).all()


def test_inversion_comes_before_dilation_and_the_published_order_erodes():
    mask = line()
    ours, theirs = dilation_schedule(mask, invert=True), dilation_schedule(mask, invert=True, spacing="published")
    assert torch.equal(ours.masks[-1, :, 0], 1 - mask) and torch.equal(theirs.masks[-1, :, 0], 1 - mask)
    assert (ours.masks[0] >= ours.masks[-1]).all() and ours.masks[0].sum() > ours.masks[-1].sum()
    assert theirs.masks[0].sum() < theirs.masks[-1].sum()


def test_kernels_scale_with_the_latent():
    assert [scaled_kernel(k, 64) for k in (7, 5, 3, 1)] == [13, 9, 5, 1]
    assert [scaled_kernel(k, 32) for k in (7, 5, 3, 1)] == [7, 5, 3, 1]
    assert [scaled_kernel(k, 12) for k in (7, 5, 3, 1)] == [3, 3, 3, 1]


@pytest.mark.parametrize("text", ["", "7,5,3", "2,1", "1,3", "7;x", "5,0,1", "3,5,1"])
def test_broken_kernels_are_refused(text):
    with pytest.raises(ParameterError, match="kernels"):
        parse_kernels(text)


def test_kernels_are_parsed():
    assert parse_kernels(" 7, 5,3,1 ") == (7, 5, 3, 1)


def test_max_never_loses_a_stroke_that_others_lose():
    mask = torch.zeros(1, 64, 64)
    mask[0, 17:19] = 1  # two pixels of a latent pixel of eight, off its centre
    kept = {mode: downsample(mask, 8, 8, mode).kept.item() for mode in MODES}
    assert kept == {"max": 1.0, "area": 0.0, "nearest": 0.0, "bilinear": 0.0}
    assert downsample(mask, 8, 8, "area").lost == [0] and downsample(mask, 8, 8, "max").lost == []
    assert downsample(mask, 8, 8, "area", threshold=0.25).kept.item() == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_a_soft_stroke_below_the_threshold_is_lost_and_reported(mode):
    mask = torch.full((1, 64, 64), 0.45)
    soft = downsample(mask, 8, 8, mode)
    assert soft.mask.sum() == 0 and soft.kept.item() == 0 and soft.lost == [0]
    for threshold in (0.4, 0.0):  # the threshold says what counts
        assert downsample(mask, 8, 8, mode, threshold).kept.item() == 1.0


def test_kept_counts_a_soft_stroke_by_its_values():
    mask = torch.zeros(1, 64, 64)
    mask[0, :8, :8], mask[0, 32:40, 32:40] = 1, 0.25
    assert downsample(mask, 8, 8, "max").kept.item() == pytest.approx(0.8)
    assert downsample(mask, 8, 8, "max", 0.25).kept.item() == 1.0


def test_a_dilation_schedule_warns_of_a_soft_mask_that_vanishes(caplog):
    masks = torch.stack([line()[0], 0.45 * line()[0], 0 * line()[0]])
    schedule = dilation_schedule(masks)
    assert schedule.masks[:, 1:].sum() == 0
    assert [record.args for record in caplog.records] == [(1,)] and "below 0.5" in caplog.text


def test_nearest_mode_samples_the_centre_of_a_latent_pixel():
    mask = torch.zeros(1, 32, 32)
    mask[0, 8 + 4, 16 + 4] = 1  # row and column 4 of a latent pixel of 8, just behind its centre
    assert downsample(mask, 4, 4, "nearest").mask[0].nonzero().tolist() == [[1, 2]]
    mask = torch.zeros(1, 32, 32)
    mask[0, 8, 16] = 1  # its corner
    assert downsample(mask, 4, 4, "nearest").mask.sum() == 0


def test_area_is_the_exact_coverage():
    mask = torch.zeros(1, 16, 16)
    mask[0, :8, :6] = 1
    soft = downsample(mask, 2, 2, "area", threshold=0)
    assert torch.equal(soft.mask, torch.tensor([[[0.75, 0.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("factor", [None, 8])
def test_odd_sizes_keep_whole_latent_pixels(factor):
    mask = torch.zeros(1, 20, 13)
    mask[0, 8:16, 0:8] = 1  # exactly one latent pixel of factor 8 on a 3 x 2 grid
    latent_pixels = downsample(mask, 3, 2, "area", threshold=0, factor=factor).mask[0]
    assert latent_pixels[1, 0] == 1 and latent_pixels[0].sum() == 0 and latent_pixels[1, 1] == 0


def test_a_touching_pixel_marks_its_latent_pixel_only():
    for y, x in [(0, 0), (7, 7), (8, 8), (31, 24)]:
        mask = torch.zeros(1, 32, 32)
        mask[0, y, x] = 1
        latent_pixels = downsample(mask, 4, 4, "max").mask[0]
        assert latent_pixels.sum() == 1 and latent_pixels[y // 8, x // 8] == 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 4),
    st.sampled_from(MODES),
    st.floats(0, 1),
    st.sampled_from([2, 4, 8, 16]),
)
def test_any_size_gives_a_mask_or_an_edit_error(height, width, batch, mode, value, factor):
    h, w = -(-height // factor), -(-width // factor)
    result = downsample(torch.full((batch, height, width), value), h, w, mode, threshold=0)
    assert result.mask.shape == (batch, h, w)
    assert torch.allclose(result.mask, torch.full_like(result.mask, value), atol=1e-6)


def test_nan_and_wrong_ranges_are_refused():
    with pytest.raises(EditError, match="NaN"):
        downsample(torch.full((1, 8, 8), float("nan")), 1, 1)
    with pytest.raises(EditError, match="0 to 1"):
        downsample(torch.full((1, 8, 8), 255.0), 1, 1)


def test_schedules_refuse_another_size_or_batch():
    schedule = constant_schedule(torch.ones(2, 4, 4))
    with pytest.raises(ShapeError, match="latent"):
        schedule.expanded(2, 5, 4)
    with pytest.raises(ShapeError, match="2 entries"):
        schedule.expanded(3, 4, 4)
    assert constant_schedule(torch.ones(1, 4, 4)).expanded(3, 4, 4).batch == 3


def test_preview_shows_every_stage_of_every_image():
    strip = dilation_schedule(torch.cat([line(), 1 - line()])).preview(zoom=2)
    assert strip.shape == (1, 2 * (64 + 2) + 2, 4 * (64 + 2) + 2, 3)
    assert strip[0, 2 + 2 * 16, 2 + 2 * 12, 0] == 1 and strip[0, 0, 0, 0] == 0.5


@pytest.mark.parametrize("factor", [2, 4, 8, 16, 32, 64])
def test_latent_pixels_cover_exact_blocks_at_every_factor(factor):
    """Of a mask that is padded to whole latent pixels, too: the last row of a block belongs to that block alone."""
    mask = torch.zeros(1, 3 * factor - factor // 2, 2 * factor)
    mask[0, factor - 1, factor] = 1
    for known in (None, factor):
        assert downsample(mask, 3, 2, factor=known).mask.tolist() == [[[0, 1], [0, 0], [0, 0]]]
