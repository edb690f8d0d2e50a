"""Token maps, LocalBlend, MasaCtrl and Plug-and-Play on tensors made by hand (docs/methods.md, 7.5, 11.6, 11.7)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from editkit.pipelines.attention.local_blend import LocalBlend, LocalBlendOptions, wants_local_blend
from editkit.pipelines.attention.map_drawing import picked_maps
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.plug_and_play import PlugAndPlay, PlugAndPlayOptions
from editkit.pipelines.attention.token_maps import MapGrid, WordMaps, map_divisor, token_maps, word_weights
from editkit.pipelines.core.attention_sites import FeatureSite
from editkit.pipelines.core.errors import MismatchError, ParameterError
from editkit.tests.toy_attention import context, replace_edit, rows_of, site
from editkit.tests.toys import random_latent

SIGMAS = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
PAIR = rows_of("sc0", "tc0", "su0", "tu0")


def qkv(rows, keys=7, queries=6, dtype=torch.float64):
    shapes = ((queries, 1), (keys, 2), (keys, 3))
    return tuple(random_latent(len(rows), 2, count, 5, seed=seed).to(dtype) for count, seed in shapes)


def softmax(q, k):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


# ------------------------------------------------------------------------------------------------------- token maps
def test_token_maps_are_columns_of_the_softmax():
    q, k, _ = (part.float() for part in qkv(PAIR))
    assert torch.allclose(token_maps(q, k, [1, 4], 7), softmax(q, k)[..., [1, 4]], atol=1e-6)
    assert torch.allclose(token_maps(q, k, range(7), 7).sum(-1), torch.ones(4, 2, 6), atol=1e-6)
    assert torch.allclose(token_maps(q, k.repeat(1, 1, 3, 1), [1, 4], 7), softmax(q, k)[..., [1, 4]], atol=1e-6)
    q.requires_grad_()
    token_maps(q, k, [1], 7).sum().backward()
    assert q.grad.abs().sum() > 0
    with pytest.raises(MismatchError, match="7"):
        token_maps(q, k[:, :, :6], [1], 7)


def test_word_maps_are_sums_over_sigmas_and_layers():
    words = word_weights([[1, 2], [5]], 7)
    maps, total = WordMaps({"source": words, "target": words}), torch.zeros(2, 2, 2, 3, dtype=torch.float64)
    for number, (sigma, order) in enumerate([(3.0, 8), (3.0, 9), (2.0, 8), (2.0, 9)]):
        place = site(PAIR, sigma, order=order)
        q, k, _ = (part + number for part in qkv(PAIR))
        maps.add(q, k, place)
        maps.add(q, k, place)  # the host asked twice: memory had run out, say
        both = softmax(q, k).mean(1)[:2]
        total += torch.stack([both[..., [1, 2]].sum(-1), both[..., 5]], 1).unflatten(-1, (2, 3))
    for row, role in enumerate(("source", "target")):
        assert torch.allclose(maps.total(role, 1)[0][0].double(), total[row], atol=1e-5)


def test_unfinished_sigmas_are_left_out_where_order_matters():
    words = word_weights([[1]], 7)
    maps = WordMaps({"target": words})
    q, k, _ = qkv(PAIR)
    assert maps.before(3.0, [PAIR[1]]) is None
    maps.add(q, k, site(PAIR, 3.0))
    assert maps.before(3.0, [PAIR[1]]) is None
    first = maps.before(2.0, [PAIR[3]])  # the unconditional row reads the conditional one's
    assert torch.equal(first, maps.total("target", 1)[0])
    maps.add(q + 1, k, site(PAIR, 2.0))
    assert torch.equal(maps.before(2.0, [PAIR[1]]), first) and not torch.equal(maps.total("target", 1)[0], first)


def test_maps_that_never_came_are_missed():
    maps = WordMaps({"source": word_weights([[1]], 7)})
    with pytest.raises(MismatchError, match="source"):
        maps.total("source", 1)
    maps.add(*qkv(PAIR)[:2], site(PAIR))
    with pytest.raises(MismatchError, match="source"):
        maps.total("source", 2)


@pytest.mark.parametrize(
    ("latent_pixels", "divisor"),
    [((64, 64), 4), ((128, 96), 4), ((32, 32), 4), ((28, 32), 2), ((15, 15), 2), ((12, 12), 1)],
)
def test_maps_are_read_at_a_quarter_unless_that_is_too_coarse(latent_pixels, divisor):
    assert map_divisor(latent_pixels) == divisor


def grids(*pairs) -> dict:
    return {"cross_grids": frozenset(pairs), "latent_pixels": (8, 8)}


def test_maps_come_from_the_nearest_grid_that_has_cross_attention_and_it_is_said(caplog):
    """SDXL has none at the latent's own size, which a small latent would need."""
    sdxl = grids(("down", (4, 4)), ("up", (4, 4)), ("mid", (2, 2)))
    maps = MapGrid()
    assert maps.has(site(PAIR, grid=(4, 4), **sdxl)) and maps.has(site(PAIR, grid=(4, 4), **sdxl))
    assert not maps.has(site(PAIR, grid=(2, 2), **sdxl)) and not maps.has(site(PAIR, grid=(4, 4), cross=False, **sdxl))
    assert [record.getMessage() for record in caplog.records] == [
        "this model has no cross-attention on a grid of 8 x 8: the maps are read on its nearest, 4 x 4"
    ]
    middle = MapGrid(places=("mid",))
    assert middle.has(site(PAIR, place="mid", grid=(2, 2), **sdxl)) and not middle.has(site(PAIR, grid=(2, 2), **sdxl))


def test_the_wanted_grid_counts_alone_where_the_network_has_it(caplog):
    sd = grids(("down", (8, 8)), ("down", (4, 4)), ("mid", (2, 2)))
    assert MapGrid().has(site(PAIR, grid=(8, 8), **sd)) and not MapGrid().has(site(PAIR, grid=(4, 4), **sd))
    assert MapGrid(divisor=2).has(site(PAIR, grid=(4, 4), **sd)) and not caplog.records


# ----------------------------------------------------------------------------------------------------------- LocalBlend
def blended(edit, options, source_map, target_map, *, step=3, steps=5):
    """What LocalBlend does to latents 0 (source) and 1 (target) where single words have these maps [2, 3]."""
    local = LocalBlend(edit, steps, options)
    maps = torch.stack([source_map, target_map])
    # one head whose softmax over 2 tokens gives the wanted column 1
    q = torch.stack([torch.zeros(2, 6), torch.logit(maps.flatten(1).clamp(1e-6, 1 - 1e-6))], -1)[:, None] * 2**0.5
    k = torch.eye(2).expand(2, 1, 2, 2)
    rows = rows_of("sc0", "tc0")
    place = site(rows, grid=(2, 3), latent_pixels=(4, 6))
    assert local.wants(place)
    local.add(q, k, place)
    return local.blend(torch.zeros(1, 4, 4, 6), torch.ones(1, 4, 4, 6), step)[0, 0]


def two_token_edit(**fields):
    return replace_edit(context(1, tokens=2), context(2, tokens=2), **fields)


LEFT = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.1, 0.0]])
RIGHT = LEFT.flip(1)
POINT = LocalBlendOptions(start=0.0, pool=1, divisor=2)


def big(latent_pixels):
    return torch.tensor(latent_pixels, dtype=torch.float32).repeat_interleave(2, 0).repeat_interleave(2, 1)


def test_target_differs_only_where_the_words_attend():
    edit = two_token_edit(blend_source=(1,), blend_target=(1,))
    assert torch.equal(blended(edit, POINT, LEFT, RIGHT), big([[1, 0, 1], [1, 0, 1]]))
    only = two_token_edit(blend_target=(1,))
    assert torch.equal(blended(only, POINT, LEFT, RIGHT), big([[0, 0, 1], [0, 0, 1]]))


def test_words_to_keep_are_subtracted():
    edit = two_token_edit(blend_source=(1,), blend_target=(1,), keep_target=(1,))
    assert torch.equal(blended(edit, POINT, LEFT, RIGHT), big([[1, 0, 0], [1, 0, 0]]))


def test_the_published_rule_pools_over_three_map_pixels():
    edit = two_token_edit(blend_target=(1,))
    wide = LocalBlendOptions(start=0.0, divisor=2)
    assert wide.pool == 3 and torch.equal(blended(edit, wide, LEFT, RIGHT), big([[0, 1, 1], [0, 1, 1]]))


@pytest.mark.parametrize(("threshold", "value"), [(1.0, 0.0), (1.5, 0.0), (-0.1, 1.0)])
def test_extreme_thresholds(threshold, value):
    """1 and more keeps the source, below 0 the target, whole and to the bit."""
    edit = two_token_edit(blend_source=(1,), blend_target=(1,))
    options = LocalBlendOptions(start=0.0, threshold=threshold, divisor=2)
    assert torch.equal(blended(edit, options, LEFT, RIGHT), torch.full((4, 6), value))


@pytest.mark.parametrize(("steps", "first"), [(50, 10), (30, 6)])
def test_the_first_blend_is_after_the_published_step(steps, first):
    """The 11th callback of 50, the 7th of 30."""
    edit = two_token_edit(blend_source=(1,), blend_target=(1,))
    options = LocalBlendOptions(pool=1, divisor=2)
    assert blended(edit, options, LEFT, RIGHT, step=first - 1, steps=steps).all()
    assert not blended(edit, options, LEFT, RIGHT, step=first, steps=steps).all()


def test_smooth_maps_have_no_blocks():
    edit = two_token_edit(blend_target=(1,))
    soft = LocalBlendOptions(start=0.0, pool=1, divisor=2, smooth=True, threshold=0.6)
    mask = blended(edit, soft, LEFT, torch.tensor([[0.0, 0.5, 0.9], [0.0, 0.5, 0.9]]))
    assert torch.equal(mask[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_nothing_is_collected_that_nobody_reads():
    options = P2POptions(0.0, 0.0, 0.0)
    assert P2PControl(replace_edit(context(1), context(2)), SIGMAS, options).local_blend is None
    edit = replace_edit(context(1), context(2), blend_target=(2,))
    assert not wants_local_blend(edit, LocalBlendOptions(start=1.0))
    control = P2PControl(edit, SIGMAS, options)
    wanted = [
        name
        for name, fields in {
            "quarter": {"grid": (8, 8), "latent_pixels": (32, 32)},
            "half": {"grid": (16, 16), "latent_pixels": (32, 32)},
            "self": {"grid": (8, 8), "latent_pixels": (32, 32), "cross": False},
        }.items()
        if control.wants(site(PAIR, **fields))
    ]
    assert wanted == ["quarter"]
    assert not control.wants(site(rows_of("sc0", "tu0"), grid=(8, 8), latent_pixels=(32, 32)))
    assert control.active(3) and not control.needs(3)  # the target's own maps are enough
    with pytest.raises(ParameterError, match="may change"):
        wants_local_blend(replace_edit(context(1), context(2), keep_target=(2,)), LocalBlendOptions())


def test_what_was_collected_is_forgotten():
    edit = replace_edit(context(1), context(2), blend_target=(2,))
    control = P2PControl(edit, SIGMAS, P2POptions(local_blend=LocalBlendOptions(start=0.0, divisor=2)))
    latents = torch.zeros(1, 4, 4, 6), torch.ones(1, 4, 4, 6)
    control.attend(*qkv(PAIR, dtype=torch.float32), site(PAIR))
    assert control.blend(*latents, 0).shape == (1, 4, 4, 6)
    control.reset()
    with pytest.raises(MismatchError, match="target"):
        control.blend(*latents, 0)


# ------------------------------------------------------------------------------------------------------------- MasaCtrl
def deep(rows, sigma=1.0, **fields):
    return site(rows, sigma, **{"cross": False, "order": 12, **fields})


def test_masactrl_attends_to_the_source():
    control = MasaCtrl(SIGMAS, MasaCtrlOptions(from_step=2))
    q, k, v = qkv(PAIR, keys=6)
    out = control.attend(q, k, v, deep(PAIR))
    source = [0, 0, 2, 2]
    assert torch.allclose(out, softmax(q, k[source]) @ v[source], atol=1e-12)
    assert [control.wants(deep(PAIR, sigma)) for sigma in (3.0, 2.0, 1.0, 0.5)] == [False, False, True, True]
    assert not MasaCtrl(SIGMAS, MasaCtrlOptions(from_step=4)).wants(deep(PAIR, 0.5))  # as many as there are: off
    assert not control.wants(deep(PAIR, cross=True)) and not control.wants(deep(rows_of("sc0", "su0")))


@pytest.mark.parametrize(("layers", "first"), [(16, 10), (70, 44), (9, 6)])
def test_masactrl_starts_at_the_published_layer_of_any_network(layers, first):
    control = MasaCtrl(SIGMAS, MasaCtrlOptions(from_step=0))
    assert next(i for i in range(layers) if control.wants(deep(PAIR, order=i, layers=layers))) == first


def test_masactrl_keeps_object_and_background_apart():
    edit = two_token_edit(blend_source=(1,), blend_target=(1,))
    control = MasaCtrl(SIGMAS, MasaCtrlOptions(from_step=0, threshold=0.5), edit)
    q, k, v = qkv(PAIR, keys=6)
    place = deep(PAIR, 3.0, grid=(2, 3), latent_pixels=(4, 6))
    plain = MasaCtrl(SIGMAS, MasaCtrlOptions(from_step=0)).attend(q, k, v, place)
    assert torch.equal(control.attend(q, k, v, place), plain)  # no step is done: nobody knows where the object is
    maps = torch.stack([LEFT, RIGHT, LEFT, RIGHT])
    cross_q = torch.stack([torch.zeros(4, 6), torch.logit(maps.flatten(1).clamp(1e-6, 1 - 1e-6))], -1)[:, None] * 2**0.5
    cross = site(PAIR, 3.0, grid=(2, 3), latent_pixels=(4, 6))
    assert not control.wants(cross)  # 4 x 6 latent pixels are too few to be halved
    control.attend(cross_q, torch.eye(2).expand(4, 1, 2, 2), torch.zeros(4, 1, 2, 2), cross)
    out = control.attend(q, k, v, deep(PAIR, 2.0, grid=(2, 3), latent_pixels=(4, 6)))
    theirs, mine = (LEFT > 0.5).flatten(), (RIGHT > 0.5).flatten()
    for target, source in ((1, 0), (3, 2)):
        logits = q[target] @ k[source].transpose(-1, -2) * 5**-0.5
        barred = mine[:, None] != theirs[None, :]
        wanted = torch.softmax(logits.masked_fill(barred, float("-inf")), -1) @ v[source]
        assert torch.allclose(out[target], wanted, atol=1e-12)
    assert torch.equal(out[0], F.scaled_dot_product_attention(q, k, v)[0])


def test_masactrl_says_what_is_missing():
    with pytest.raises(ParameterError, match="both prompts"):
        MasaCtrl(SIGMAS, None, two_token_edit(blend_source=(1,)))
    for wrong in ({"from_step": -1}, {"from_layer": 2}, {"threshold": -1}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            MasaCtrlOptions(**wrong)


# ---------------------------------------------------------------------------------------------------- Plug-and-Play
def up(block, sigma, blocks=12, rows=PAIR):
    return site(rows, sigma, cross=False, place="up", block=block, blocks=blocks)


@pytest.mark.parametrize(("inclusive", "features", "attention"), [(True, 41, 26), (False, 40, 25)])
def test_injection_ends_as_published(inclusive, features, attention):
    sigmas = torch.linspace(50, 0, 51)
    control = PlugAndPlay(sigmas, PlugAndPlayOptions(inclusive=inclusive))
    x = random_latent(4, 3, 2, 2)
    changed = [
        not torch.equal(control.features(x, FeatureSite("up", 4, 12, (4, 4), float(sigma), PAIR)), x)
        for sigma in sigmas[:-1]
    ]
    assert changed == [True] * features + [False] * (50 - features)
    assert [control.wants(up(4, float(s))) for s in sigmas[:-1]] == [True] * attention + [False] * (50 - attention)
    off = PlugAndPlay(sigmas, PlugAndPlayOptions(features_until=0, attention_until=0))
    assert not off.wants(up(4, 50.0)) and not off.wants_features("up", 4, 12) and not off.needs(0)


def test_injected_rows_are_the_sources_in_either_branch():
    control = PlugAndPlay(SIGMAS)
    x = random_latent(4, 3, 2, 2)
    assert torch.equal(control.features(x, FeatureSite("up", 4, 12, (4, 4), 3.0, PAIR)), x[[0, 0, 2, 2]])
    q, k, v = qkv(PAIR, keys=6)
    assert torch.allclose(control.attend(q, k, v, up(5, 3.0)), softmax(q, k)[[0, 0, 2, 2]] @ v, atol=1e-12)
    trio = rows_of("sc0", "tc0", "tu0")
    assert torch.equal(control.features(x[:3], FeatureSite("up", 4, 12, (4, 4), 3.0, trio)), x[[0, 0, 0]])


@pytest.mark.parametrize(("blocks", "first"), [(12, 4), (9, 3), (6, 2)])
def test_injection_starts_a_third_of_the_way_up(blocks, first):
    control = PlugAndPlay(SIGMAS)
    assert [b for b in range(blocks) if control.wants_features("up", b, blocks)] == [first]
    assert [b for b in range(blocks) if control.wants(up(b, 3.0, blocks))] == list(range(first, blocks))
    assert not control.wants_features("down", first, blocks)
    chosen = PlugAndPlay(SIGMAS, PlugAndPlayOptions(feature_block=5, attention_from=1))
    assert chosen.wants_features("up", 5, blocks) and chosen.wants(up(1, 3.0, blocks))
    with pytest.raises(ParameterError, match="feature_block"):
        PlugAndPlay(SIGMAS, PlugAndPlayOptions(feature_block=12)).wants_features("up", 0, blocks)


def test_a_picked_mask_is_the_largest_map_of_its_words():
    maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = ["red", "circle#1", "circle#2"]
    peaks = maps / maps.amax(dim=(-2, -1), keepdim=True)
    assert torch.equal(picked_maps(maps, labels, "", (4, 4)), peaks[:, 0])
    assert torch.equal(picked_maps(maps, labels, "RED, circle#2", (4, 4)), torch.maximum(peaks[:, 0], peaks[:, 2]))
    assert picked_maps(maps, labels, "circle#1", (9, 7)).shape == (2, 9, 7)
    with pytest.raises(ParameterError, match="'cat', which has no map: choose from red"):
        picked_maps(maps, labels, "red, cat", (4, 4))
