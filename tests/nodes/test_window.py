"""The window's two nodes: crop, edit, paste."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.core.errors import EditError
from editkit.tests.nodes.graph import call
from editkit.tests.toy_codec import box, random_image


def test_an_edit_in_a_window_changes_only_what_the_mask_allows():
    source, mask = random_image(2, 61, 90), box(1, 61, 90, (50, 58), (70, 88))
    image, inside, window = call("CropWindow", image=source, mask=mask, size=24, context=4)
    assert image.shape[1] < 40 and inside.sum() == mask.sum()
    edited, _ = call("CompositeSource", edited=1 - image, source=image, mask=inside, feather=0)
    (whole,) = call("PasteWindow", edited=edited, source=source, window=window)
    changed = (whole != source).any(-1)
    assert torch.equal(changed.any(0), mask[0] > 0)


def test_refusals():
    source, mask = random_image(1, 40, 40), box(1, 40, 40, (5, 9), (5, 9))
    _, _, window = call("CropWindow", image=source, mask=mask, size=16, context=0)
    with pytest.raises(EditError, match="the window is 16 x 16"):
        call("PasteWindow", edited=source, source=source, window=window)
    with pytest.raises(EditError, match="window is a str"):
        call("PasteWindow", edited=source, source=source, window="16")
    with pytest.raises(EditError, match="mask is 20 x 40"):
        call("CropWindow", image=source, mask=mask[:, :, :20], size=16, context=0)
