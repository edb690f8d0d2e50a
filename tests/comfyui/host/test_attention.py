"""Attention control in a native U-Net: rows by meaning whatever the host's batching, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.host import open_denoiser
from editkit.hosts.sockets import context_of
from editkit.pipelines.attention.pair_batch import interleave, pair_context, pair_rows, separate
from editkit.pipelines.core.attention_sites import Controlled, FeatureSite, Passive, Row, RowMap, Site
from editkit.pipelines.core.errors import FamilyError, MismatchError, ParameterError
from editkit.tests.comfyui.host.test_model import Control as ConstantControlNet
from editkit.tests.comfyui.host.tiny import cond, digest, same_weights, tokens

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def index(site: Site, **wanted: object) -> list[int]:
    """Positions of the rows that have these attributes."""
    return [i for i, row in enumerate(site.rows) if all(getattr(row, name) == value for name, value in wanted.items())]


class Shared(Passive):
    """Target rows take the queries and keys of their own source, found by meaning, at every layer."""

    def __init__(self, cross: bool = False) -> None:
        self.cross, self.seen = cross, []

    def wants(self, site: Site) -> bool:
        return site.cross == self.cross

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        self.seen.append((site, len(q)))
        own = [site.rows.index(Row("source", row.branch, row.image)) for row in site.rows]
        return F.scaled_dot_product_attention(q[own], k[own], v)


class Muted(Passive):
    """No attention at all for one kind of row, plain attention for all others."""

    def __init__(self, **which: object) -> None:
        self.which = which

    def wants(self, site: Site) -> bool:
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        out[index(site, **self.which)] = 0
        return out


@pytest.fixture
def z() -> Tensor:
    """Two pairs, source and target different, on a grid that is not square."""
    return torch.randn(4, 4, 12, 10, generator=torch.Generator().manual_seed(7)) * 3


def contexts(images: int = 2, *, source=None, target=None, negative=None):
    first, second = (context_of(value, "positive") for value in (source or cond(1), target or cond(2)))
    return [pair_context(first, second, images), context_of(negative or cond(3), "negative")]


def predict(model, z: Tensor, given, control, branches=("cond", "uncond"), rows: RowMap | None = None) -> Tensor:
    controlled = None if control is None else Controlled(control, rows or pair_rows(len(z) // 2, branches))
    with open_denoiser(model, z.shape, given) as denoiser:
        return denoiser.denoise(z, 2.0, given, controlled)


def calls_of(model) -> tuple[object, list[int]]:
    """A clone that notes how many rows every network call has."""
    patched, rows = model.clone(), []
    patched.set_model_unet_function_wrapper(
        lambda apply, args: rows.append(len(args["input"])) or apply(args["input"], args["timestep"], **args["c"])
    )
    return patched, rows


def test_sites_are_all_layers_in_order(model, z: Tensor) -> None:
    for cross in (False, True):
        control = Shared(cross)
        predict(model, z, contexts(), control)
        sites = [site for site, _ in control.seen]
        assert [site.order for site in sites] == list(range(sites[0].layers))
        # one layer each at input 3 and 5, the middle and every output block (training/unet.py)
        assert [(site.place, site.block) for site in sites] == [
            ("down", 3), ("down", 5), ("mid", 0), *(("up", i) for i in range(6)),
        ]  # fmt: skip
        grids = [(6, 5), (3, 3), (3, 3), (3, 3), (3, 3), (6, 5), (6, 5), (12, 10), (12, 10)]
        assert [site.grid for site in sites] == grids
        assert {(site.place, site.blocks) for site in sites} == {("down", 6), ("mid", 1), ("up", 6)}
        assert {site.latent_pixels for site in sites} == {(12, 10)}
        assert {site.sigma for site in sites} == {2.0}
        assert all(site.depth == 0 and count == len(site.rows) == 8 for site, count in control.seen)


@pytest.mark.parametrize("cross", [False, True])
def test_control_is_the_same_however_the_rows_come(model, z: Tensor, monkeypatch, cross: bool) -> None:
    """Both branches together, in the other order, apart, and with the images in another order (T18)."""
    given = contexts()
    together = predict(model, z, given, Shared(cross))
    assert (together - predict(model, z, given, None)).abs().max() > 1e-2
    turned = predict(model, z, given[::-1], Shared(cross), ("uncond", "cond"))
    torch.testing.assert_close(turned.flip(0), together, **CLOSE)

    alone = [predict(model, z, [g], Shared(cross), (b,)) for g, b in zip(given, ("cond", "uncond"), strict=True)]
    torch.testing.assert_close(torch.cat(alone), together, **CLOSE)

    swapped = [2, 3, 0, 1]
    again = predict(model, z[swapped], given, Shared(cross))
    torch.testing.assert_close(again[:, swapped], together, **CLOSE)

    backwards = RowMap(pair_rows(2, ()).batch[::-1], ("cond", "uncond"))
    turned_pair = given[0].with_tokens(given[0].tokens.flip(0))
    again = predict(model, z.flip(0), [turned_pair, given[1]], Shared(cross), rows=backwards)
    torch.testing.assert_close(again.flip(1), together, **CLOSE)

    spied, calls = calls_of(model)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, both=False: (1, 1) if both else 1)
    apart = predict(spied, z, given, Shared(cross))
    assert calls == [4, 4], "without memory the host runs every prompt alone, but never cuts a batch"
    torch.testing.assert_close(apart, together, **CLOSE)


def test_prompts_of_other_lengths_run_apart(model, z: Tensor) -> None:
    given = contexts(negative=[[tokens(3, length=5), {}]])
    spied, calls = calls_of(model)
    control = Shared(True)
    result = predict(spied, z, given, control)
    assert calls == [4, 4]
    assert {count for _, count in control.seen} == {4}
    plain = predict(model, z, given, None)
    assert (result - plain).abs().max() > 1e-2
    own = [0, 0, 2, 2]
    torch.testing.assert_close(result[:, [0, 2]], plain[:, [0, 2]], **CLOSE)
    assert predict(model, z[own], contexts(target=cond(1)), control).diff(dim=1)[:, ::2].abs().max() < 1e-4


WHICH = [
    {"role": "target", "branch": "cond"},
    {"role": "source", "branch": "uncond"},
    {"role": "target", "branch": "cond", "image": 1},
]


def layouts() -> dict[str, list]:
    """Positive prompts that the host turns into calls of many kinds."""
    mask = torch.zeros(1, 12, 10)
    mask[:, :6] = 1
    return {
        "areas": [[tokens(2), {"area": (6, 6, 2, 2), "strength": 0.7}]],
        "mask": [[tokens(2), {"mask": mask, "mask_strength": 1.0}]],
        "controlnet": [[tokens(2), {"control": ConstantControlNet(), "control_apply_to_uncond": True}]],
        "one-sided controlnet": [[tokens(2), {"control": ConstantControlNet(), "control_apply_to_uncond": False}]],
    }


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("layout", list(layouts()))
def test_only_the_meant_rows_change(model, z: Tensor, layout: str, which: dict) -> None:
    """With areas, masks and ControlNets on the prompt too."""
    given = contexts(target=layouts()[layout])
    plain, muted = predict(model, z, given, None), predict(model, z, given, Muted(**which))
    rows = pair_rows(2, ("cond", "uncond"))
    for branch in range(2):
        for place, row in enumerate(rows.chunk(branch)):
            meant = all(getattr(row, name) == value for name, value in which.items())
            change = float((muted[branch, place] - plain[branch, place]).abs().max())
            assert (change > 1e-2) if meant else (change < 1e-4), row


def test_combined_prompts_have_rows_in_every_part(model, z: Tensor) -> None:
    given = [context_of([*cond(1), [tokens(2), {"area": (6, 6, 2, 2)}]], "positive"), *contexts()[1:]]
    control = Shared()
    predict(model, z, given, control)
    whole, part = (
        {site.rows for site, _ in control.seen if site.latent_pixels == latent_pixels}
        for latent_pixels in ((12, 10), (6, 6))
    )
    assert {len(rows) for rows in whole} == {8}
    assert {len(rows) for rows in part} == {8}
    assert {site.grid for site, _ in control.seen if site.latent_pixels == (6, 6)} == {(6, 6), (3, 3), (2, 2)}


def test_the_hosts_own_attention_runs_where_nothing_is_wanted(model, z: Tensor, monkeypatch) -> None:
    own, calls = comfy.ldm.modules.attention.optimized_attention, []
    monkeypatch.setattr(
        comfy.ldm.modules.attention, "optimized_attention", lambda *a, **k: calls.append(k) or own(*a, **k)
    )
    plain = predict(model, z, contexts(), None)
    bare = len(calls)
    assert torch.equal(predict(model, z, contexts(), Passive()), plain)
    assert len(calls) == 2 * bare
    control = Shared()
    predict(model, z, contexts(), control)
    assert len(calls) == 3 * bare - len(control.seen)
    override = model.clone()
    override.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k) * 0
    zero = predict(override, z, contexts(), None)
    assert (zero - plain).abs().max() > 1e-2
    assert torch.equal(predict(override, z, contexts(), Passive()), zero)


class Values(Passive):
    """The source's value inputs for everybody, keys as they are: what value embeddings do."""

    def wants(self, site: Site) -> bool:
        return site.cross

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        return key, value[[site.rows.index(Row("source", row.branch, row.image)) for row in site.rows]]


def test_value_inputs_before_the_projection(model, z: Tensor) -> None:
    """The same as a stock patch that does it by position, and other patches on the MODEL act before ours."""
    given = contexts()

    def by_position(n, context, value, extra):
        value = value.clone()
        if extra["cond_or_uncond"] == [1, 0]:
            value[5], value[7] = value[4], value[6]
        return n, context, value

    def halved(n, context, value, extra):
        return n, context * 0.5, value * 0.5

    stock, ours = model.clone(), model.clone()
    for patched in (stock, ours):
        patched.set_model_attn2_patch(halved)
    stock.set_model_attn2_patch(by_position)
    expected = predict(stock, z, given, None)
    assert (expected - predict(ours, z, given, None)).abs().max() > 1e-2
    torch.testing.assert_close(predict(ours, z, given, Values()), expected, **CLOSE)


def test_what_other_nodes_replaced_stays(model, z: Tensor) -> None:
    """Where we act on other layers both act; on the same layer we refuse by name, and nothing is dropped."""

    def doubled(q, k, v, extra):
        return 2 * comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    patched = model.clone()
    patched.set_model_attn2_replace(doubled, "output", 1)  # the whole block
    patched.set_model_attn2_replace(doubled, "middle", 0, 0)  # one layer of it
    plain = predict(patched, z, contexts(), None)
    assert torch.equal(predict(patched, z, contexts(), Passive()), plain)
    assert (predict(patched, z, contexts(), Shared()) - predict(model, z, contexts(), Shared())).abs().max() > 1e-2
    torch.testing.assert_close(
        predict(patched, z, contexts(), Shared())[:, ::2], plain[:, ::2], **CLOSE
    )  # source rows see no control, but the other node's work
    with pytest.raises(ParameterError, match=r"cross-attention of the model's mid block 0 .*doubled"):
        predict(patched, z, contexts(), Shared(True))


def test_merged_or_tiled_tokens_are_refused(model, z: Tensor) -> None:
    def tiled(n, context, value, extra):
        return tuple(part.reshape(part.shape[0] * 2, part.shape[1] // 2, -1) for part in (n, context, value))

    merging = model.clone()
    merging.set_model_attn1_patch(tiled)
    with pytest.raises(MismatchError, match="ToMe, HyperTile"):
        predict(merging, z[..., :8], contexts(), Shared())


class Features(Passive):
    """Target rows take their source's residual features in one block."""

    def __init__(self, place: str, block: int, blocks: int) -> None:
        self.at, self.seen = (place, block, blocks), []

    def wants_features(self, place: str, block: int, blocks: int) -> bool:
        return (place, block, blocks) == self.at

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        self.seen.append((site, tuple(x.shape)))
        return x[[site.rows.index(Row("source", row.branch, row.image)) for row in site.rows]]


@pytest.mark.parametrize(
    ("where", "name", "size"),
    [
        (("up", 2, 6), "output_blocks.2.0", (6, 5)),
        (("down", 1, 6), "input_blocks.1.0", (12, 10)),
        (("mid", 0, 2), "middle_block.0", (3, 3)),
        (("mid", 1, 2), "middle_block.2", (3, 3)),
    ],
)
def test_residual_features(model, z: Tensor, where: tuple, name: str, size: tuple) -> None:
    """Equal to the network with an object patch around the residual branch that does it by position."""

    class Taken(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x)[[0, 0, 2, 2, 4, 4, 6, 6]]

    given, control = contexts(), Features(*where)
    got = predict(model, z, given, control)
    path = f"diffusion_model.{name}.out_layers"
    patched = model.clone()
    patched.add_object_patch(path, Taken(*model.get_model_object(path)))
    expected = predict(patched, z, given, None)
    patched.detach()
    assert (expected - predict(model, z, given, None)).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, **CLOSE)
    ((site, shape),) = control.seen
    assert site == FeatureSite(*where, (12, 10), 2.0, site.rows)
    assert (shape[0], *shape[-2:]) == (len(site.rows), *size) == (8, *size)


class Stop(Exception):
    """Stands for a cancel, a fault or running out of memory."""


class Failing(Features):
    def __init__(self, at: str) -> None:
        super().__init__("down", 1, 6)
        self.failing_at = at

    def wants(self, site: Site) -> bool:
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> None:
        if self.failing_at == "attention":
            raise Stop

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        if self.failing_at == "features":
            raise Stop
        return x


def hooks_of(model) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.model.modules())


@pytest.mark.parametrize("at", ["attention", "features", "nowhere"])
def test_nothing_is_left_on_the_model(model, z: Tensor, at: str) -> None:
    before, options, wrappers = digest(model.model), repr(model.model_options), repr(model.wrappers)
    plain = predict(model, z, contexts(), None)
    opened = open_denoiser(model, z.shape, given := contexts())
    with opened as denoiser:
        controlled = Controlled(Failing(at), pair_rows(2, ("cond", "uncond")))
        if at == "nowhere":
            denoiser.denoise(z, 2.0, given, controlled)
        else:
            with pytest.raises(Stop):
                denoiser.denoise(z, 2.0, given, controlled)
        assert hooks_of(model) == 0
        assert torch.equal(denoiser.denoise(z, 2.0, given), plain), "the next call of the same run is a plain one"
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert same_weights(model.model, before)


def test_joint_attention_is_refused_by_name(folder: Path, z: Tensor) -> None:
    other = _host_native.build_bundled(folder)[0]
    other.model.diffusion_model = torch.nn.Conv2d(4, 4, 1)
    other.model.diffusion_model.dtype = torch.float32
    other.model.__class__ = type("Flux", (type(other.model),), {})
    with pytest.raises(FamilyError, match=r"Flux, whose attention cannot be controlled.*SDXL.*DiffEdit"):
        predict(other, z, contexts(), Shared())


def test_pairs_side_by_side() -> None:
    """The order that the host repeats a two-row prompt in is the order of `pair_rows`."""
    import comfy.utils

    pair = pair_context(context_of(cond(1), "a"), context_of(cond(2), "b"), 1)
    repeated = comfy.utils.repeat_to_batch_size(pair.tokens, 6)
    assert torch.equal(repeated, interleave(tokens(1).expand(3, -1, -1), tokens(2).expand(3, -1, -1)))
    first, second = separate(repeated)
    assert torch.equal(first[2:], tokens(1)) and torch.equal(second[2:], tokens(2))
