"""From differences to a mask: DiffEdit's rule, and the images of masks and heat (T12; docs/methods.md, section 6)."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.masks import remove_islands
from editkit.pipelines.diffedit.mask import MaskRule, heat_image, mask_in_pixels
from editkit.tests.toys import random_latent


def test_t12_the_rule_on_four_latent_pixels():
    mask, heat = MaskRule()(torch.tensor([[[1.0, 1.0, 1.0, 5.0]]]))
    assert mask.tolist() == [[[0, 0, 0, 1]]]
    assert torch.allclose(heat, torch.tensor([[[1, 1, 1, 5]]]) / 6)


def test_the_published_rule_is_one_and_a_half_means():
    g = random_latent(3, 8, 8, seed=2).abs()
    mask, heat = MaskRule()(g)
    assert torch.equal(mask, (g > 1.5 * g.mean(dim=(1, 2), keepdim=True)).float())
    assert heat.max() == 1 and heat.min() >= 0 and 0 < mask.mean() < 1


def test_a_latent_pixel_at_the_threshold_stays():
    """The published rule is map <= 0.5 -> 0: heat 1.5 / (3 x 1) is the threshold itself."""
    mask, heat = MaskRule()(torch.tensor([[[1.5, 0.5]]]))
    assert heat[0, 0, 0] == 0.5 and mask.sum() == 0


def test_each_image_has_its_own_threshold_unless_published():
    g = random_latent(2, 8, 8, seed=2).abs() * torch.tensor([1.0, 50.0]).view(2, 1, 1)
    together, alone = MaskRule()(g)[0], MaskRule()(g[:1])[0]
    assert torch.equal(together[:1], alone) and alone.sum() > 0
    published = MaskRule(batch_mean=True)(g)[0]
    assert torch.equal(published, (g > 1.5 * g.mean()).float()) and published[0].sum() == 0


def test_scaling_the_differences_changes_nothing():
    g = random_latent(2, 8, 8, seed=5).abs()
    assert torch.equal(MaskRule()(g)[0], MaskRule()(g * 64)[0])


def test_smoothing_and_islands():
    g = torch.full((1, 9, 9), 0.01)
    g[:, 1, 1], g[:, 4:8, 4:8] = 1, 1
    plain, smooth = MaskRule()(g)[0], MaskRule(smooth=3)(g)[0]
    assert plain[0, 1, 1] == 1 and smooth[0, 1, 1] == 0 and smooth[0, 5:7, 5:7].all()
    kept = MaskRule(smallest_island=2)(g)[0]
    assert kept[0, 1, 1] == 0 and torch.equal(kept[0, 4:8, 4:8], plain[0, 4:8, 4:8]) and kept.sum() == 16


def test_islands_connect_by_corners_and_along_snakes():
    mask = torch.zeros(2, 9, 9)
    for row in range(0, 9, 2):
        mask[0, row] = 1
    mask[0, 1, 8] = mask[0, 3, 0] = mask[0, 5, 8] = mask[0, 7, 0] = 1  # one long path back and forth
    mask[1, 0, 0] = mask[1, 1, 1] = mask[1, 2, 2] = mask[1, 8, 0] = 1
    assert torch.equal(remove_islands(mask, 49)[0], mask[0]) and remove_islands(mask, 50)[0].sum() == 0
    assert remove_islands(mask, 3)[1].nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert torch.equal(remove_islands(mask, 0), mask)


@pytest.mark.parametrize(
    "change", [{"clip_ratio": 0}, {"threshold": 0.0}, {"threshold": 1.0}, {"smooth": 2}, {"smallest_island": -1}]
)
def test_impossible_rules_are_refused(change):
    with pytest.raises(ParameterError, match=next(iter(change)).replace("smallest_", "smallest ")):
        MaskRule(**change)(torch.ones(1, 3, 3))


def test_pictures_of_mask_and_heat():
    mask = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    pixels = mask_in_pixels(mask, 3, 5, 6)
    assert pixels.shape == (1, 5, 6) and pixels[0, :3, 3:].eq(1).all() and pixels[0, 3:, :3].eq(0.5).all()
    image = heat_image(torch.tensor([[[0.0, 1 / 3, 2 / 3, 1.0]]]), 1, 1, 4)
    assert torch.allclose(image[0, 0], torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]), atol=1e-6)
