"""The shipped model through both hosts: the same predictions, pictures, tokens and edits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editkit.nodes import _host
from editkit.pipelines.backends.folder import load_bundled
from editkit.pipelines.blending import EditPrompts, blended_denoise, start_latent
from editkit.pipelines.errors import LoadError
from editkit.pipelines.masks import dilation_schedule
from editkit.pipelines.noise import seeded_noise

PROMPT, SEEDS = "a red circle on a gray background", [3, 4]


@pytest.fixture(scope="module")
def native():
    try:
        with torch.inference_mode():
            return _host.load_bundled()
    except LoadError as error:
        pytest.skip(f"the bundled model is not there: {error}")


@pytest.fixture(scope="module")
def headless():
    return load_bundled()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_predictions(native, headless) -> None:
    z = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    ours, theirs = _host.text_encoder(native[1]).encode(PROMPT), headless.text.encode(PROMPT)
    assert (ours.tokens - theirs.tokens).abs().max() <= 1e-4
    with _host.open_denoiser(native[0], z.shape, [ours]) as denoiser:
        for sigma in (0.05, 1.0, 8.0):
            state = z * sigma
            a = (state - denoiser.denoise(state, sigma, [ours])) / sigma
            b = (state - headless.denoiser.denoise(state, sigma, [theirs])) / sigma
            assert (a - b).abs().max() <= 1e-4, sigma
        assert denoiser.family == headless.denoiser.family
        assert relative(denoiser.schedule(50, 0.75), headless.denoiser.schedule(50, 0.75)) <= 1e-5


def test_tokens(native, headless) -> None:
    encoder = _host.text_encoder(native[1])
    for text in (PROMPT, "A small  yellow star, left of a ring."):
        assert encoder.tokens(text) == headless.text.tokens(text)


def test_pictures(native, headless) -> None:
    codec, image = _host.codec(native[2]), torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(2))
    z = codec.encode(image)
    assert relative(z, headless.codec.encode(image)) <= 1e-4
    assert (codec.decode(z, clamp=False) - headless.codec.decode(z, clamp=False)).abs().max() <= 1e-3


def test_a_blended_edit(native, headless) -> None:
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(1, 4, 12, 12, generator=generator) / 0.18215
    mask = torch.zeros(1, 12, 12)
    mask[:, 3:8, 4:9] = 1
    schedule = dilation_schedule(mask)

    def edit(denoiser, encoder) -> Tensor:
        prompts = EditPrompts(encoder.encode(PROMPT), encoder.encode(""), 4.0)
        sigmas = denoiser.schedule(10, 0.75)
        clean = denoiser.scale_in(source)
        noise = seeded_noise(clean.shape[1:], SEEDS)
        start = start_latent(denoiser, clean.expand(2, -1, -1, -1), float(sigmas[0]), noise)
        z = blended_denoise(denoiser, start, clean, sigmas, schedule, prompts, seeds=SEEDS)
        return denoiser.scale_out(z)

    encoder = _host.text_encoder(native[1])
    opened = _host.open_denoiser(native[0], (2, 4, 12, 12), [encoder.encode(PROMPT)])
    with opened as denoiser:
        ours = edit(denoiser, encoder)
    assert relative(ours, edit(headless.denoiser, headless.text)) <= 1e-3
