"""Blending without learning: pixels, exact composite, Poisson (methods.md, section 3)."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editkit.pipelines.blended.composite import (
    blend_pixels,
    composite_source,
    distance_inside,
    feather,
    from_linear,
    to_linear,
)
from editkit.pipelines.blended.poisson import blend_poisson
from editkit.pipelines.core.errors import EditError, ParameterError, ShapeError
from editkit.pipelines.evaluation.metrics import largest_change_outside
from editkit.tests.toy_codec import box, random_image, smooth_image


def blob(height: int, width: int, seed: int = 0, share: float = 0.5) -> Tensor:
    """A ragged random mask [1, H, W]."""
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)[:, 0]
    return (smooth > smooth.flatten().quantile(1 - share)).float()


# --------------------------------------------------------------------------------------------------------- pixels
def test_pixels_are_the_convex_mix_and_exact_at_both_ends():
    edited, source = random_image(2, 9, 7), random_image(2, 9, 7, seed=1)
    mask = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(2))
    mask[:, :3], mask[:, 6:] = 0, 1
    out = blend_pixels(edited, source, mask)
    torch.testing.assert_close(out, mask[..., None] * edited + (1 - mask[..., None]) * source)
    assert torch.equal(out[:, :3], source[:, :3])
    assert torch.equal(out[:, 6:], edited[:, 6:])


def test_linear_light_mixes_light():
    black, white, mask = torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 1, 3), torch.full((1, 1, 1), 0.5)
    assert float(blend_pixels(white, black, mask).max()) == 0.5
    assert float(blend_pixels(white, black, mask, linear_light=True).max()) == pytest.approx(0.7353570, abs=1e-5)
    quarter = torch.full((1, 1, 1), 0.25)  # a quarter of the edit's light, not of the source's
    assert float(blend_pixels(white, black, quarter, linear_light=True).max()) == pytest.approx(0.5370987, abs=1e-5)
    assert float(blend_pixels(black, white, quarter, linear_light=True).max()) == pytest.approx(0.8808250, abs=1e-5)
    values = torch.linspace(-0.5, 1.5, 101)
    torch.testing.assert_close(from_linear(to_linear(values)), values, atol=1e-5, rtol=0)


def test_composite_changes_nothing_outside_and_measures_it():
    edited, source, mask = random_image(3, 20, 15), random_image(1, 20, 15, seed=1), blob(20, 15)
    for width in (0, 1, 4):
        out, change = composite_source(edited, source, mask, feather_px=width)
        outside = (mask == 0)[..., None].expand_as(out)
        assert change == 0.0
        assert torch.equal(out[outside], source.expand_as(out)[outside])
    out, _ = composite_source(edited, source, mask)
    assert torch.equal(out[~outside], edited[~outside])
    shifted = source.clone()
    shifted[0, 3, 4, 1] += 0.25
    nowhere = torch.zeros(1, 20, 15)
    assert largest_change_outside(shifted, source, nowhere) == pytest.approx(0.25, abs=1e-6)
    nowhere[0, 3, 4] = 1
    assert largest_change_outside(shifted, source, nowhere) == 0.0


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_feather_is_the_euclidean_ramp(height, width, ramp, seed):
    mask = blob(height, width, seed)
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([ys, xs], -1).float().reshape(-1, 2)
    outside = points[mask.reshape(-1) == 0]
    if len(outside):
        distance = (
            torch.cdist(points, outside, compute_mode="donot_use_mm_for_euclid_dist")
            .min(1)
            .values.reshape(1, height, width)
        )
    else:
        distance = torch.full((1, height, width), float("inf"))
    torch.testing.assert_close(distance_inside(mask, ramp + 1), distance.clamp(max=ramp + 1))
    soft = feather(mask, ramp)
    torch.testing.assert_close(soft, mask * (distance / (ramp + 1)).clamp(max=1) if ramp else mask)
    assert (soft[mask == 0] == 0).all()


def test_a_feather_that_eats_a_thin_stroke_says_so(caplog):
    stroke = box(1, 20, 20, (10, 12), (0, 20))
    with caplog.at_level(logging.WARNING, "editkit"):
        feather(box(1, 20, 20, (2, 18), (2, 18)), 1)
        assert not caplog.records
        feather(stroke, 8)
    assert "thinner" in caplog.text


# -------------------------------------------------------------------------------------------------------- poisson
def dense_poisson(edited: Tensor, source: Tensor, inside: Tensor) -> Tensor:
    """The same equation in double precision by elimination: [H, W, 3]."""
    height, width = inside.shape
    unknown = {(int(y), int(x)): i for i, (y, x) in enumerate(inside.nonzero())}
    matrix = torch.zeros(len(unknown), len(unknown), dtype=torch.float64)
    right = torch.zeros(len(unknown), 3, dtype=torch.float64)
    for (y, x), i in unknown.items():
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= near[0] < height and 0 <= near[1] < width):
                continue
            matrix[i, i] += 1
            right[i] += (edited[y, x] - edited[near]).double()
            if near in unknown:
                matrix[i, unknown[near]] -= 1
            else:
                right[i] += source[near].double()
    values = torch.linalg.solve(matrix, right)
    out = source.double().clone()
    for (y, x), i in unknown.items():
        out[y, x] = values[i]
    return out.clamp(0, 1).float()


@given(st.integers(2, 17), st.integers(2, 17), st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_poisson_is_the_dense_solution(height, width, share, seed):
    mask = blob(height, width, seed, share)
    mask.view(-1)[seed % mask.numel()] = 0
    edited, source = random_image(1, height, width, seed=seed), random_image(1, height, width, seed=seed + 1)
    out = blend_poisson(edited, source, mask)
    expected = dense_poisson(edited[0], source[0], mask[0] > 0) if mask.any() else source[0]
    torch.testing.assert_close(out[0], expected, atol=1e-4, rtol=0)
    assert torch.equal(out[mask == 0], source[mask == 0])


@pytest.mark.parametrize("size", [(97, 131), (160, 160)])
def test_poisson_converges_on_large_masks(size, caplog):
    mask = torch.ones(1, *size)
    mask[0, 0, 0] = 0  # one fixed pixel: the slowest case there is
    x = torch.linspace(0, 1, size[1])[None, None, :, None].expand(1, *size, 3)
    edited, source = 0.5 * x.contiguous() + 0.3, 0.5 * x + 0.1
    with caplog.at_level(logging.WARNING, "editkit"):
        out = blend_poisson(edited, source, mask)
    torch.testing.assert_close(out, source.contiguous(), atol=5e-4, rtol=0)
    assert not caplog.records


def test_poisson_forgets_a_constant_offset_and_keeps_gradients():
    source = 0.25 + 0.5 * smooth_image(2, 33, 26)
    mask = blob(33, 26, 3)
    torch.testing.assert_close(blend_poisson(source + 0.2, source, mask), source, atol=2e-5, rtol=0)
    assert torch.equal(blend_poisson(source, source, mask), source)
    stripes = source.clone()
    stripes[:, ::2] += 0.05
    out = blend_poisson(stripes, source, box(1, 33, 26, (5, 28), (5, 21)))
    middle = (out - source)[:, 12:20, 10:16].mean(-1).diff(dim=1).abs()
    torch.testing.assert_close(middle, torch.full_like(middle, 0.05), atol=5e-3, rtol=0)


def test_poisson_with_a_harmonic_border():
    """Flat edit: the inside is the harmonic extension, and x + 2 y is its own."""
    ys, xs = torch.meshgrid(torch.linspace(0, 0.5, 21), torch.linspace(0, 0.4, 23), indexing="ij")
    source = (xs + ys)[None, ..., None].repeat(1, 1, 1, 3)
    out = blend_poisson(torch.full_like(source, 0.7), source, blob(21, 23, 4) * box(1, 21, 23, (1, 20), (1, 22)))
    torch.testing.assert_close(out, source, atol=5e-5, rtol=0)


def test_poisson_takes_a_pixel_from_a_half():
    edited, source = random_image(1, 9, 9), random_image(1, 9, 9, seed=1)
    hard = blob(9, 9, 2)
    assert torch.equal(blend_poisson(edited, source, 0.5 * hard), blend_poisson(edited, source, hard))
    assert torch.equal(blend_poisson(edited, source, 0.49 * hard), source)


def test_poisson_full_and_empty_masks():
    edited, source = random_image(2, 11, 6), random_image(2, 11, 6, seed=1)
    assert torch.equal(blend_poisson(edited, source, torch.ones(1, 11, 6)), edited)
    assert torch.equal(blend_poisson(edited, source, torch.zeros(1, 11, 6)), source)
    one_each = torch.stack([torch.ones(11, 6), torch.zeros(11, 6)])
    assert torch.equal(blend_poisson(edited, source, one_each), torch.stack([edited[0], source[1]]))


def test_poisson_images_of_a_batch_do_not_meet():
    edited, source = random_image(3, 30, 22), random_image(3, 30, 22, seed=1)
    masks = torch.cat([blob(30, 22, 7), blob(30, 22, 8, 0.9), torch.zeros(1, 30, 22)])
    together = blend_poisson(edited, source, masks)
    for i in range(3):
        alone = blend_poisson(edited[i : i + 1], source[i : i + 1], masks[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=5e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- fuzz
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    other=st.booleans(),
    batches=st.tuples(*[st.integers(1, 4)] * 3),
    fill=st.sampled_from(["empty", "full", "ragged", "soft", "nan", "high"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    ramp=st.integers(0, 5),
    method=st.sampled_from(["pixels", "linear", "composite", "poisson"]),
)
@settings(max_examples=150, deadline=None)
def test_any_input_gives_an_image_or_an_edit_error(sizes, other, batches, fill, dtype, ramp, method):
    height, width = sizes
    edited = random_image(batches[0], height, width).to(dtype)
    source = random_image(batches[1], height + other, width, seed=1).to(dtype)
    mask = {
        "empty": torch.zeros(1, height, width),
        "full": torch.ones(1, height, width),
        "ragged": blob(height, width),
        "soft": torch.rand(1, height, width),
        "nan": torch.full((1, height, width), float("nan")),
        "high": torch.full((1, height, width), 255.0),
    }[fill].to(dtype)
    mask = mask.repeat(batches[2], 1, 1)
    run = {
        "pixels": lambda: blend_pixels(edited, source, mask, feather_px=ramp),
        "linear": lambda: blend_pixels(edited, source, mask, feather_px=ramp, linear_light=True),
        "composite": lambda: composite_source(edited, source, mask, feather_px=ramp)[0],
        "poisson": lambda: blend_poisson(edited, source, mask),
    }[method]
    fits = not other and fill not in ("nan", "high") and all(b in (1, max(batches)) for b in batches)
    try:
        out = run()
    except EditError:
        assert not fits
        return
    assert fits
    assert out.shape == (max(batches), height, width, 3)
    assert torch.isfinite(out).all()
    outside = (mask == 0).expand(max(batches), -1, -1)
    assert torch.equal(out[outside], source.float().expand_as(out)[outside])


def test_refusals():
    image, mask = random_image(1, 4, 4), torch.ones(1, 4, 4)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ParameterError, match="feather_px"):
            blend_pixels(image, image, mask, feather_px=wrong)
    with pytest.raises(ShapeError, match="edited is 4 x 4 pixels but mask is 3 x 4"):
        blend_poisson(image, image, mask[:, :, :3])
