"""Attention edits on the bundled model, checked by the oracle: a few pairs of each claim of `editkit.benchmarks attention`.

The full counts with their promised rates belong to the benchmark; the floors here leave room for the small numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.headless.claims import attention as claims
from editkit.headless.claims import attention_trials as t
from editkit.hosts.bundled.scenes import render
from editkit.pipelines.attention.p2p import P2POptions
from editkit.pipelines.evaluation.metrics import psnr

COUNT, STEPS = 8, 12
LONG = 24  # steps: in fewer, an image whose words change a little stays much as it is by itself


def quick(run, **changes):
    return replace(run, **{"steps": STEPS, **changes})


def share(values):
    return sum(values) / len(values)


def test_oracle_cannot_pass_blindly():
    for make in (t.colour_swap, t.shape_swap, t.new_attribute, t.one_of_two):
        for index in range(COUNT):
            pair = make(index)
            before, after = (torch.from_numpy(render(scene, t.SIZE)) for scene in (pair.before, pair.after))
            assert t.all_right(after, pair) and not t.all_right(before, pair)
            if make in (t.colour_swap, t.one_of_two):
                assert not t.has_colour(before, pair) and t.overlap(before, after) > 0.9
            if make is t.shape_swap:
                assert not t.has_shape(before, pair) and t.overlap(before, after) < 0.95


def test_a_thing_gets_another_colour_in_its_place(model):
    pairs = claims.pairs_of(t.colour_swap, COUNT)
    sources, targets = t.edited(model, pairs, quick(claims.RUN))
    _, loose = t.edited(model, pairs, quick(claims.LOOSE))
    kept, free = (float(claims.overlaps(sources, images).mean()) for images in (targets, loose))
    assert share(t.hits(targets, pairs, t.has_colour)) >= 0.8 and share(t.hits(targets, pairs, t.has_shape)) >= 0.8
    assert kept >= 0.8 and kept - free >= 0.2


def test_so_does_an_object_in_a_real_image(model):
    pairs = claims.pairs_of(t.colour_swap, COUNT)
    sources, targets = t.edited(model, pairs, quick(claims.RUN, steps=LONG, real=True))
    _, loose = t.edited(model, pairs, quick(claims.LOOSE, steps=LONG, real=True))
    kept, free = (float(claims.overlaps(sources, images).mean()) for images in (targets, loose))
    assert share(t.hits(targets, pairs, t.has_colour)) >= 0.8 and share(t.hits(targets, pairs, t.has_shape)) >= 0.8
    assert kept >= 0.8 and kept - free >= 0.06


@pytest.mark.long
def test_an_added_word_changes_what_it_names_and_leaves_the_object(model):
    pairs = claims.pairs_of(t.new_attribute, 12)
    sources, targets = t.edited(model, pairs, quick(claims.RUN, steps=LONG))
    _, loose = t.edited(model, pairs, quick(claims.LOOSE, steps=LONG))
    kept, free = (float(claims.overlaps(sources, images).mean()) for images in (targets, loose))
    assert share(t.hits(targets, pairs, t.all_right)) >= 0.8
    assert kept >= 0.85 and kept - free >= 0.04


def test_local_blend_leaves_the_other_object(model):
    pairs, kept = claims.pairs_of(t.one_of_two, COUNT), []
    half = torch.zeros(COUNT, t.SIZE, t.SIZE)
    half[:, :, t.SIZE // 2 :] = 1
    for words in (
        lambda pair: {"blend_words": [s.objects[0].colour for s in (pair.before, pair.after)]},
        lambda pair: {},
    ):
        sources, targets = t.edited(model, pairs, quick(claims.RUN), words)
        assert share(t.hits(targets, pairs, t.has_colour)) >= 0.8
        kept.append(float(psnr(targets, sources, half).mean()))
    assert kept[0] >= kept[1] + 5


@pytest.mark.long
def test_weights_of_words_move_what_they_name(model):
    assert all(claim.passed for claim in claims.weight_claims(model, COUNT, steps=8))


def test_the_unconditional_branch_frees_a_shape_that_attention_holds(model):
    """P2Plus: with self-attention held in every layer to the end, only the push from the held branch lets a shape change."""
    pairs, rates = claims.pairs_of(t.shape_swap, 2 * COUNT), []
    for until in (1.0, 0.0):
        run = t.Run(steps=STEPS, guidance_scale=7.5, options=P2POptions(1.0, 1.0, until, self_divisor=1))
        rates.append(share(t.hits(t.edited(model, pairs, run)[1], pairs, t.has_shape)))
    assert rates[0] >= rates[1] + 0.3


def test_pairs_are_compared_by_the_exact_test():
    assert claims.sign_test(8, 0) == pytest.approx(2 / 256) and claims.sign_test(3, 3) == 1
    claim = claims.compared("x", ([True] * 9 + [False], [True] * 4 + [False] * 6), 0.05)
    assert claim.passed and claim.value == pytest.approx(0.5) and "5 better, 0 worse" in claim.text
    assert not claims.compared("x", ([True, False], [False, True]), 0.05).passed
