"""Heat maps of words on real U-Nets: whole attention sums to 1, and averages are averages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from editkit.pipelines.attention.cross_attention_maps import LayerChoice, attention_maps
from editkit.pipelines.attention.pair_batch import single_rows
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.tests.parity import attention_nets as nets
from editkit.tests.toys import random_latent


class WholeMaps(Passive):
    """Every cross-attention map, written out."""

    def __init__(self):
        self.maps = []

    def wants(self, site):
        return site.cross

    def attend(self, q, k, v, site):
        maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1).mean(1)
        self.maps.append((site, maps.transpose(1, 2).unflatten(-1, site.grid)))


def levels_of(*sigmas, images=2, latent_pixels=(12, 8)):
    return [(sigma, random_latent(images, 4, *latent_pixels, seed=int(10 * sigma))) for sigma in sigmas]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "bundled"])
def test_maps_are_the_average_over_heads_layers_and_levels(family):
    model, prompt, levels = nets.denoiser(family), nets.prompt(1, family), levels_of(3.0, 1.0)
    layers = LayerChoice((1, 2), ("up",))
    got = attention_maps(model, levels, prompt, [[2], [3, 4]], layers=layers)
    wanted = []
    for sigma, z in levels:
        whole = WholeMaps()
        model.denoise(z, sigma, [prompt], Controlled(whole, single_rows(2, ("cond",))))
        chosen = [maps for site, maps in whole.maps if layers.has(site)]
        assert len(chosen) > 2
        wanted.append(torch.stack([F.interpolate(maps, size=(12, 8), mode="bilinear") for maps in chosen]).mean(0))
    wanted = torch.stack(wanted).mean(0)
    assert torch.allclose(got, torch.stack([wanted[:, 2], wanted[:, 3] + wanted[:, 4]], 1), atol=1e-5)


def test_all_tokens_together_have_all_of_the_attention():
    model = nets.denoiser()
    maps = attention_maps(model, levels_of(2.0), nets.prompt(1), [[token] for token in range(7)])
    assert maps.shape == (2, 7, 12, 8) and torch.allclose(maps.sum(1), torch.ones(2, 12, 8), atol=1e-5)
    assert maps.std(dim=(2, 3)).min() > 0


def test_one_row_per_level_and_image():
    model, rows, told = nets.denoiser(), [], []
    model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    levels = levels_of(3.0, 2.0, 1.0)
    attention_maps(model, levels, nets.prompt(1), [[1]], progress=lambda done, total, preview=None: told.append(done))
    assert rows == [2, 2, 2] and told == [1, 2, 3]


def test_what_cannot_be_mapped_is_refused():
    model, prompt = nets.denoiser("sdxl"), nets.prompt(1, "sdxl")
    for levels, words in (([], [[1]]), (levels_of(1.0), []), (levels_of(1.0), [[]])):
        with pytest.raises(ParameterError, match="at least one word"):
            attention_maps(model, levels, prompt, words)
    with pytest.raises(ShapeError, match="channels"):
        attention_maps(model, [(1.0, random_latent(1, 3, 8, 8))], prompt, [[1]])


def test_sdxl_gives_its_nearest_maps_and_says_so(caplog):
    model, prompt = nets.denoiser("sdxl"), nets.prompt(1, "sdxl")
    nearest, half = (
        attention_maps(model, levels_of(1.0), prompt, [[1]], layers=LayerChoice((divisor,))) for divisor in (1, 2)
    )
    assert torch.equal(nearest, half)
    assert [record.getMessage() for record in caplog.records] == [
        "this model has no cross-attention on a grid of 8 x 12: the maps are read on its nearest, 4 x 6"
    ]
