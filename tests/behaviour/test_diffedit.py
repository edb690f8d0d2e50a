"""DiffEdit and guided reconstruction on the bundled model, checked by the oracle: a few trials of `editkit.benchmarks diffedit`.

The full counts with their promised figures belong to the benchmark; the floors here leave room for the small numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.headless.claims import diffedit as claims
from editkit.headless.claims import trials as t
from editkit.pipelines.evaluation.metrics import psnr
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from editkit.pipelines.inversion.null_text import NullTextOptions

COUNT = 12
QUICK = replace(claims.SETTINGS, steps=25, maps=5)


@pytest.fixture(scope="module")
def work(model):
    return claims.scenes(model, [t.swap(i) for i in range(COUNT)])


@pytest.fixture(scope="module")
def few(model):
    return claims.scenes(model, [t.swap(i) for i in range(3)])


def quality(model, work, z):
    return float(psnr(model.codec.decode(model.denoiser.scale_out(z)), work.images).mean())


def test_oracle_cannot_pass_blindly(work):
    for trial in work.trials:
        source, target = (torch.from_numpy(t.render(scene, t.SIZE)) for scene in (trial.before, trial.target))
        assert not t.new_colour_right(source, trial) and not t.new_object_right(source, trial)
        assert t.new_colour_right(target, trial) and t.new_object_right(target, trial)


def test_the_mask_is_where_the_thing_is(model, work):
    true = claims.true_latent_mask(model, work)
    assert float(claims.overlap(torch.ones_like(true), true).mean()) < 0.4
    assert float(claims.overlap(true.roll(1, 0), true).mean()) < 0.4  # the mask of another scene
    many, one = (claims.overlaps(model, work, maps) for maps in (10, 1))
    assert float(many.mean()) >= 0.72 and float((many - one).mean()) > 0


def test_the_thing_becomes_what_the_prompt_says_and_the_rest_stays(model, work):
    edited, change, change_px = claims.edit(model, work, QUICK)
    pairs = list(zip(edited, work.trials, strict=True))
    assert sum(t.new_colour_right(*pair) for pair in pairs) >= 0.8 * COUNT
    assert sum(t.new_object_right(*pair) for pair in pairs) >= 0.6 * COUNT
    assert change == 0 and change_px == 0


def test_implicit_inversion_loses_nothing_that_the_vae_keeps(model, few):
    denoiser, found = model.denoiser, {}
    for mode in ("implicit", "current"):
        options = InversionOptions(mode)
        trajectory = invert(denoiser, few.latent, few.source, denoiser.schedule(25), options=options)
        found[mode] = quality(model, few, reconstruct(denoiser, trajectory, few.source))
    vae = quality(model, few, denoiser.scale_in(few.latent))
    assert vae - found["implicit"] <= 0.5 and vae - found["current"] > 1, (vae, found)


def test_null_text_brings_the_image_back_that_guidance_loses(model, few):
    found = claims.rebuild(model, few, steps=10, options=NullTextOptions(inner=5, lr=0.1))
    vae, plain, learned = (float(getattr(found, name).mean()) for name in ("vae", "plain", "null_text"))
    assert learned >= plain + 8 and learned >= vae - 7, (vae, plain, learned)
