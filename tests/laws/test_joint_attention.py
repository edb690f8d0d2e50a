"""Edits of joint attention against whole maps, in float64, and the laws that hold for every edit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editkit.pipelines.attention.joint import image_word_maps
from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.plug_and_play import PlugAndPlay
from editkit.pipelines.core.attention_sites import Row, Site, check_joint, third
from editkit.pipelines.core.errors import FamilyError, MismatchError, ParameterError
from editkit.tests.toy_attention import TOKENS, context, refine_edit, replace_edit, rows_of, site

SIGMAS = torch.tensor([1.0, 0.6, 0.3, 0.0])
PAIRS = rows_of("sc0", "tc0", "su0", "tu0", "sc1", "tc1", "su1", "tu1")
GRID, WIDTH = (2, 3), 5
IMAGE = GRID[0] * GRID[1]


def joint(rows: tuple[Row, ...] = PAIRS, sigma: float = 1.0, **fields) -> Site:
    return site(rows, sigma, **{"cross": False, "text": TOKENS, "grid": GRID, "latent_pixels": (4, 6), **fields})


def qkv(rows: int = len(PAIRS), seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, 2, TOKENS + IMAGE, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)
    )


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


def edited_by_hand(edit, q: Tensor, k: Tensor, v: Tensor, layout: tuple[str, ...], words: bool) -> Tensor:
    """The edit on whole maps, row by row, all of it at once: docs/methods.md, section 18.4."""
    out = []
    for i, row in enumerate(PAIRS):
        source = PAIRS.index(row._replace(role="source"))
        target = row.role == "target"
        own_q, own_k = q[i].clone(), k[i].clone()
        if target and row.branch in layout:
            own_q[:, TOKENS:], own_k[:, TOKENS:] = q[source][:, TOKENS:], k[source][:, TOKENS:]
        maps = softmax(own_q, own_k)
        if target and words and row.branch == "cond":
            theirs = softmax(q[source], k[source])[:, TOKENS:, :TOKENS] @ edit.mapper.double()
            text, image = maps[:, TOKENS:, :TOKENS], maps[:, TOKENS:, TOKENS:]
            taken, kept = theirs * edit.alphas, text * (1 - edit.alphas)
            rest = (1 - taken.sum(-1, keepdim=True)) / (1 - (text * edit.alphas).sum(-1, keepdim=True))
            new = torch.cat([(taken + rest * kept) * edit.equalizer, rest * image], dim=-1)
            maps = torch.cat([maps[:, :TOKENS], new], dim=1)
        out.append(maps @ v[i])
    return torch.stack(out)


EDITS = {
    "swap": replace_edit(context(1), context(2)),
    "new word": refine_edit(context(1), context(2)),
    "weights": refine_edit(context(1), context(2), equalizer=torch.linspace(-1, 3, TOKENS)),
    "half": replace_edit(context(1), context(2), alphas=torch.linspace(0, 1, TOKENS)),
}


@pytest.mark.parametrize("name", list(EDITS))
@pytest.mark.parametrize("taus", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0)])
def test_two_attentions_equal_whole_maps(name: str, taus: tuple[float, float, float]) -> None:
    q, k, v = qkv()
    control = P2PControl(EDITS[name], SIGMAS, P2POptions(*taus))
    layout = tuple(branch for branch, tau in zip(("cond", "uncond"), taus[1:], strict=True) if tau)
    wanted = edited_by_hand(EDITS[name], q, k, v, layout, bool(taus[0]))
    assert control.wants(joint())
    assert (control.attend(q, k, v, joint()) - wanted).abs().max() <= 1e-6


def test_rows_still_sum_to_one() -> None:
    q, k, v = qkv()
    for name in ("swap", "new word", "half"):
        out = P2PControl(EDITS[name], SIGMAS, P2POptions(1.0, 1.0, 1.0)).attend(q, k, torch.ones_like(v), joint())
        assert (out - 1).abs().max() <= 1e-9, name


def test_words_and_layout_of_the_source_give_its_image_rows() -> None:
    """With the source's values, they are the source's attention: A A* written as one."""
    q, k, v = qkv()
    v[1::2, :, :] = v[::2, :, :]
    out = P2PControl(EDITS["swap"], SIGMAS, P2POptions(1.0, 1.0)).attend(q, k, v, joint())
    assert torch.allclose(out[1][:, TOKENS:], out[0][:, TOKENS:], atol=1e-12)


def test_taus_of_zero_and_equal_rows_change_nothing() -> None:
    q, k, v = qkv()
    assert not P2PControl(EDITS["swap"], SIGMAS, P2POptions(0.0, 0.0, 0.0)).wants(joint())
    same = [x.clone() for x in (q, k, v)]
    for x in same:
        x[1::2] = x[::2]
    for control in (
        P2PControl(EDITS["swap"], SIGMAS, P2POptions(1.0, 1.0, 1.0)),
        MasaCtrl(SIGMAS, MasaCtrlOptions(0, 0.0)),
    ):
        out = control.attend(*same, joint())
        assert torch.allclose(out, softmax(same[0], same[1]) @ same[2], atol=1e-12)


@pytest.mark.parametrize("edit", ["swap", "new word"])
def test_the_order_of_rows_and_the_batch_do_not_matter(edit: str) -> None:
    q, k, v = qkv()
    control = P2PControl(EDITS[edit], SIGMAS, P2POptions(1.0, 1.0, 1.0))
    out = control.attend(q, k, v, joint())
    turned = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(3)).tolist()
    rows = tuple(PAIRS[i] for i in turned)
    assert torch.allclose(control.attend(q[turned], k[turned], v[turned], joint(rows)), out[turned], atol=1e-12)
    for part in (slice(0, 4), slice(4, 8)):
        alone = control.attend(q[part], k[part], v[part], joint(PAIRS[part]))
        assert torch.allclose(alone, out[part], atol=1e-12)


def test_swapping_source_and_target_swaps_the_roles() -> None:
    q, k, v = qkv(2)
    control = P2PControl(EDITS["swap"], SIGMAS, P2POptions(1.0, 1.0))
    pair, swapped = rows_of("sc0", "tc0"), rows_of("tc0", "sc0")
    out = control.attend(q, k, v, joint(pair))
    other = control.attend(q.flip(0), k.flip(0), v.flip(0), joint(swapped))
    assert torch.allclose(out.flip(0), other, atol=1e-12)


def test_mutual_attention_equals_whole_maps() -> None:
    q, k, v = qkv()
    out = MasaCtrl(SIGMAS, MasaCtrlOptions(0, 0.0)).attend(q, k, v, joint())
    for i, row in enumerate(PAIRS):
        source = PAIRS.index(row._replace(role="source"))
        keys, values = (torch.cat([x[i][:, :TOKENS], x[source][:, TOKENS:]], dim=1) for x in (k, v))
        wanted = torch.cat([softmax(q[i][:, :TOKENS], k[i]) @ v[i], softmax(q[i][:, TOKENS:], keys) @ values], dim=1)
        assert torch.allclose(out[i], wanted, atol=1e-12)


def test_mutual_attention_of_an_object_keeps_the_text_and_bars_the_background() -> None:
    edit = replace_edit(context(1), context(2), blend_source=(2,), blend_target=(2,))
    control = MasaCtrl(SIGMAS, MasaCtrlOptions(0, 0.0, threshold=0.5), edit)
    q, k, v = qkv()
    plain = MasaCtrl(SIGMAS, MasaCtrlOptions(0, 0.0)).attend(q, k, v, joint())
    assert control.wants(joint()) and torch.equal(
        control.attend(q, k, v, joint()), plain
    )  # no maps before the first step
    out = control.attend(*qkv(seed=1), joint(sigma=0.6))
    q, k, v = qkv(seed=1)
    maps = image_word_maps(*qkv()[:2], torch.eye(TOKENS)[:, 2:3], TOKENS, joint().attention)[..., 0]
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    inside = ((maps - low) / (high - low)) > 0.5
    for i, row in enumerate(PAIRS):
        if row.role == "source":
            continue
        source, at = PAIRS.index(row._replace(role="source")), PAIRS.index(row._replace(branch="cond"))
        theirs = PAIRS.index(Row("source", "cond", row.image))
        keys, values = (torch.cat([x[i][:, :TOKENS], x[source][:, TOKENS:]], dim=1) for x in (k, v))
        barred = inside[at][:, None] != inside[theirs][None]
        logits = q[i][:, TOKENS:] @ keys.transpose(-1, -2) * WIDTH**-0.5
        logits[:, :, TOKENS:] = logits[:, :, TOKENS:].masked_fill(barred, float("-inf"))
        assert torch.allclose(out[i][:, TOKENS:], logits.softmax(-1) @ values, atol=1e-9)
        assert torch.allclose(out[i][:, :TOKENS], softmax(q[i][:, :TOKENS], k[i]) @ v[i], atol=1e-12)


@pytest.mark.parametrize("words", [1, WIDTH, 7])
def test_word_maps_are_columns_of_the_joint_map(words: int) -> None:
    q, k, _ = qkv()
    weights = torch.rand(TOKENS, words, generator=torch.Generator().manual_seed(2))
    maps = image_word_maps(q, k, weights, TOKENS, joint().attention)
    wanted = (softmax(q, k)[:, :, TOKENS:, :TOKENS] @ weights.double()).mean(1)
    assert maps.shape == (len(PAIRS), IMAGE, words) and torch.allclose(maps.double(), wanted, atol=1e-6)


def test_local_blend_reads_the_joint_map() -> None:
    edit = replace_edit(context(1), context(2), blend_source=(2,), blend_target=(2,))
    rows = rows_of("sc0", "tc0")
    control = P2PControl(edit, SIGMAS, P2POptions(0.0, 0.0, local_blend=LocalBlendOptions(start=0, pool=1)))
    q, k, v = qkv(2)
    assert control.wants(joint(rows)) and control.attend(q, k, v, joint(rows)) is None
    maps = softmax(q, k)[:, :, TOKENS:, 2].mean(1)
    wanted = (maps / maps.amax(1, keepdim=True) > 0.3).any(0).view(GRID)
    assert control.local_blend is not None
    mask = control.local_blend.mask(1, (4, 6))[0, 0]
    assert torch.equal(mask, wanted.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_layers_outside_the_range_are_left_alone() -> None:
    control = P2PControl(EDITS["swap"], SIGMAS, P2POptions(1.0, 1.0, from_layer=0.25, until_layer=0.5))
    assert [control.wants(joint(order=i, layers=8)) for i in range(8)] == [i in (2, 3) for i in range(8)]
    assert [third(i, 4) for i in range(4)] == ["down", "down", "mid", "up"]
    with pytest.raises(ParameterError, match=r"from_layer is 0\.5 and until_layer 0\.5"):
        P2POptions(from_layer=0.5, until_layer=0.5)


def test_what_joint_attention_does_not_allow_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(FamilyError, match=r"PlugAndPlay needs the separate.*SD3Transformer"):
        check_joint(PlugAndPlay(SIGMAS), "SD3Transformer")
    with pytest.raises(MismatchError, match="attends to 6 text tokens"):
        P2PControl(EDITS["swap"], SIGMAS, P2POptions(1.0)).attend(q, k, v, joint(text=6, grid=(1, 7)))
    blend = LocalBlendOptions(edited_maps=True)
    edit = replace_edit(context(1), context(2), blend_source=(2,), blend_target=(2,))
    with pytest.raises(ParameterError, match="edited_maps is on"):
        P2PControl(edit, SIGMAS, P2POptions(1.0, local_blend=blend)).attend(q, k, v, joint())
