"""Blended edits on the bundled model, checked by the oracle: a few trials of each claim of `editkit.benchmarks blended`.

The full counts with their promised rates belong to the benchmark; the floors here leave room for the small numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.headless.claims import blended as claims
from editkit.headless.claims import thin_masks
from editkit.headless.claims import trials as t
from editkit.pipelines.blended.decoder_tuning import DecoderSettings, tune_decoder
from editkit.pipelines.evaluation.clip_ranking import rank_by_text
from editkit.pipelines.evaluation.metrics import psnr_outside

COUNT = 16
QUICK = replace(claims.SETTINGS, steps=30)


def rate(model, make, check, settings=QUICK, count=COUNT):
    trials = [make(i) for i in range(count)]
    images, outside = claims.composited(model, trials, t.edit_all(model, trials, settings))
    assert outside == 0
    return sum(check(image, trial) for image, trial in zip(images, trials, strict=True)) / count


def test_oracle_cannot_pass_blindly():
    trials = [t.new_object(i) for i in range(COUNT)]
    assert not any(t.object_right(torch.from_numpy(trial.source), trial) for trial in trials)
    assert all(t.object_right(torch.from_numpy(t.render(trial.target, t.SIZE)), trial) for trial in trials)


def test_new_object_appears_where_the_mask_is(model):
    assert rate(model, t.new_object, t.object_right) >= 0.8


def test_background_is_replaced_around_the_object(model):
    assert rate(model, t.new_background, t.background_right) >= 0.6


@pytest.mark.long
def test_a_stroke_needs_room_for_its_object_until_late(model):
    """On fresh strokes; the simplest baseline is measured beside the schedules, and nothing exceeds the ceiling."""
    found = thin_masks.thin_table(model, 24, settings=replace(claims.SETTINGS, steps=24))
    rates = {name: sum(hits) / len(hits) for name, hits in found.items()}
    assert rates[thin_masks.LOG_SIGMA] >= rates[thin_masks.PLAIN] + 0.1
    assert rates[thin_masks.BASELINE] >= rates[thin_masks.PLAIN] + 0.1
    assert max(rates.values()) == rates[thin_masks.CEILING] >= 0.7


def test_without_guidance_towards_the_prompt_nothing_new_appears(model):
    assert (
        rate(model, lambda i: replace(t.new_object(i), prompt=t.new_object(i).before.caption), t.object_right, count=8)
        == 0
    )


def test_decoder_fine_tune_brings_the_background_back_and_keeps_the_edit(model):
    trials = [t.new_object(i) for i in range(1)]
    latents = t.edit_all(model, trials, QUICK)
    for index, trial in enumerate(trials):
        source, mask = t.images_of([trial])
        latent = latents[index : index + 1]
        plain = model.codec.decode(latent)
        tuned = tune_decoder(model.codec, latent, source, None, mask, settings=DecoderSettings()).image
        gain = psnr_outside(tuned, source, mask) - psnr_outside(plain, source, mask)
        assert float(gain) >= 5
        assert t.new_object_right(tuned[0], trial) == t.new_object_right(plain[0], trial)


def test_ranker_prefers_the_image_that_shows_the_words(model, ranker):
    wins = 0
    for index in range(COUNT):
        trial = t.new_object_alone(index)
        other = replace(
            trial.target,
            objects=(
                trial.target.objects[0],
                replace(trial.target.objects[1], shape="ring" if trial.target.objects[1].shape != "ring" else "star"),
            ),
        )
        pair = torch.stack([torch.from_numpy(t.render(scene, t.SIZE)) for scene in (other, trial.target)])
        wins += int(rank_by_text(pair, trial.prompt, ranker, mask=torch.from_numpy(trial.mask)[None]).order[0] == 1)
    assert wins >= 0.75 * COUNT
