"""Soft mask schedules: latent pixels become editable one after another (T14; docs/methods.md, section 11.10)."""

from __future__ import annotations

import torch

from editkit.pipelines.blended.blending import BlendOptions, blended_denoise
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, release_schedule
from editkit.pipelines.core.noise import seeded_noise
from editkit.tests.toys import ToyDenoiser, pointwise, prompt, random_latent

B, C, H, W = 2, 4, 6, 5
PROMPTS = EditPrompts(prompt(1.0), prompt(0.0), 3.0)


def box() -> torch.Tensor:
    mask = torch.zeros(1, H, W)
    mask[:, 2:4, 1:4] = 1
    return mask


def test_t14_weakly_changed_latent_pixels_are_released_late():
    keep = torch.tensor([0.5, 0.76, 0.0, 1.0, 0.25])
    schedule = release_schedule((1 - keep).view(1, 1, 5))
    free = torch.stack([schedule.at(i, torch.linspace(1, 0, 5))[0, 0, 0] for i in range(4)])
    assert free.tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]]


def test_the_editable_set_only_grows():
    schedule = release_schedule(torch.rand(1, H, W, generator=torch.Generator().manual_seed(0)))
    sigmas = torch.linspace(3, 0, 10)
    masks = [schedule.to(torch.device("cpu")).expanded(B, H, W).at(i, sigmas) for i in range(9)]
    assert all((after >= before).all() for before, after in zip(masks, masks[1:], strict=False))
    assert masks[0].sum() < masks[-1].sum() and masks[0].shape == (B, 1, H, W)
    assert torch.equal(schedule.at_sigma(float(sigmas[4]), sigmas), schedule.at(4, sigmas))


def edit(schedule, **kwargs):
    """A blended edit from the noised source; returns source and result."""
    denoiser, source = ToyDenoiser(pointwise()), random_latent(B, C, H, W, seed=3)
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    z = denoiser.noise(source, seeded_noise((C, H, W), [5, 6]), 8.0)
    return source, blended_denoise(denoiser, z, source, sigmas, schedule, PROMPTS, seeds=[5, 6], **kwargs)


def test_blending_before_each_step_is_the_published_loop():
    change = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand(1, H, W)
    source, ours = edit(release_schedule(change), options=BlendOptions(blend="before"))
    levels, noise = [8.0, 4.0, 2.0, 1.0, 0.0], seeded_noise((C, H, W), [5, 6])
    keep, rule = 1 - change[:, None], pointwise()
    x = source + 8 * noise
    for i in range(4):
        if i > 0:
            x = torch.where(keep > i / 4, source + levels[i] * noise, x)
        denoised = rule(x, levels[i], 0.0) + 3 * (rule(x, levels[i], 1.0) - rule(x, levels[i], 0.0))
        x = x + (levels[i + 1] - levels[i]) * (x - denoised) / levels[i]
    assert torch.allclose(ours, x, atol=1e-5)


def test_binary_maps_are_plain_masks_and_constant_maps_all_or_nothing():
    for mask in (box(), torch.ones(1, H, W), torch.zeros(1, H, W)):
        source, ours = edit(release_schedule(mask))
        assert torch.equal(ours, edit(constant_schedule(mask))[1])
        outside = (mask[:, None] == 0).expand_as(ours)
        assert torch.equal(ours[outside], source[outside])


def test_t19_a_range_goes_on_with_the_release_where_it_was():
    denoiser, source = ToyDenoiser(pointwise()), random_latent(B, C, H, W, seed=3)
    sigmas, start = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0]), seeded_noise((C, H, W), [5, 6]) * 8
    schedule = release_schedule(torch.rand(1, H, W, generator=torch.Generator().manual_seed(0)))

    def run(z, **kwargs):
        return blended_denoise(denoiser, z, source, sigmas, schedule, PROMPTS, seeds=[5, 6], **kwargs)

    for cut in range(1, 5):
        assert torch.equal(run(run(start, end=cut), start=cut), run(start))
