"""Real photographs at odd sizes through the whole chain: same size out, nothing outside the mask changed, decoder tuned."""

from __future__ import annotations

import pytest
import torch
from skimage import data

from editkit.pipelines.blended.pipeline import EditSettings, blended_edit


def photograph(name: str, height: int, width: int) -> torch.Tensor:
    """A crop of one of scikit-image's photographs, [1, height, width, 3]."""
    image = torch.from_numpy(getattr(data, name)()).float()[None] / 255
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()


@pytest.mark.parametrize("name, height, width", [("astronaut", 131, 97), ("coffee", 100, 150), ("chelsea", 90, 113)])
def test_photographs_keep_their_size_and_their_outside(model, name, height, width):
    image, mask = photograph(name, height, width), torch.zeros(1, height, width)
    mask[:, height // 3 : height // 2, width // 4 : width // 2] = 1
    settings = EditSettings(steps=4, candidates=1, tune_steps=30)
    result = blended_edit(
        model.denoiser, model.codec, model.text, image, mask, "a red circle on a white background", settings=settings
    )  # fmt: skip
    assert result.image.shape == image.shape and result.candidates.shape == image.shape
    assert result.change_outside == 0 and torch.equal(result.image[mask == 0], image[mask == 0])
    assert result.psnr_tuned - result.psnr_plain >= 4
    assert not torch.equal(result.image, image)
