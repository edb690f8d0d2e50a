"""The report of an edit: SSIM against its definition, conventions side by side, one page per image."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.evaluation.metrics import change_outside, largest_change_outside, psnr, psnr_outside, ssim
from editkit.pipelines.evaluation.report import measure_edit
from editkit.tests.toy_codec import box, random_image, smooth_image


class ToyRanker:
    """Ranks by brightness: the cosine of an image and any text is its mean minus 0.2."""

    device = torch.device("cpu")

    def embed_texts(self, texts):
        return torch.tensor([[1.0, 0.0]]).repeat(len(texts), 1)

    def embed_images(self, images):
        cosine = images.mean(dim=(1, 2, 3)) - 0.2
        return torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)


# --------------------------------------------------------------------------------------------------------------- ssim
def test_ssim_is_scikit_images():
    """With Wang's settings: Gaussian weights, sigma 1.5 cut to 11 pixels, population variances."""
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a = smooth_image(2, 24, 31)
    b = (a + 0.2 * random_image(2, 24, 31, seed=3)).clamp(0, 1)
    expected = [
        structural_similarity(
            x.numpy(), y.numpy(), channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a.double(), b.double(), strict=True)
    ]  # fmt: skip
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_ssim_of_flat_pictures_is_their_brightness_term():
    a, b = 0.3, 0.7
    flat = [torch.full((1, 12, 15, 3), value) for value in (a, b)]
    assert float(ssim(*flat)) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(11, 20), st.integers(11, 20), st.integers(1, 3))
def test_ssim_is_symmetric_at_most_1_and_independent_of_the_batch(height, width, batch):
    a, b = random_image(batch, height, width), random_image(batch, height, width, seed=1)
    assert ssim(a, a).tolist() == [1.0] * batch
    values = ssim(a, b)
    assert (values < 1).all()
    torch.testing.assert_close(values, ssim(b, a))
    assert torch.equal(values, torch.cat([ssim(a[i : i + 1], b[i : i + 1]) for i in range(batch)]))


def test_ssim_of_a_region_sees_no_pixel_outside_it():
    source = smooth_image(1, 40, 40)
    mask = box(1, 40, 40, (0, 40), (0, 15))
    edited = torch.where(mask[..., None] > 0, random_image(1, 40, 40), source)
    assert float(ssim(edited, source, 1 - mask)) == 1
    assert float(ssim(edited, source)) < 0.95
    cropped = ssim(edited[:, :, :15], source[:, :, :15])
    torch.testing.assert_close(ssim(edited, source, mask), cropped)


def test_nothing_to_compare_is_nan():
    image, small = random_image(2, 20, 20), random_image(1, 10, 40)
    assert torch.isnan(ssim(small, small))
    assert torch.isnan(ssim(image, image, box(1, 20, 20, (0, 20), (0, 10)))).all()


# --------------------------------------------------------------------------------------------------------------- psnr
def test_psnr_over_the_frame_is_larger_by_the_share_of_the_region():
    source = 0.5 * smooth_image(1, 10, 10)
    mask = box(1, 10, 10, (0, 10), (0, 4))
    shifted = source + 0.1
    assert float(psnr(shifted, source, mask, over_frame=True)) == pytest.approx(20 - 10 * math.log10(0.4), abs=1e-3)
    assert float(psnr_outside(shifted, source, mask, over_frame=True)) == pytest.approx(
        20 - 10 * math.log10(0.6), abs=1e-3
    )
    assert torch.isnan(psnr(shifted, source, torch.zeros(1, 10, 10), over_frame=True))


def test_change_outside_is_each_pictures_own():
    source, mask = 0.5 * random_image(3, 8, 8), box(1, 8, 8, (2, 6), (2, 6))
    edited = source + 0.4 * mask[..., None]
    edited[1, 0, 0, 2] += 0.25
    assert change_outside(edited, source, mask).tolist() == pytest.approx([0, 0.25, 0])
    assert largest_change_outside(edited, source, mask) == pytest.approx(0.25)
    assert change_outside(edited, source, torch.ones(1, 8, 8)).tolist() == [0, 0, 0]


# ----------------------------------------------------------------------------------------------------------- measures
def edit():
    source, mask = 0.8 * smooth_image(1, 32, 32), box(1, 32, 32, (8, 24), (8, 24))
    return source, (source + 0.1 * mask[..., None]), mask


def test_the_table_of_a_known_edit():
    source, edited, mask = edit()
    measures = measure_edit(source, edited, mask=mask, text="bright", ranker=ToyRanker())
    cosine = float(edited.mean()) - 0.2
    for name, value in {
        "PSNR (dB)": 20 + 10 * math.log10(4),
        "PSNR inside": 20,
        "PSNR outside the mask": 100,
        "PSNR outside, over": 100,
        "MSE inside the mask": 10,
        "MSE outside the mask": 0,
        "MSE outside, over": 0,
        "largest change outside": 0,
        "text: cosine": cosine,
        "text: CLIPScore": 2.5 * cosine,
        "text: 100": 100 * cosine,
        "text: cosine of the source": float(source.mean()) - 0.2,
    }.items():
        assert float(measures.value(name)) == pytest.approx(value, abs=1e-3), name
    assert float(measures.value("seam")) > 0.05
    lines = measures.table().splitlines()
    assert lines[0] == "measure\timage 1"
    assert "PSNR inside the mask (dB)\t20.00" in lines and len(lines) == 16
    with pytest.raises(KeyError):
        measures.value("nothing")


def test_identical_pictures():
    source = smooth_image(2, 16, 16)
    measures = measure_edit(source, source.clone(), mask=torch.zeros(1, 16, 16))
    assert measures.value("PSNR (dB)").tolist() == [100, 100] and measures.value("SSIM (").tolist() == [1, 1]
    rows = dict(line.split("\t", 1) for line in measures.table().splitlines())
    assert rows["measure"] == "image 1\timage 2\tmean"
    assert rows["PSNR inside the mask (dB)"] == "-\t-\t-"
    assert rows["largest change outside (of 255)"] == "0.00\t0.00\t0.00"


def test_numbers_do_not_depend_on_the_batch():
    source, edited = random_image(3, 20, 24), random_image(3, 20, 24, seed=1)
    masks = torch.stack([box(1, 20, 24, (0, n), (0, 24))[0] for n in (4, 10, 20)])
    options = dict(text="bright", ranker=ToyRanker())
    whole = measure_edit(source, edited, mask=masks, **options)
    for index in range(3):
        part = slice(index, index + 1)
        single = measure_edit(source[part], edited[part], mask=masks[part], **options)
        for row, alone in zip(whole.rows, single.rows, strict=True):
            torch.testing.assert_close(row.values[part], alone.values, equal_nan=True)
        assert torch.equal(whole.report()[part], single.report())


def test_the_report_shows_where_it_changed():
    source, edited, mask = edit()
    page, other = (measure_edit(source, value, mask=mask).report() for value in (edited, source))
    assert page.shape == other.shape and page.shape[0] == 1 and page.shape[-1] == 3
    assert not torch.equal(page, other)
    assert (page[0] == 0).all(-1).sum() > 100 * 100  # the mask, of which most is black


def test_refusals_name_the_sockets():
    source, edited, mask = edit()
    with pytest.raises(ParameterError, match="ranker is not connected"):
        measure_edit(source, edited, text="bright")
    with pytest.raises(ParameterError, match="text is empty"):
        measure_edit(source, edited, text=" ", ranker=ToyRanker())
    with pytest.raises(ShapeError, match="edited is"):
        measure_edit(source[:, :9], edited)
    with pytest.raises(ShapeError, match="mask is"):
        measure_edit(source, edited, mask=mask[:, :9])
    with pytest.raises(ShapeError):
        measure_edit(source.repeat(2, 1, 1, 1), edited.repeat(3, 1, 1, 1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["soft", "empty", "full"]))
def test_any_size_gives_a_table_and_a_page(height, width, fill):
    source, edited = random_image(1, height, width), random_image(2, height, width, seed=1)
    mask = {
        "soft": torch.rand(1, height, width),
        "empty": torch.zeros(1, height, width),
        "full": torch.ones(1, height, width),
    }
    measures = measure_edit(source, edited, mask=mask[fill])
    assert torch.isfinite(measures.report()).all() and measures.report().shape[0] == 2
    assert len(measures.table().splitlines()) == 12
