"""What an inverted picture is sampled back to: itself, another word, and SDEdit beside it (methods.md, 11.1 and 11.2)."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.blended.blending import blended_denoise
from editkit.pipelines.core.errors import ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.noise import seeded_noise
from editkit.pipelines.core.samplers import predictor, sample
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct, reconstruction_quality
from editkit.pipelines.sdedit import sdedit
from editkit.tests.toy_codec import ToyCodec
from editkit.tests.toys import ToyDenoiser, gaussian, prompt, random_latent

B, C, H, W = 2, 4, 6, 5
EXACT = InversionOptions("implicit", iterations=60, tolerance=1e-10)
PROMPTS = EditPrompts(prompt(1.0), prompt(0.0), 3.0)


def source() -> torch.Tensor:
    return random_latent(B, C, H, W, seed=3).double()


def curved(z, sigma, value):
    """Derivative sin(z) + value: smooth, non-linear, and clean = z at level 0 as with a trained model."""
    return z - sigma * (torch.sin(z) + value)


def even(steps: int) -> torch.Tensor:
    return torch.linspace(2, 0, steps + 1)


def test_word_swap_with_the_same_word_is_the_reconstruction():
    denoiser = ToyDenoiser(curved)
    path = invert(denoiser, source(), prompt(0.25), even(10), options=EXACT)
    assert torch.allclose(reconstruct(denoiser, path, prompt(0.25)), source(), atol=1e-8)
    denoiser.forward_passes = 0
    swapped = reconstruct(denoiser, path, prompt(0.75), negative=prompt(0.0), guidance_scale=2.0)
    assert (swapped - source()).abs().min() > 0.1 and denoiser.forward_passes == 2 * 10 * B


def test_reconstruction_quality_tells_the_vaes_loss_apart():
    codec = ToyCodec()
    image = torch.rand(2, 13, 10, 3, generator=torch.Generator().manual_seed(4))
    clean = random_latent(2, codec.channels, -(-13 // codec.factor), -(-10 // codec.factor), seed=1)
    perfect = reconstruction_quality(codec, clean, clean, image)
    assert (perfect.without_vae == 100).all() and torch.equal(perfect.with_vae, perfect.vae_only)
    worse = reconstruction_quality(codec, clean + 0.3, clean, image)
    assert (worse.without_vae < 60).all() and torch.equal(worse.vae_only, perfect.vae_only)
    assert not torch.equal(worse.with_vae, worse.vae_only)
    assert reconstruction_quality(codec, clean + 0.3, clean).with_vae is None


def test_sdedit_keeps_the_source_at_0_and_forgets_it_at_1():
    denoiser, latent = ToyDenoiser(gaussian(), scale=0.5), random_latent(B, C, H, W, seed=3)
    prompts = EditPrompts(prompt(), None, 1.0)
    assert sdedit(denoiser, latent, prompts, seeds=[1, 2], strength=0) is latent and denoiser.forward_passes == 0
    full = sdedit(denoiser, latent, prompts, seeds=[1, 2], steps=10, strength=1)
    assert torch.equal(full, sdedit(denoiser, latent * 0, prompts, seeds=[1, 2], steps=10, strength=1))
    sigmas = denoiser.schedule(10)
    noise = seeded_noise((C, H, W), [1, 2]) * float((1 + sigmas[0] ** 2) ** 0.5)
    assert torch.allclose(full, sample("euler", predictor(denoiser, prompts), noise, sigmas) / 0.5, atol=1e-5)


def test_sdedit_runs_its_share_of_the_steps_and_equals_a_blended_edit_everywhere():
    denoiser, latent = ToyDenoiser(curved), random_latent(B, C, H, W, seed=3)
    out = sdedit(denoiser, latent, PROMPTS, seeds=[1, 2], steps=10, strength=0.6)
    assert denoiser.forward_passes == B * 2 * 6
    sigmas = denoiser.schedule(10, 0.6)
    z = denoiser.noise(latent, seeded_noise((C, H, W), [1, 2]), float(sigmas[0]))
    everywhere = constant_schedule(torch.ones(1, H, W))
    assert torch.equal(out, blended_denoise(denoiser, z, latent, sigmas, everywhere, PROMPTS, seeds=[1, 2]))
    with pytest.raises(ShapeError, match="seeds"):
        sdedit(denoiser, latent, PROMPTS, seeds=[1])
