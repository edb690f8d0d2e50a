"""The forward passes of an attention edit: the source runs only while its attention is used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.pair_loop import PairPrompts, attention_edit, pair_edit
from editkit.pipelines.attention.plug_and_play import PlugAndPlay, PlugAndPlayOptions
from editkit.pipelines.inversion.ddim import invert
from editkit.tests.parity.test_pair_edit import LINES, SCALE, close, controls, model_of, start_of
from editkit.tests.toy_attention import replace_edit
from editkit.tests.toys import random_latent


class Rows:
    """Rows of every call of the network."""

    def __init__(self, model):
        self.calls = []
        self.handle = model.unet.register_forward_pre_hook(lambda _, args: self.calls.append(len(args[0])))

    def per_step(self, steps):
        """Rows of each step; calls are split evenly over steps when there are several."""
        many = len(self.calls) // steps
        return [sum(self.calls[i : i + many]) for i in range(0, len(self.calls), many)]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (P2POptions(0.6, 0.4, 0), [3, 3, 3, 3, 3, 3, 2, 2, 2, 2]),
        (P2POptions(0.6, 0.4, 0.5), [4, 4, 4, 4, 4, 3, 2, 2, 2, 2]),
        (P2POptions(0.2, 0.0, 0.4), [4, 4, 3, 3, 2, 2, 2, 2, 2, 2]),
        (P2POptions(0, 0, 0), [2] * 10),
    ],
)
def test_a_real_image_needs_three_rows_four_or_two(options, wanted):
    model, source, target, negative = model_of()
    path = invert(model, random_latent(1, 4, 8, 8), source, model.schedule(10))
    rows = Rows(model)
    attention_edit(model, replace_edit(source, target), negative, path, options=options)
    assert rows.calls == wanted  # one call each


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda s: MasaCtrl(s, MasaCtrlOptions(from_step=2)), [2, 2, 4, 4]),
        (lambda s: PlugAndPlay(s, PlugAndPlayOptions(features_until=0.5, inclusive=False)), [3, 3, 2, 2]),
        (PairControl, [2] * 4),
    ],
)
def test_rows_of_masactrl_and_plug_and_play(make, wanted):
    model, source, target, negative = model_of()
    path = invert(model, random_latent(1, 4, 8, 8), source, model.schedule(4))
    rows = Rows(model)
    pair_edit(model, PairPrompts(source, target, negative, SCALE), make(path.sigmas), path)
    assert rows.calls == wanted


def test_local_blend_keeps_the_source_only_for_its_own_words():
    model, source, target, negative = model_of()
    path = invert(model, random_latent(1, 4, 8, 8), source, model.schedule(4))
    options = P2POptions(0.5, 0, 0, local_blend=LocalBlendOptions(divisor=2))
    counted = []
    for words in (LINES, {"blend_target": (2,)}):
        rows = Rows(model)
        attention_edit(model, replace_edit(source, target, **words), negative, path, options=options)
        counted.append(rows.calls)
        rows.handle.remove()
    assert counted == [[3] * 4, [3, 3, 2, 2]]


def test_from_noise_the_source_samples_itself():
    model, source, target, negative = model_of()
    sigmas, z = start_of(model, images=1, steps=4)
    rows = Rows(model)
    attention_edit(model, replace_edit(source, target), negative, z, sigmas=sigmas)
    assert rows.calls == [4] * 4
    rows.calls.clear()
    attention_edit(model, replace_edit(source, target), None, z, sigmas=sigmas, guidance_scale=1)
    assert rows.calls == [2] * 4


@pytest.mark.parametrize(("kind", "rows_apart"), [("p2p", 3), ("p2plus", 3), ("injection", 4)])
def test_prompts_that_a_host_keeps_apart_give_the_same(kind, rows_apart):
    """With something attached to a prompt the rows cannot stand under one context."""
    model, source, target, negative = model_of()
    path = invert(model, random_latent(2, 4, 8, 8), source, model.schedule(4))
    edit = replace_edit(source, target)
    control = controls(model, path.sigmas, edit)[kind]
    if kind == "p2plus":
        control = P2PControl(edit, path.sigmas, P2POptions(0, 0, 0.5))  # the unconditional source alone
    wanted = pair_edit(model, PairPrompts(source, target, negative, SCALE), control, path).edited
    rows = Rows(model)
    apart = PairPrompts(source, target, replace(negative, host=object()), SCALE)
    assert close(pair_edit(model, apart, control, path).edited, wanted)
    assert sum(rows.calls[: 1 if rows_apart == 4 else 2]) == 2 * rows_apart


def test_parts_are_counted_on_the_whole_grid():
    """An inversion that stopped half way starts at step 5 of 10: of six edited steps one is left."""
    model, source, target, negative = model_of()
    path = invert(model, random_latent(1, 4, 8, 8), source, model.schedule(10), ratio=0.5)
    rows = Rows(model)
    attention_edit(model, replace_edit(source, target), negative, path, options=P2POptions(0.6, 0.3, 0))
    assert rows.calls == [3, 2, 2, 2, 2]
