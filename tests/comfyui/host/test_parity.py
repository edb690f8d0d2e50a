"""The shipped models through both hosts: the same predictions, images and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editkit.hosts.bundled import bundled_models
from editkit.hosts.diffusers.loading import load_bundled as load_headless
from editkit.hosts.host import codec_of, open_denoiser, text_encoder_of
from editkit.hosts.loading import load_bundled
from editkit.pipelines.core.errors import LoadError

PROMPT = "a red circle on a gray background"


@pytest.fixture(scope="module", params=bundled_models())
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def native(name):
    try:
        with torch.inference_mode():
            return load_bundled(name)
    except LoadError as error:
        pytest.skip(f"the bundled model is not there: {error}")


@pytest.fixture(scope="module")
def headless(name):
    return load_headless(model=name)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_predictions(native, headless) -> None:
    z = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    ours, theirs = text_encoder_of(native[1]).encode(PROMPT), headless.text.encode(PROMPT)
    assert (ours.tokens - theirs.tokens).abs().max() <= 1e-4
    with open_denoiser(native[0], z.shape, [ours]) as denoiser:
        for sigma in (0.05, 0.5, 1.0) if denoiser.flow else (0.05, 1.0, 8.0):
            state = z if denoiser.flow else z * sigma
            a = (state - denoiser.denoise(state, sigma, [ours])) / sigma
            b = (state - headless.denoiser.denoise(state, sigma, [theirs])) / sigma
            assert (a - b).abs().max() <= 1e-4, sigma
        assert denoiser.family == headless.denoiser.family
        assert relative(denoiser.schedule(50, 0.75), headless.denoiser.schedule(50, 0.75)) <= 1e-5


def test_tokens(native, headless) -> None:
    encoder = text_encoder_of(native[1])
    long = "a red circle left of a blue star and a green ring on a large striped pink background with a dotted white square"
    for text in (PROMPT, "A small  yellow star, left of a ring.", "", long):
        assert encoder.tokens(text) == headless.text.tokens(text)
        ours, theirs = encoder.encode(text), headless.text.encode(text)
        assert (ours.tokens - theirs.tokens).abs().max() <= 1e-4
        if theirs.pooled is not None:
            assert (ours.pooled - theirs.pooled).abs().max() <= 1e-4


def test_images(native, headless) -> None:
    codec, image = codec_of(native[2]), torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(2))
    z = codec.encode(image)
    assert relative(z, headless.codec.encode(image)) <= 1e-4
    assert (codec.decode(z, clamp=False) - headless.codec.decode(z, clamp=False)).abs().max() <= 1e-3
