"""Inversion and DiffEdit's mask against diffusers: its inverse scheduler in VP space, its published mask rule."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler

from editkit.hosts.diffusers.denoiser import DiffusersDenoiser
from editkit.hosts.diffusers.schedules import sigma_table
from editkit.pipelines.core.noise import seeded_noise
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.diffedit.mask import MaskNegatives, diffedit_mask, strength_sigma
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from editkit.pipelines.inversion.null_text import NullTextOptions, null_text
from editkit.tests.parity import tiny
from editkit.tests.toys import random_latent


def denoiser(prediction: str = "epsilon") -> DiffusersDenoiser:
    return DiffusersDenoiser(
        unet=tiny.unet(), table=sigma_table(tiny.SCHEDULER), prediction=prediction, family="sd1",
        scaling_factor=0.18215, factor=8,
    )  # fmt: skip


def context(seed: int, rows: int = 1) -> Context:
    return Context(random_latent(rows, 7, 16, seed=seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_next_equals_the_inverse_scheduler(prediction):
    """The network is asked about the upper level, so a v is turned into eps there (diffusers would at the lower one)."""
    model, cond, latent = denoiser(prediction), context(1), random_latent(2, 4, 8, 8, seed=3) / 0.18215
    scheduler = DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x, theirs = latent * 0.18215, []
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.unet(x, t, cond.tokens.expand(2, -1, -1)).sample
            a = scheduler.alphas_cumprod[t]
            eps = output if prediction == "epsilon" else a**0.5 * output + (1 - a) ** 0.5 * x
            x = scheduler.step(eps, t, x).prev_sample
            theirs.append(x)
    sigmas = model.schedule(10)
    path = invert(model, latent, cond, sigmas, options=InversionOptions("next"))
    for index, x in enumerate(reversed(theirs)):  # noisiest first
        z = x * (1 + float(sigmas[index]) ** 2) ** 0.5
        assert (path.latent(index) - z).abs().max() <= 1e-4 * z.abs().max()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_implicit_round_trip_on_a_network(prediction):
    model, latent = denoiser(prediction), random_latent(2, 4, 8, 8, seed=3)
    errors = {}
    for mode in ("next", "current", "implicit"):
        options = InversionOptions(mode, iterations=30, tolerance=1e-6)
        path = invert(model, latent, context(1), model.schedule(20), options=options)
        back = reconstruct(model, path, context(1))
        errors[mode] = float((back - path.source).norm() / path.source.norm())
    assert errors["implicit"] < 1e-3 and errors["implicit"] < 0.1 * min(errors["next"], errors["current"]), errors


@pytest.mark.parametrize("negatives", [None, (5, 6)])
def test_the_mask_is_the_published_rule(negatives):
    """Guided at 7.5 with 4 n rows, eps differences, threshold on the mean: diffusers' generate_mask for one picture.

    With one negative for both prompts ours needs none; with two (source_negative_prompt, target_negative_prompt) it does.
    """
    model, source, target = denoiser(), context(1), context(2)
    null_source, null_target = (context(seed) for seed in negatives or (5, 5))
    latent, seeds, maps = random_latent(1, 4, 8, 8, seed=3), [9], 6
    latent[..., 2:5, 1:4] *= 60
    sigma = strength_sigma(model, 0.5)
    t = torch.tensor(model.timestep(sigma))
    assert int(t) == 481
    abar = 1 / (1 + sigma * sigma)
    noise = torch.cat([seeded_noise((4, 8, 8), seeds, draw=j) for j in range(maps)])
    x = abar**0.5 * latent * 0.18215 + (1 - abar) ** 0.5 * noise
    with torch.no_grad():
        e_null_source, e_null_target, e_source, e_target = (
            model.unet(x, t, c.tokens.expand(maps, -1, -1)).sample for c in (null_source, null_target, source, target)
        )
    guided_source = e_null_source + 7.5 * (e_source - e_null_source)
    difference = ((e_null_target + 7.5 * (e_target - e_null_target)) - guided_source).abs()
    guidance_map = difference.reshape(1, maps, 4, 8, 8).mean([1, 2])
    magnitude = guidance_map.mean() * 3.0
    heat = guidance_map.clamp(0, magnitude) / magnitude
    chosen = None if negatives is None else MaskNegatives(null_source, null_target)
    ours = diffedit_mask(model, latent, source, target, seeds=seeds, maps=maps, negatives=chosen)
    assert (
        ours.heat - heat
    ).abs().max() < 1e-4  # float32 in another order, times the guidance of 7.5; a map is about 0.3
    assert torch.equal(ours.mask, torch.where(heat <= 0.5, 0.0, 1.0)) and 0 < ours.mask.mean() < 1


def test_null_text_learns_on_a_network_and_leaves_its_weights():
    """Also where the weights are marked as trainable: they receive nothing."""
    model, latent = denoiser(), random_latent(2, 4, 8, 8, seed=3)
    model.unet.requires_grad_(True)
    before = {name: value.detach().clone() for name, value in model.unet.state_dict().items()}
    source, null = context(1), context(5)
    path = invert(model, latent, source, model.schedule(4), options=InversionOptions("implicit", iterations=8))
    result = null_text(model, path, source, null, options=NullTextOptions(inner=5, tolerance=0, tolerance_growth=0))
    assert all(value.grad is None for value in model.unet.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.unet.state_dict().items())
    plain = reconstruct(model, path, source, negative=null, guidance_scale=7.5)
    learned = reconstruct(model, path, source, negative=result.embeddings, guidance_scale=7.5)
    assert torch.allclose(learned, result.rebuilt, atol=1e-4)
    assert (learned - path.source).norm() < 0.9 * (plain - path.source).norm()
