"""One's own image takes the place of the example by connecting Load Image."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.tests.nodes.graph import call

IMAGE = torch.rand(1, 30, 44, 3)


def test_an_own_image_and_mask_pass_through():
    mask = torch.zeros(1, 30, 44)
    mask[:, 4:9] = 1
    image, passed, caption = call("LoadExample", own_image=IMAGE, own_mask=mask)
    assert torch.equal(image, IMAGE) and torch.equal(passed, mask) and caption == ""


def test_an_image_without_a_painted_mask_gets_an_empty_one_of_its_size():
    for mask in ({}, {"own_mask": torch.zeros(1, 64, 64)}):
        passed = call("LoadExample", own_image=IMAGE, **mask)[1]
        assert passed.shape == (1, 30, 44) and not passed.any()
    with pytest.raises(ParameterError, match="mask is empty, so nothing would be edited"):
        call("LatentMask", mask=passed, latent={"samples": torch.zeros(1, 4, 4, 6), "editkit_size": (30, 44)})


def test_a_mask_alone_and_one_of_another_image_are_refused():
    with pytest.raises(ParameterError, match="own_mask is connected but own_image is not"):
        call("LoadExample", own_mask=torch.ones(1, 8, 8))
    with pytest.raises(ShapeError, match="own_mask is 64 x 64 pixels but the image is 44 x 30"):
        call("LoadExample", own_image=IMAGE, own_mask=torch.ones(1, 64, 64))
