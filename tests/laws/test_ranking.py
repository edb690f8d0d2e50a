"""CLIP ranking (docs/methods.md, section 4), with a ranker of colours."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editkit.pipelines.core.errors import EditError, ParameterError, ShapeError
from editkit.pipelines.evaluation.clip_ranking import REGIONS, blur, rank_by_text
from editkit.tests.toy_codec import ColourRanker, box, random_image


def flat(*colours: tuple[float, float, float], size: int = 8) -> Tensor:
    return torch.tensor(colours)[:, None, None, :].expand(-1, size, size, -1).contiguous()


RED, GREEN, PINK, BLACK = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.5, 0.5), (0.0, 0.0, 0.0)


def test_the_right_colour_comes_first_with_its_cosine():
    ranking = rank_by_text(flat(GREEN, PINK, RED), "red", ColourRanker())
    assert ranking.order.tolist() == [2, 1, 0]
    assert ranking.scores.dtype == torch.float32
    colour = torch.tensor([1.001, 0.502, 0.503])
    assert float(ranking.scores[1]) == pytest.approx(float(colour[0] / colour.norm()), abs=1e-6)
    assert torch.equal(ranking.images, flat(RED, PINK, GREEN))
    latents = torch.arange(3.0)[:, None]
    assert ranking.apply(latents).flatten().tolist() == [2, 1, 0]
    assert rank_by_text(flat(GREEN, PINK, RED), "green", ColourRanker()).order.tolist() == [0, 1, 2]


@given(st.permutations(range(7)), st.sampled_from(REGIONS), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_permuting_the_images_permutes_the_ranking(order, region, chunk):
    images, masks = (
        random_image(7, 9, 12),
        torch.stack([box(1, 9, 12, (i, i + 3), (i, 7))[0] for i in range(6, -1, -1)]),
    )
    plain = rank_by_text(images, "blue", ColourRanker(), mask=masks, region=region)
    shuffled = rank_by_text(images[order], "blue", ColourRanker(), mask=masks[order], region=region, chunk=chunk)
    assert [order[i] for i in shuffled.order] == plain.order.tolist()
    torch.testing.assert_close(shuffled.scores, plain.scores)
    assert torch.equal(shuffled.images, plain.images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
def test_identical_images_keep_their_order(dtype, chunk):
    images = torch.cat([flat(PINK), flat(RED).expand(3, -1, -1, -1), flat(PINK).expand(2, -1, -1, -1)])
    assert rank_by_text(images, "red", ColourRanker(dtype), chunk=chunk).order.tolist() == [1, 2, 3, 0, 4, 5]


class Drifting(ColourRanker):
    """Rounds differently in every call, as kernels do for batches of different sizes."""

    def embed_images(self, images: Tensor) -> Tensor:
        vectors = super().embed_images(images)
        return vectors + 1e-6 * len(self.seen)


def test_identical_views_are_judged_once():
    images = torch.cat([flat(PINK), flat(RED), flat(PINK), flat(PINK), flat(RED)])
    ranker = Drifting()
    assert rank_by_text(images, "green", ranker, chunk=1).order.tolist() == [0, 2, 3, 1, 4]
    assert len(ranker.seen) == 2


def test_masked_shows_the_region_on_black_uncropped():
    image, mask, ranker = random_image(2, 6, 8), box(1, 6, 8, (1, 3), (2, 5)), ColourRanker()
    mask[0, 5, 7] = 0.49  # below a half: outside
    rank_by_text(image, "red", ranker, mask=mask)
    seen = ranker.seen[0]
    assert seen.shape == (2, 8, 8, 3)  # bars to a square, nothing cut
    assert torch.equal(seen[:, 1:7], image * (mask >= 0.5)[..., None])
    assert not seen[:, [0, 7]].any()


def test_only_the_region_decides():
    images = flat(GREEN, GREEN)
    mask = box(1, 8, 8, (2, 5), (2, 5))
    images[1] = torch.where(mask[0, ..., None] > 0, images[1], torch.tensor(RED))
    images[0] = torch.where(mask[0, ..., None] > 0, torch.tensor(RED), images[0])
    for region, first in (("masked", 0), ("crop", 0), ("keep", 1)):
        assert rank_by_text(images, "red", ColourRanker(), mask=mask, region=region).order[0] == first
    assert rank_by_text(images, "red", ColourRanker()).order[0] == 1


def test_each_image_has_its_own_mask():
    image = flat(GREEN)
    image[:, :, :4] = torch.tensor(RED)
    masks = torch.cat([box(1, 8, 8, (0, 8), (4, 8)), box(1, 8, 8, (0, 8), (0, 4))])
    assert rank_by_text(image.expand(2, -1, -1, -1), "red", ColourRanker(), mask=masks).order.tolist() == [1, 0]


def test_crop_is_a_square_around_the_box():
    image, ranker = random_image(1, 40, 60), ColourRanker()
    rank_by_text(image, "red", ranker, mask=box(1, 40, 60, (12, 32), (30, 40)), region="crop")
    assert torch.equal(ranker.seen[0], image[:, 10:34, 23:47])
    rank_by_text(image, "red", ranker, mask=box(1, 40, 60, (0, 20), (50, 60)), region="crop")
    assert torch.equal(ranker.seen[1], image[:, 0:24, 36:60])  # moved back into the image
    rank_by_text(image, "red", ranker, mask=box(1, 40, 60, (0, 2), (0, 60)), region="crop")
    assert ranker.seen[2].shape == (1, 60, 60, 3)
    assert torch.equal(ranker.seen[2][:, 10:50], image)


def test_blur_keeps_the_inside_sharp():
    image, mask, ranker = random_image(1, 24, 24), box(1, 24, 24, (8, 16), (8, 16)), ColourRanker()
    rank_by_text(image, "red", ranker, mask=mask, region="blur")
    seen, inside = ranker.seen[0], mask[0] > 0
    assert torch.equal(seen[0][inside], image[0][inside])
    assert seen[0][~inside].std() < 0.5 * image[0][~inside].std()
    torch.testing.assert_close(blur(flat(PINK), 2.0), flat(PINK))
    point = torch.zeros(1, 41, 41, 3)
    point[0, 20, 20] = 1
    ys = torch.arange(41.0)
    spread = ((blur(point, 3.0)[0, ..., 0].sum(1) * (ys - 20) ** 2).sum()) ** 0.5
    assert float(spread) == pytest.approx(3.0, rel=0.02)


def test_a_black_region_has_one_score_and_the_text_scale_none():
    images = random_image(3, 8, 8)
    corner = box(1, 8, 8, (0, 2), (0, 2))
    images[:, :2, :2] = 0
    ranking = rank_by_text(images, "red", ColourRanker(), mask=corner)
    assert ranking.order.tolist() == [0, 1, 2]
    assert ranking.scores.unique().numel() == 1
    usual = rank_by_text(random_image(4, 8, 8), "red", ColourRanker()).scores
    torch.testing.assert_close(rank_by_text(random_image(4, 8, 8), "red", ColourRanker(text_scale=7.0)).scores, usual)


@pytest.mark.parametrize("region", ["masked", "crop", "blur"])
def test_an_empty_mask_keeps_the_order_and_says_so(region, caplog):
    with caplog.at_level(logging.WARNING, "editkit"):
        ranking = rank_by_text(flat(GREEN, RED), "red", ColourRanker(), mask=torch.zeros(1, 8, 8), region=region)
    assert ranking.order.tolist() == [0, 1]
    assert "empty" in caplog.text


def test_keep_takes_the_best():
    images = flat(GREEN, PINK, RED)
    assert rank_by_text(images, "red", ColourRanker(), keep=2).order.tolist() == [2, 1]
    assert rank_by_text(images, "red", ColourRanker(), keep=9).order.tolist() == [2, 1, 0]
    best = rank_by_text(images, "red", ColourRanker(), keep=1)
    assert best.apply(torch.arange(3)).tolist() == [2]
    assert best.images.shape == (1, 8, 8, 3)
    assert rank_by_text(images[:1], "red", ColourRanker()).order.tolist() == [0]
    with pytest.raises(ShapeError, match="3 images were ranked but the other batch has 2"):
        best.apply(torch.zeros(2, 4, 1, 1))


class Broken(ColourRanker):
    def embed_images(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 3), float("nan"))


def test_refusals():
    image = flat(RED)
    for wrong in ({"region": "outside"}, {"keep": -1}, {"chunk": 0}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            rank_by_text(image, "red", ColourRanker(), **wrong)
    with pytest.raises(ParameterError, match="text is empty"):
        rank_by_text(image, "  ", ColourRanker())
    with pytest.raises(EditError, match="NaN"):
        rank_by_text(image, "red", Broken())


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batches=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    fill=st.sampled_from(["empty", "full", "random", "nan", "size"]),
    region=st.sampled_from(REGIONS),
    keep=st.integers(0, 5),
    chunk=st.integers(1, 5),
)
@settings(max_examples=120, deadline=None)
def test_any_input_gives_a_ranking_or_an_edit_error(sizes, batches, fill, region, keep, chunk):
    height, width = sizes
    mask = {
        "empty": torch.zeros(1, height, width),
        "full": torch.ones(1, height, width),
        "random": torch.rand(1, height, width),
        "nan": torch.full((1, height, width), float("nan")),
        "size": torch.ones(1, height + 1, width),
    }[fill].repeat(batches[1], 1, 1)
    fits = region == "keep" or (fill not in ("nan", "size") and batches[1] in (1, batches[0]))
    try:
        ranking = rank_by_text(
            random_image(batches[0], height, width),
            "red",
            ColourRanker(),
            mask=mask,
            region=region,
            keep=keep,
            chunk=chunk,
        )
    except EditError:
        assert not fits
        return
    kept = min(keep or batches[0], batches[0])
    assert fits
    assert len(set(ranking.order.tolist())) == kept == len(ranking.scores) == len(ranking.images)
    if fill != "empty":
        assert (ranking.scores.diff() <= 0).all()


def test_a_picked_image_comes_first_and_the_others_keep_their_order():
    images = flat(GREEN, PINK, RED)
    ranking = rank_by_text(images, "red", ColourRanker(), pick=0)
    assert ranking.order.tolist() == [0, 2, 1]
    best = rank_by_text(images, "red", ColourRanker())
    assert torch.equal(ranking.all_scores, best.all_scores)
    assert torch.equal(ranking.scores, ranking.all_scores[ranking.order])
    assert rank_by_text(images, "red", ColourRanker(), pick=1, keep=1).images.tolist() == images[1:2].tolist()
    for pick in (3, -2):
        with pytest.raises(ParameterError, match="3 images"):
            rank_by_text(images, "red", ColourRanker(), pick=pick)
