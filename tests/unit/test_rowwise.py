"""The benchmark's shortcut: scenes of a batch learn what each would learn alone, and are drawn with their own weights."""

from __future__ import annotations

import torch

from editkit.headless.claims.rowwise import rowwise
from editkit.pipelines.core.tune_plan import TunePlan
from editkit.pipelines.layerdiffusion.finetune import TuneOptions, layered_tune
from editkit.pipelines.learning.weight_deltas import attention_layers
from editkit.tests.toy_layered import network, network_text, object_mask
from editkit.tests.toys import random_latent

SOURCE, REFERENCE, Z = (random_latent(2, 4, 8, 8, seed=seed) for seed in range(3))
TEXT, NEGATIVE = network_text(1, rows=2), network_text(2)


def tune(first: int, count: int):
    part = slice(first, first + count)
    denoiser = rowwise(network(), count)
    found = layered_tune(
        denoiser, SOURCE[part], REFERENCE[part], TEXT.with_tokens(TEXT.tokens[part]), object_mask(8, 8),
        seeds=[7, 8][part], options=TuneOptions(plan=TunePlan("lora", rank=2), steps=4, lr=1e-2),
    )  # fmt: skip
    return denoiser, found


def test_scenes_learn_and_predict_as_they_would_alone():
    together, found = tune(0, 2)
    tuned = together.with_rows(found.changes)
    with torch.no_grad():
        both = tuned.denoise(Z, 2.0, [TEXT, NEGATIVE])
        plain = network().denoise(Z, 2.0, [TEXT, NEGATIVE])
    assert (both - plain).abs().max() > 1e-3
    for scene in range(2):
        alone, single = tune(scene, 1)
        for name, change in single.changes.items():
            torch.testing.assert_close(change[0], found.changes[name][scene], atol=2e-4, rtol=1e-3)
        own = TEXT.with_tokens(TEXT.tokens[scene : scene + 1])
        with torch.no_grad():
            expected = alone.with_rows(single.changes).denoise(Z[scene : scene + 1], 2.0, [own, NEGATIVE])
        torch.testing.assert_close(both[:, scene : scene + 1], expected, atol=1e-4, rtol=1e-3)


def test_a_rows_additions_are_what_a_lora_adds():
    """Against the plain low-rank layer with the same numbers."""
    together, found = tune(0, 2)
    names, free = attention_layers(network().unet), network()
    clone = free.model_clone(TunePlan("lora", rank=2), (1, 4, 8, 8))
    for name in names:
        layer = clone.denoiser.unet.get_submodule(name)
        layer.up.data, layer.down.data = found.changes[f"{name}.up"][1], found.changes[f"{name}.down"][1]
    with torch.no_grad():
        expected = clone.denoiser.denoise(Z[1:], 2.0, [TEXT.with_tokens(TEXT.tokens[1:])])
        got = together.with_rows(found.changes).denoise(Z, 2.0, [TEXT])
    torch.testing.assert_close(got[:, 1:], expected, atol=1e-4, rtol=1e-3)
