"""Edits of attention maps as plain attentions with folded values, against the maps written out (docs/methods.md, 0.6, 7, 8)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from editkit.pipelines.attention import p2p
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.step_ranges import folded_weights, step_table, whole
from editkit.pipelines.core.errors import MismatchError, ParameterError
from editkit.tests.toy_attention import ExplicitEdit, context, refine_edit, replace_edit, rows_of, site
from editkit.tests.toys import random_latent

SIGMAS = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
ROWS = rows_of("sc0", "tc0", "sc1", "tc1", "su0", "tu0", "su1", "tu1")


def edits(tokens=7):
    source, target = context(1, tokens=tokens), context(2, tokens=tokens)
    generator = torch.Generator().manual_seed(5)
    random = {
        "mapper": torch.rand(tokens, tokens, generator=generator),
        "alphas": torch.rand(tokens, generator=generator),
        "equalizer": torch.randn(tokens, generator=generator) * 2,
        "step_ranges": {2: (0.2, 0.5), 3: (0.0, 0.0)},
    }
    return {
        "replace": replace_edit(source, target),
        "reweight": replace_edit(source, target, equalizer=torch.linspace(-2, 4, tokens)),
        "refine": refine_edit(source, target),
        "windows": refine_edit(source, target, step_ranges={1: (0.5, 1.0), 3: (0.0, 0.3)}),
        "anything": replace_edit(source, target, **random),
    }


def qkv(rows, keys=7, queries=6, dtype=torch.float64):
    """Different for every row: [rows, 2 heads, tokens, 5]."""
    shapes = ((queries, 1), (keys, 2), (keys, 3))
    return tuple(random_latent(len(rows), 2, count, 5, seed=seed).to(dtype) for count, seed in shapes)


def explicit(edit, options, control):
    return ExplicitEdit(
        edit,
        control.step,
        step_table(edit, options.cross_until, control.steps),
        control.self_branches,
        options.self_divisor,
    )


@pytest.mark.parametrize("kind", edits())
@pytest.mark.parametrize("sigma", [3.0, 2.0, 1.0, 0.5])
def test_folded_values_equal_explicit_maps(kind, sigma):
    edit, options = edits()[kind], P2POptions(0.6, 0.5, 0.25)
    control = P2PControl(edit, SIGMAS, options)
    place, (q, k, v) = site(ROWS, sigma), qkv(ROWS)
    out = control.attend(q, k, v, place)
    wanted = explicit(edit, options, control).attend(q, k, v, place)
    if out is None:
        out = F.scaled_dot_product_attention(q, k, v)
    assert (out - wanted).abs().max() < 1e-12
    if kind == "replace" and sigma == 3.0:
        assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() > 0.1


@pytest.mark.parametrize(("sigma", "branches"), [(3.0, "cu"), (2.0, "c"), (1.0, "")])
def test_self_attention_uses_the_sources_map_in_the_open_branches(sigma, branches):
    options = P2POptions(0.6, 0.5, 0.25)
    control = P2PControl(edits()["replace"], SIGMAS, options)
    place, (q, k, v) = site(ROWS, sigma, cross=False), qkv(ROWS, keys=6)
    plain = F.scaled_dot_product_attention(q, k, v)
    wants, out = control.wants(place), control.attend(q, k, v, place)
    assert wants == bool(branches)
    out = plain if out is None else out
    assert (out - explicit(control.edit, options, control).attend(q, k, v, place)).abs().max() < 1e-12
    changed = {row for row, a, b in zip(ROWS, out, plain, strict=True) if not torch.equal(a, b)}
    assert changed == {row for row in ROWS if row.role == "target" and row.branch[0] in branches}


def test_a_prompt_that_a_host_repeats_is_edited_alike():
    """The keys of every copy share the attention; the edit acts on each copy."""
    edit = edits()["anything"]
    control = P2PControl(edit, SIGMAS, P2POptions(0.6))
    place, (q, k, v) = site(ROWS), qkv(ROWS)
    once = control.attend(q, k, v, place)
    twice = control.attend(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), place)
    assert torch.allclose(once, twice, atol=1e-12)
    with pytest.raises(MismatchError, match="7"):
        control.attend(q, k[:, :, :5], v[:, :, :5], place)


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "sigma", "calls"), [("replace", 3.0, 1), ("refine", 3.0, 2), ("reweight", 3.0, 1), ("windows", 3.0, 2)]
)
def test_at_most_two_attentions(kind, sigma, calls, monkeypatch):
    """One where nothing of the target's own map is left; none of ours outside of every step range."""
    control, place, tensors = P2PControl(edits()[kind], SIGMAS, P2POptions(0.6)), site(ROWS, sigma), qkv(ROWS)
    counter = Counter()
    functional = type("functional", (), {"scaled_dot_product_attention": counter})
    monkeypatch.setattr(p2p, "F", functional)
    control.attend(*tensors, place)
    assert counter.calls == calls
    closed = P2PControl(edits()[kind], SIGMAS, P2POptions(0.0, 0.0, 0.0))
    if kind != "windows":
        assert not closed.wants(place) and closed.attend(*tensors, place) is None and counter.calls == calls


@pytest.mark.parametrize("kind", edits())
def test_sources_and_unconditional_rows_keep_every_bit(kind):
    control, place, (q, k, v) = P2PControl(edits()[kind], SIGMAS), site(ROWS), qkv(ROWS, dtype=torch.float32)
    out, plain = control.attend(q, k, v, place), F.scaled_dot_product_attention(q, k, v)
    for row, a, b in zip(ROWS, out, plain, strict=True):
        assert torch.equal(a, b) == (row.role == "source" or row.branch == "uncond"), row


def test_order_of_rows_does_not_matter():
    control, tensors = P2PControl(edits()["anything"], SIGMAS), qkv(ROWS)
    out = control.attend(*tensors, site(ROWS))
    order = [5, 0, 7, 3, 2, 6, 1, 4]
    mixed = control.attend(*(part[order] for part in tensors), site(tuple(ROWS[i] for i in order)))
    assert torch.allclose(mixed, out[order], atol=1e-12)
    half = [i for i, row in enumerate(ROWS) if row.branch == "cond"]
    apart = control.attend(*(part[half] for part in tensors), site(tuple(ROWS[i] for i in half)))
    assert torch.allclose(apart, out[half], atol=1e-12)


def test_a_target_without_its_source_is_an_error():
    control, rows = P2PControl(edits()["replace"], SIGMAS), rows_of("sc0", "tc0", "tc1")
    with pytest.raises(MismatchError, match="without its source"):
        control.attend(*qkv(rows), site(rows))
    alone = rows_of("tu0")
    assert control.attend(*qkv(alone), site(alone)) is None  # nothing is edited in this branch


def test_gradients_reach_queries_keys_and_values_of_both():
    control = P2PControl(edits()["refine"], SIGMAS)
    rows = rows_of("sc0", "tc0")
    tensors = [part.requires_grad_() for part in qkv(rows)]
    control.attend(*tensors, site(rows))[1].sum().backward()
    assert all(part.grad[row].abs().sum() > 0 for part in tensors[:2] for row in (0, 1))
    assert tensors[2].grad[1].abs().sum() > 0 and tensors[2].grad[0].abs().sum() == 0


def test_weights_are_columns_of_the_target():
    edit = edits()["anything"]
    first, second = folded_weights(edit, torch.ones(7))
    assert torch.allclose(first.float(), edit.mapper @ torch.diag(edit.alphas * edit.equalizer))
    assert torch.allclose(second.float(), (1 - edit.alphas) * edit.equalizer)
    first, second = folded_weights(edit, torch.zeros(7))
    assert not first.any() and torch.equal(second, torch.ones(7).double())


# -------------------------------------------------------------------------------------------------------- step ranges
@pytest.mark.parametrize(
    ("steps", "until", "count"),
    [(50, 0.8, 40), (50, 0.6, 30), (30, 0.6, 18), (30, 0.3, 9), (50, 1.0, 50), (50, 0.0, 0)],
)
def test_published_count_of_cross_attention_steps(steps, until, count):
    table = step_table(edits()["replace"], until, steps)
    assert table.shape == (steps, 7) and table.sum(1).bool().sum() == count and table[:count].all()


@pytest.mark.parametrize(
    ("steps", "until", "count"), [(30, 0.6, 18), (30, 0.8, 24), (30, 0.5, 15), (50, 0.4, 20), (100, 0.29, 29)]
)
def test_published_count_of_self_attention_steps(steps, until, count):
    sigmas = torch.linspace(5, 0, steps + 1)
    control = P2PControl(edits()["replace"], sigmas, P2POptions(0, until, until))
    open_steps = [step for step in range(steps) if control.self_branches(step)]
    assert open_steps == list(range(count)) and control.self_branches(0) == ("cond", "uncond")


def test_words_have_their_own_step_range():
    edit = replace_edit(context(1), context(2), step_ranges={2: (0.5, 1.0), 4: (0.0, 0.2)})
    table = step_table(edit, 0.8, 50)
    assert [int(table[:, token].sum()) for token in (0, 2, 4)] == [40, 25, 10]
    assert table[:25, 2].sum() == 0 and table[40:, 2].all()


def test_rounding_forgives_binary_fractions():
    assert [whole(value) for value in (0.29 * 100, 7.999, 0.7 * 10, 0)] == [29, 7, 7, 0]


@pytest.mark.parametrize("name", ["cross_until", "self_until", "uncond_self_until"])
def test_fractions_of_the_steps_lie_between_0_and_1(name):
    assert P2POptions(**{name: 1}) and P2POptions(**{name: 0})  # whole numbers are numbers too
    for value in (-0.1, 1.5):
        with pytest.raises(ParameterError, match=name):
            P2POptions(**{name: value})


def test_steps_are_found_by_sigma():
    control = PairControl(SIGMAS)
    assert [control.step(sigma) for sigma in (3.0, 2.9, 2.0, 1.5, 0.5, 0.1)] == [0, 0, 1, 1, 3, 3]


# --------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize(
    ("latent_pixels", "replaced", "kept"),
    [
        ((64, 64), [(32, 32), (16, 16), (8, 8)], [(64, 64)]),  # as published: at most 32 x 32 tokens
        ((128, 128), [(64, 64), (32, 32)], [(128, 128)]),
        ((96, 64), [(48, 32), (24, 16)], [(96, 64)]),
        ((13, 9), [(7, 5), (4, 3)], [(13, 9)]),
        ((12, 12), [(6, 6), (3, 3)], [(12, 12)]),
    ],
)
def test_layers_whose_self_attention_is_replaced(latent_pixels, replaced, kept):
    control = P2PControl(edits()["replace"], SIGMAS)
    wants = {
        g: control.wants(site(ROWS, 3.0, cross=False, latent_pixels=latent_pixels, grid=g)) for g in [*replaced, *kept]
    }
    assert wants == {**dict.fromkeys(replaced, True), **dict.fromkeys(kept, False)}
    every = P2PControl(edits()["replace"], SIGMAS, P2POptions(self_divisor=1))
    assert all(
        every.wants(site(ROWS, 3.0, cross=False, latent_pixels=latent_pixels, grid=g)) for g in [*replaced, *kept]
    )


def test_what_a_loop_must_evaluate():
    control = P2PControl(edits()["replace"], SIGMAS, P2POptions(0.6, 0.25, 0.5))
    assert [sorted(control.needs(step)) for step in range(4)] == [["cond", "uncond"], ["cond", "uncond"], ["cond"], []]
    assert [control.active(step) for step in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("divisor", [0, -1])
def test_no_layer_is_chosen_by_dividing_by_nothing(divisor):
    with pytest.raises(ParameterError, match=f"self_divisor is {divisor}"):
        P2POptions(self_divisor=divisor)
