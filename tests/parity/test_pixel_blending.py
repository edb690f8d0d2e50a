"""Blending in pixels for the last steps, against BLD's LDM script (`--percentage_of_pixel_blending`)."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.blended.blending import BlendOptions, blended_denoise
from editkit.pipelines.blended.pixel_blending import PixelBlending
from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, downsample
from editkit.pipelines.core.noise import seeded_noise
from editkit.pipelines.core.sigmas import leading_sigmas
from editkit.pipelines.inversion.ddim import invert
from editkit.tests.toy_codec import ToyCodec, box, random_image
from editkit.tests.toys import ToyDenoiser, prompt, sd_table

SEEDS = [5]
PROMPTS = EditPrompts(prompt(0.4), None, 1.0)


class MildCodec(ToyCodec):
    """A decoder whose colours stay near those of an image, as a real one's do."""

    def decode(self, latent: torch.Tensor, *, clamp: bool = True) -> torch.Tensor:
        image = super().decode(latent, clamp=False) * 0.1 + 0.4
        return image.clamp(0, 1) if clamp else image


CODEC = MildCodec()
IMAGE = random_image(1, 16, 20, seed=1)
MASK = box(1, 16, 20, (5, 12), (3, 14))


def eps_of(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.sin(2 * x + x.mean()) * 0.6 + 0.1 * sigma / (1 + sigma)


def denoiser() -> ToyDenoiser:
    rule = lambda z, sigma, value: z - sigma * eps_of(z / (1 + sigma * sigma) ** 0.5, sigma)  # noqa: E731
    return ToyDenoiser(rule, scale=0.5, channels=3)


def noised(x0: torch.Tensor, sigma: float, draw: int) -> torch.Tensor:
    """q_sample: sqrt(abar) x0 + sqrt(1 - abar) n."""
    abar = 1 / (1 + sigma * sigma)
    return abar**0.5 * x0 + (1 - abar) ** 0.5 * seeded_noise(x0.shape[1:], SEEDS, draw=draw)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_pixel_blending_is_the_ldm_scripts(fraction):
    """Latents are blended before each step up to int(N (1 - p)); after the later steps x0 is composited in pixels."""
    model, sigmas = denoiser(), leading_sigmas(sd_table(), 10, 0.8)
    sigmas = torch.cat([sigmas[:-1], sd_table()[:1]])
    values, n = sigmas.tolist(), len(sigmas) - 1
    x0, mask = model.scale_in(CODEC.encode(IMAGE)), downsample(MASK, 4, 5, "nearest").mask
    x = start = noised(x0, values[0], 0)
    for i, (sigma, target) in enumerate(zip(values, values[1:], strict=False)):
        if i < int(n * (1 - fraction)):
            x = noised(x0, sigma, 2 * i + 1) * (1 - mask) + mask * x
        eps = eps_of(x, sigma)
        predicted = (x - (sigma * sigma / (1 + sigma * sigma)) ** 0.5 * eps) * (1 + sigma * sigma) ** 0.5
        x = (predicted + target * eps) / (1 + target * target) ** 0.5
        if i >= int(n * (1 - fraction)):
            pixels = CODEC.decode(model.scale_out(predicted), clamp=False)
            pixels = pixels * MASK[..., None] + IMAGE * (1 - MASK[..., None])
            x = noised(model.scale_in(CODEC.encode(pixels)), sigma, 2 * i + 1)
    script = BlendOptions("before", "previous (DDIM)", "fresh", pixels=PixelBlending(CODEC, IMAGE, MASK, fraction))
    z = blended_denoise(
        model,
        start * (1 + values[0] ** 2) ** 0.5,
        x0,
        sigmas,
        constant_schedule(mask),
        PROMPTS,
        seeds=SEEDS,
        options=script,
    )
    theirs = x * (1 + values[-1] ** 2) ** 0.5
    assert (z - theirs).norm() < 1e-5 * theirs.norm()


def test_pixel_blending_ends_at_the_encoded_composite():
    """With the background at the sigma reached, the last step leaves no noise: outside it is the source's own encoding."""
    model, sigmas = denoiser(), leading_sigmas(sd_table(), 6)
    x0 = model.scale_in(CODEC.encode(IMAGE))
    seen = []
    options = BlendOptions(pixels=PixelBlending(CODEC, IMAGE, MASK, 0.5))
    start = float(sigmas[0]) * seeded_noise(x0.shape[1:], SEEDS)
    schedule = constant_schedule(downsample(MASK, 4, 5).mask)
    z = blended_denoise(
        model, start, x0, sigmas, schedule, PROMPTS, seeds=SEEDS, options=options,
        progress=lambda done, total, preview=None: seen.append(preview),
    )  # fmt: skip
    composite = torch.where(MASK[..., None] >= 0.5, CODEC.decode(model.scale_out(seen[-1]), clamp=False), IMAGE)
    assert torch.allclose(z, model.scale_in(CODEC.encode(composite)), atol=1e-6)
    outside = downsample(MASK, 4, 5).mask[:, None].expand_as(z) == 0
    assert torch.allclose(z[outside], x0[outside], atol=1e-6)


def test_pixel_blending_refuses_what_does_not_fit_by_name():
    model, sigmas = denoiser(), leading_sigmas(sd_table(), 4)
    with pytest.raises(ParameterError, match=r"pixel_blending is 1\.5"):
        PixelBlending(CODEC, IMAGE, MASK, 1.5)
    with pytest.raises(ShapeError, match="pixel mask"):
        PixelBlending(CODEC, IMAGE, MASK[:, :8], 0.5)
    path = invert(model, CODEC.encode(IMAGE), prompt(0.4), sigmas)
    schedule, options = (
        constant_schedule(torch.ones(1, 4, 5)),
        BlendOptions(pixels=PixelBlending(CODEC, IMAGE, MASK, 0.5)),
    )
    with pytest.raises(ParameterError, match="background is a trajectory"):
        blended_denoise(model, path.latents[0], path, sigmas, schedule, PROMPTS, seeds=SEEDS, options=options)
    wide = BlendOptions(pixels=PixelBlending(CODEC, random_image(1, 32, 20), torch.ones(1, 32, 20), 1.0))
    with pytest.raises(ShapeError, match="the decoded latent"):
        source = model.scale_in(CODEC.encode(IMAGE))
        blended_denoise(model, source, source, sigmas, schedule, PROMPTS, seeds=SEEDS, options=wide)
