"""Metrics with known values (T17) and the seam measure."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.core.errors import EditError, ParameterError, ShapeError
from editkit.pipelines.evaluation.metrics import (
    PSNR_CAP,
    clip_score,
    largest_change_outside,
    mse,
    psnr,
    psnr_outside,
    seam_contrast,
    wilson_interval,
)
from editkit.tests.toy_codec import box, random_image, smooth_image


def test_t17_vectors():
    image = 0.8 * random_image(2, 8, 9)
    assert psnr(image + 0.1, image).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(image, image).tolist() == [PSNR_CAP] * 2
    assert psnr(image, image, cap=60).tolist() == [60.0] * 2
    assert wilson_interval(27, 50) == pytest.approx((0.404, 0.670), abs=5e-4)
    assert float(clip_score(torch.tensor(0.312))) == pytest.approx(0.780)
    assert float(clip_score(torch.tensor(-0.2))) == 0


def test_psnr_averages_over_the_region_and_not_the_frame():
    source = 0.5 * smooth_image(1, 10, 10)
    mask = box(1, 10, 10, (0, 10), (0, 5))
    shifted = source + 0.1 * mask[..., None]
    assert float(psnr(shifted, source, mask)) == pytest.approx(20, abs=1e-4)
    assert float(psnr(shifted, source)) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert float(psnr_outside(shifted, source, mask)) == PSNR_CAP
    assert float(psnr_outside(shifted, source, 1 - mask)) == pytest.approx(20, abs=1e-4)
    half = 0.5 * torch.ones(1, 10, 10)  # weights, not a threshold
    assert float(psnr(shifted, source, half)) == pytest.approx(float(psnr(shifted, source)))
    assert torch.isnan(psnr(shifted, source, torch.zeros(1, 10, 10))).all()


def test_mse_is_averaged_over_the_region_or_the_frame():
    source = 0.5 * smooth_image(2, 10, 10)
    mask = box(1, 10, 10, (0, 10), (0, 5))
    shifted = source + 0.1 * mask[..., None]
    assert mse(shifted, source, mask).tolist() == pytest.approx([0.01, 0.01], rel=1e-4)
    assert mse(shifted, source, mask, over_frame=True).tolist() == pytest.approx([0.005, 0.005], rel=1e-4)
    assert mse(shifted, source).tolist() == pytest.approx([0.005, 0.005], rel=1e-4)
    assert mse(source, source).tolist() == mse(shifted, source, 1 - mask).tolist() == [0.0, 0.0]
    assert torch.isnan(mse(shifted, source, torch.zeros(1, 10, 10))).all()
    assert mse(torch.ones(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)).tolist() == [1.0]
    torch.testing.assert_close(-10 * mse(shifted, source, mask).log10(), psnr(shifted, source, mask))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_measures_do_not_depend_on_the_batch(height, width, batch):
    a, b = random_image(batch, height, width), random_image(batch, height, width, seed=1)
    masks = torch.rand(batch, height, width).round()
    for measure in (psnr, mse, psnr_outside, seam_contrast):
        whole = measure(a, b, masks)
        parts = torch.cat([measure(a[i : i + 1], b[i : i + 1], masks[i : i + 1]) for i in range(batch)])
        torch.testing.assert_close(whole, parts, equal_nan=True)
    torch.testing.assert_close(psnr(a, b), psnr(b, a))


def test_a_seam_is_the_step_that_nothing_explains():
    mask = box(1, 16, 16, (4, 12), (4, 12))
    flat = torch.full((1, 16, 16, 3), 0.4)
    assert float(seam_contrast(flat, flat, mask)) == 0
    assert float(seam_contrast(flat + 0.2 * mask[..., None], flat, mask)) == pytest.approx(0.2)
    ramp = torch.linspace(0, 1, 16)[None, None, :, None].expand(1, 16, 16, 3)
    assert float(seam_contrast(ramp, flat, mask)) < 1e-6  # a gradient that goes on is no seam
    assert float(seam_contrast(0.5 * ramp + 0.1 * mask[..., None], 0.5 * ramp, mask)) == pytest.approx(0.0833, abs=1e-3)
    one_side = flat + 0.1 * mask[..., None] * torch.tensor([1.0, 0, 0])
    assert float(seam_contrast(one_side, flat, mask)) == pytest.approx(0.1 / 3)


def test_the_borders_of_a_thin_stroke_do_not_excuse_each_other():
    stroke, flat = box(1, 9, 9, (4, 5), (0, 9)), torch.full((1, 9, 9, 3), 0.4)
    assert float(seam_contrast(flat + 0.2 * stroke[..., None], flat, stroke)) == pytest.approx(0.2)


def test_seams_of_the_source_do_not_count_and_only_the_border_does():
    mask = box(1, 16, 16, (4, 12), (4, 12))
    step = torch.full((1, 16, 16, 3), 0.4) + 0.3 * mask[..., None]
    assert float(seam_contrast(step, step, mask)) == 0  # an object that fills its mask
    flat, inner = torch.full((1, 16, 16, 3), 0.4), box(1, 16, 16, (6, 10), (6, 10))
    assert float(seam_contrast(flat + 0.3 * inner[..., None], flat, mask)) == 0
    for everywhere in (torch.ones(1, 16, 16), torch.zeros(1, 16, 16)):
        assert float(seam_contrast(step, flat, everywhere)) == 0
    soft = torch.stack([flat[0] + 0.2 * mask[0, ..., None], flat[0] + 0.05 * mask[0, ..., None]])
    strong, weak = seam_contrast(soft, flat, mask).tolist()
    assert strong == pytest.approx(4 * weak)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["ok", "nan", "size", "batch"]))
@settings(max_examples=40, deadline=None)
def test_any_input_gives_numbers_or_an_edit_error(height, width, kind):
    image, source = random_image(2, height, width), random_image(1, height, width, seed=1)
    mask = torch.rand(3 if kind == "batch" else 2, height + (kind == "size"), width)
    if kind == "nan":
        image[0, 0, 0, 0] = float("nan")
    for measure in (psnr, psnr_outside, seam_contrast):
        if kind == "ok":
            assert measure(image, source, mask).shape == (2,)
        else:
            with pytest.raises(ShapeError):
                measure(image, source, mask)


def test_refusals():
    for hits, trials in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ParameterError):
            wilson_interval(hits, trials)
    with pytest.raises(EditError, match="image is 4 x 4"):
        largest_change_outside(random_image(1, 4, 4), random_image(1, 5, 4), torch.ones(1, 4, 4))
