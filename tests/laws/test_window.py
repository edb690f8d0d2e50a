"""The edit window: crop and paste are exact, and the cost of an edit follows the window (docs/methods.md, section 3)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.blended.pipeline import EditResult, EditSettings, blended_edit
from editkit.pipelines.blended.window import EditWindow, edit_window
from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.protocols import Context
from editkit.tests.toy_codec import ToyCodec, box, random_image
from editkit.tests.toys import ToyDenoiser, prompt


@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    places=st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=3),
    size=st.integers(1, 48),
    context=st.integers(0, 12),
    multiple=st.sampled_from([1, 4, 8]),
)
@settings(max_examples=150, deadline=None)
def test_the_window_holds_the_mask_and_pasting_back_is_the_identity(sizes, places, size, context, multiple):
    height, width = sizes
    mask = torch.zeros(len(places), height, width)
    for one, (y, x, tall, wide) in zip(mask, places, strict=True):
        top, left = int(y * (height - 1)), int(x * (width - 1))
        one[top : top + 1 + int(tall * height / 3), left : left + 1 + int(wide * width / 3)] = 1
    window = edit_window(mask, size=size, context=context, multiple=multiple)
    assert window.size[0] >= min(size, height) and window.size[1] >= min(size, width)
    assert all(top % multiple == left % multiple == 0 for top, left in window.corners)
    assert torch.equal(window.crop(mask).sum((1, 2)), mask.sum((1, 2)))  # nothing of a mask is outside
    for axis, (whole, side) in enumerate(zip(sizes, window.size, strict=True)):
        for one, corner in zip(mask, window.corners, strict=True):
            found = one.amax(1 - axis).nonzero().flatten()
            assert corner[axis] <= max(0, int(found[0]) - context) and corner[axis] + side <= whole
            assert corner[axis] + side >= min(whole, int(found[-1]) + 1 + context)
    image = random_image(len(places), height, width)
    cropped = window.crop(image)
    assert torch.equal(window.paste(cropped, image), image)
    outside = torch.ones(len(places), height, width)
    pasted = window.paste(cropped + 1, image)
    for one, (top, left) in zip(outside, window.corners, strict=True):
        one[top : top + window.size[0], left : left + window.size[1]] = 0
    assert torch.equal(pasted[outside > 0], image[outside > 0])
    assert torch.equal(window.crop(pasted), cropped + 1)


def test_the_same_window_cuts_latents():
    codec, image = ToyCodec(), random_image(2, 64, 48)
    mask = torch.cat([box(1, 64, 48, (3, 9), (2, 5)), box(1, 64, 48, (50, 61), (30, 44))])
    window = edit_window(mask, size=24, context=4)
    assert torch.equal(window.latent(codec.encode(image), 4), codec.encode(window.crop(image)))
    with pytest.raises(ParameterError, match="grid of 16"):
        edit_window(box(1, 64, 48, (28, 33), (20, 23)), size=9, context=0).latent(codec.encode(image), 16)


def test_one_window_serves_several_candidates_and_masks_share_its_size():
    image, mask = random_image(1, 40, 40), box(1, 40, 40, (30, 38), (1, 3))
    window = edit_window(mask, size=16, context=2)
    candidates = window.crop(image).repeat(3, 1, 1, 1) * torch.tensor([0.1, 0.2, 0.3])[:, None, None, None]
    pasted = window.paste(candidates, image)
    assert pasted.shape == (3, 40, 40, 3) and torch.equal(window.crop(pasted), candidates)
    both = edit_window(torch.cat([mask, box(1, 40, 40, (0, 30), (0, 30))]), size=16, context=2)
    assert both.size == (40, 40) and len(both.corners) == 2


def test_refusals_name_what_to_do():
    image, mask = random_image(1, 40, 40), box(1, 40, 40, (30, 38), (1, 3))
    window = edit_window(mask, size=16, context=2)
    with pytest.raises(ShapeError, match="made for 40 x 40"):
        window.crop(image[:, :20])
    with pytest.raises(ShapeError, match="the window is"):
        window.paste(image, image)
    with pytest.raises(ShapeError, match="window has 2"):
        EditWindow((40, 40), (8, 8), ((0, 0), (8, 8))).paste(torch.zeros(3, 8, 8, 3), image)
    for wrong in ({"size": 0}, {"context": -1}, {"multiple": 0}, {"size": True}):
        with pytest.raises(ParameterError):
            edit_window(mask, **wrong)
    with pytest.raises(ParameterError, match="mask is empty"):
        edit_window(mask * 0)


class Words:
    """A `TextEncoder` of numbers."""

    def encode(self, text: str) -> Context:
        return prompt(float(len(text)))

    encode_negative = encode


def costs(side: int, window: int) -> tuple[list[int], EditResult, torch.Tensor]:
    """Latent pixels of every model call, the result, and the source, for a mask of 16 pixels in an image of `side`."""
    seen = []

    def rule(z, sigma, value):
        seen.append(z.shape[0] * z.shape[-1] * z.shape[-2])
        return z * 0.5

    image, start = random_image(1, side, side), side // 2
    mask = box(1, side, side, (start, start + 16), (start, start + 16))
    chosen = EditSettings(steps=2, candidates=2, tune_steps=1, window=window, context_px=8)
    result = blended_edit(ToyDenoiser(rule, channels=3), ToyCodec(), Words(), image, mask, "word", settings=chosen)
    return seen, result, image


def test_the_cost_of_an_edit_follows_its_window():
    """A small mask in a large image costs what its window costs alone, whatever the image."""
    small, _, _ = costs(64, 64)
    large, result, image = costs(512, 64)
    assert large == small == [2 * 16 * 16] * len(small)
    assert result.change_outside == 0 and result.image.shape == (1, 512, 512, 3)
    assert (result.image != image).any()
    assert result.candidates.shape == (2, 512, 512, 3) and result.latents.shape[-2:] == (16, 16)
    whole, plain, _ = costs(64, 0)
    assert whole == small and torch.equal(
        plain.image, costs(64, 64)[1].image
    )  # a window of the whole image is no window
