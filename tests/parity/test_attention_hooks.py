"""Attention hooks in real diffusers U-Nets: where they sit, that they change nothing by themselves, and that they go."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from editkit.hosts.diffusers.attention_hooks import attention_hooks
from editkit.pipelines.attention.pair_batch import pair_rows, single_rows
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.core.errors import FamilyError, ParameterError, ShapeError
from editkit.tests.parity import attention_nets as nets
from editkit.tests.toys import random_latent

FAMILIES = list(nets.FAMILIES)


class Spy(Passive):
    """Sees everything; answers with `answer(q, k, v, site)`, or plain."""

    def __init__(self, answer=None, features=None):
        self.answer, self.sites, self.seen, self.blocks, self.change = answer, [], [], [], features

    def wants(self, site):
        self.sites.append(site)
        return True

    def attend(self, q, k, v, site):
        self.seen.append((q.shape, k.shape, v.shape))
        return None if self.answer is None else self.answer(q, k, v, site)

    def wants_features(self, place, block, blocks):
        self.blocks.append((place, block, blocks))
        return True

    def features(self, x, site):
        return x if self.change is None else self.change(x, site)


def call(model, control, images=2, branches=("cond", "uncond"), latent_pixels=(8, 8), **fields):
    contexts = [nets.prompt(seed, model.family) for seed in range(1, 1 + len(branches))]
    z = random_latent(images, 4, *latent_pixels, seed=9) * 2
    controlled = None if control is None else Controlled(control, single_rows(images, branches))
    return model.denoise(z, 2.0, contexts, controlled, **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_changes_no_bit(family):
    model = nets.denoiser(family)
    plain = call(model, None)
    assert torch.equal(call(model, Passive()), plain)
    spy = Spy()
    assert torch.equal(call(model, spy), plain)
    assert spy.seen and {site.sigma for site in spy.sites} == {2.0}


@pytest.mark.parametrize(
    ("family", "down", "up", "depths", "counts"),
    [
        ("sd1", [1, 2, 4, 5, 7, 8], list(range(3, 12)), 1, (12, 12, 16)),
        ("sd2", [1, 2, 4, 5, 7, 8], list(range(3, 12)), 1, (12, 12, 16)),
        ("sdxl", [4, 5, 7, 8], list(range(6)), 10, (9, 9, 70)),
        ("bundled", [3, 5], list(range(6)), 1, (6, 6, 9)),
    ],
)
def test_sites_are_numbered_as_in_the_original_files(family, down, up, depths, counts):
    spy = Spy()
    whole = {"transformer_layers_per_block": (1, 2, 10)} if family == "sdxl" else {}
    call(nets.denoiser(family, **whole), spy)
    sites = spy.sites
    assert list(dict.fromkeys(s.block for s in sites if s.place == "down")) == down
    assert list(dict.fromkeys(s.block for s in sites if s.place == "up")) == up
    assert {s.block for s in sites if s.place == "mid"} == {0}
    assert max(s.depth for s in sites) + 1 == depths
    assert {(s.blocks, s.place) for s in sites} == {(counts[0], "down"), (1, "mid"), (counts[1], "up")}
    assert {s.layers for s in sites} == {counts[2]}
    assert [s.order for s in sites] == [order for order in range(counts[2]) for _ in (0, 1)]
    assert [s.cross for s in sites] == [False, True] * counts[2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("latent_pixels", [(8, 8), (13, 9)])
def test_sites_know_their_grid(family, latent_pixels):
    spy = Spy()
    call(nets.denoiser(family), spy, latent_pixels=latent_pixels)
    for site, (q, k, _) in zip(spy.sites, spy.seen, strict=True):
        assert site.tokens == q[2] and site.latent_pixels == latent_pixels and k[2] == (7 if site.cross else q[2])
    grids = {site.grid for site in spy.sites}
    assert all(tuple(-(-side // 2**level) for side in latent_pixels) in grids for level in (1, 2)), grids


@pytest.mark.parametrize("family", FAMILIES)
def test_every_residual_block_has_features(family):
    shapes = {}
    spy = Spy(features=lambda x, site: shapes.setdefault((site.place, site.block, site.blocks), x))
    call(nets.denoiser(family), spy)
    assert list(shapes) == list(dict.fromkeys(spy.blocks))
    up = [block for place, block, _ in shapes if place == "up"]
    assert up == list(range(12 if family in ("sd1", "sd2") else 9 if family == "sdxl" else 6))
    assert [key for key in shapes if key[0] == "mid"] == [("mid", 0, 2), ("mid", 1, 2)]


def test_features_are_the_residual_branch():
    """Without it, a block gives its skip alone."""
    model = nets.denoiser()
    got, block = {}, model.unet.up_blocks[1].resnets[0]
    handle = block.register_forward_hook(lambda _, args, out: got.update(x=args[0], out=out))
    nothing = Spy(features=lambda x, site: torch.zeros_like(x) if (site.place, site.block) == ("up", 2) else x)
    call(model, nothing)
    handle.remove()
    assert torch.equal(got["out"], block.conv_shortcut(got["x"]))


def test_value_inputs_are_the_ones_that_are_projected():
    model = nets.denoiser()
    other = nets.prompt(5).tokens

    class Values(Passive):
        def wants(self, site):
            return site.cross

        def inputs(self, key, value, site):
            return key, other.expand_as(value)

    class Both(Values):
        def inputs(self, key, value, site):
            return other.expand_as(key), other.expand_as(value)

    z, contexts = random_latent(1, 4, 8, 8), [nets.prompt(1)]
    plain = model.denoise(z, 2.0, contexts)
    rows = single_rows(1, ("cond",))
    values, both = (model.denoise(z, 2.0, contexts, Controlled(control(), rows)) for control in (Values, Both))
    assert torch.equal(both, model.denoise(z, 2.0, [nets.prompt(5)]))
    assert not torch.allclose(values, plain) and not torch.allclose(values, both)


def test_rows_are_named_in_the_order_of_the_call():
    spy, model = Spy(), nets.denoiser()
    call(model, spy, images=2, branches=("uncond", "cond"))
    assert [(row.branch, row.image) for row in spy.sites[0].rows] == [
        ("uncond", 0),
        ("uncond", 1),
        ("cond", 0),
        ("cond", 1),
    ]
    model.max_rows = 3
    spy.sites.clear()
    call(model, spy, images=2, branches=("uncond", "cond"))
    assert [len(site.rows) for site in spy.sites if site.order == 0 and site.cross] == [3, 1]


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_pair_is_never_cut(limit):
    spy, model = Spy(), nets.denoiser()
    model.max_rows = limit
    z = random_latent(4, 4, 8, 8)
    model.denoise(z, 2.0, [nets.prompt(1), nets.prompt(2)], Controlled(spy, pair_rows(2, ("cond", "uncond"))))
    for site in spy.sites:
        assert [row.role for row in site.rows] == ["source", "target"] * (len(site.rows) // 2)
    assert {len(site.rows) for site in spy.sites} == {max(2, limit // 2 * 2)}
    assert model.max_rows == limit


def test_prompts_of_different_lengths_keep_their_names():
    spy, model = Spy(), nets.denoiser()
    long = nets.prompt(1).with_tokens(random_latent(1, 11, 16))
    rows = single_rows(1, ("uncond", "cond"))
    model.denoise(random_latent(1, 4, 8, 8), 2.0, [long, nets.prompt(2)], Controlled(spy, rows))
    cross = [(site.rows[0].branch, k[2]) for site, (_, k, _) in zip(spy.sites, spy.seen, strict=True) if site.cross]
    assert set(cross) == {("uncond", 11), ("cond", 7)}


def test_the_control_must_fit_the_batch():
    with pytest.raises(ShapeError, match="names 3"):
        z = random_latent(2, 4, 8, 8)
        nets.denoiser().denoise(z, 2.0, [nets.prompt(1)], Controlled(Spy(), single_rows(3, ("cond",))))


# ----------------------------------------------------------------------------------------------------------- and they go
class Own(AttnProcessor2_0):
    """A user's processor: counts its calls."""

    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


class OwnModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        plain = AttnProcessor2_0()
        return self.weight * plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def state(model):
    hooks = [len(module._forward_hooks) for module in model.unet.modules()]
    return list(model.unet.attn_processors.items()), list(model.unet.state_dict()), hooks


def with_own_processors(model):
    names = list(model.unet.attn_processors)
    own = {name: Own() if i % 2 else OwnModule() for i, name in enumerate(names)}
    model.unet.set_attn_processor(dict(own))
    return model


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["attend", "features", "nowhere"])
def test_hooks_are_gone_after_every_outcome(where):
    def fail(*_):
        raise Broken

    model = nets.denoiser()
    before = state(model)
    spy = Spy(answer=fail if where == "attend" else None, features=fail if where == "features" else None)
    if where == "nowhere":
        call(model, spy)
    else:
        with pytest.raises(Broken):
            call(model, spy)
    assert state(model) == before


def test_a_users_processors_run_and_come_back():
    model = with_own_processors(nets.denoiser())
    before, plain = state(model), call(model, None)
    Own.calls = 0
    assert torch.equal(call(model, Passive()), plain) and Own.calls > 0
    assert state(model) == before
    with pytest.raises(FamilyError, match="Own"):
        call(model, Spy())  # what such a processor adds would be lost
    assert state(model) == before


def test_networks_without_such_attention_are_refused_by_name():
    class SomeTransformer2DModel(torch.nn.Module):
        pass

    controlled = Controlled(Spy(), single_rows(1, ("cond",)))
    with (
        pytest.raises(FamilyError, match=r"SomeTransformer2DModel.*mask"),
        attention_hooks(SomeTransformer2DModel(), controlled, 1.0, (8, 8)),
    ):
        pass
    model = nets.denoiser()
    model.unet.mid_block.attentions.append(model.unet.mid_block.attentions[0])
    with pytest.raises(FamilyError, match="UNetMidBlock2DCrossAttn"):
        call(model, Spy())


def test_distilled_models_may_lack_a_middle():
    model, spy = nets.denoiser(), Spy()
    model.unet.mid_block = None
    call(model, spy)
    assert {site.place for site in spy.sites} == {"down", "up"} and {site.layers for site in spy.sites} == {8}


def test_gradients_pass_and_checkpointing_is_refused():
    model = nets.denoiser()
    context = nets.prompt(1)
    tokens = context.tokens.clone().requires_grad_()
    rows = Controlled(Spy(), single_rows(1, ("cond",)))
    model.denoise(random_latent(1, 4, 8, 8), 2.0, [context.with_tokens(tokens)], rows).sum().backward()
    assert tokens.grad.abs().sum() > 0
    model.unet.enable_gradient_checkpointing()
    with pytest.raises(ParameterError, match="checkpointing"):
        model.denoise(random_latent(1, 4, 8, 8), 2.0, [context], rows)
    with torch.no_grad():
        assert model.denoise(random_latent(1, 4, 8, 8), 2.0, [context], rows).shape == (1, 1, 4, 8, 8)


def test_half_precision_stays_what_it_was():
    model = nets.denoiser()
    model.unet.to(torch.bfloat16)
    assert torch.equal(call(model, Spy()), call(model, None))
