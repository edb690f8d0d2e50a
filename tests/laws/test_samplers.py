"""The headless samplers: DPM-Solver++(2M) is second order (T3), and any of them edits as the blended loop does."""

from __future__ import annotations

import math

import pytest
import torch

from editkit.pipelines.blended.blending import Background, blended_denoise
from editkit.pipelines.blended.prediction import blended_predictor
from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, dilation_schedule
from editkit.pipelines.core.samplers import dpmpp_2m, euler, predictor, sample
from editkit.tests.toys import ToyDenoiser, neighbourly, prompt, random_latent, sd_table

SIGMAS = torch.tensor([14.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.0])
PROMPTS = EditPrompts(prompt(1.0), prompt(0.0), 3.0)


def latent_pixels() -> torch.Tensor:
    mask = torch.zeros(1, 12, 12)
    mask[:, 5:7, 3:8] = 1
    return mask


def ratio_to_exact(sampler, levels: int) -> float:
    """x at the last level over the exact solution, for the Gaussian denoiser of unit deviation."""
    high, low = sd_table().double()[[999, 0]].tolist()
    grid = torch.tensor([high * (low / high) ** (i / (levels - 1)) for i in range(levels)], dtype=torch.float64)
    start = torch.tensor([math.sqrt(1 + high**2)], dtype=torch.float64)
    return float(sampler(lambda z, sigma: z / (1 + sigma**2), start, grid)) / math.sqrt(1 + low**2)


def test_t3_second_order_beats_twice_the_euler_steps():
    assert ratio_to_exact(euler, 20) == pytest.approx(0.9219, abs=2e-4)
    assert abs(1 - ratio_to_exact(dpmpp_2m, 10)) < abs(1 - ratio_to_exact(euler, 20))
    errors = [abs(1 - ratio_to_exact(dpmpp_2m, n)) for n in (21, 41, 81)]
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3


def k_diffusion_2m(predict, x, sigmas):
    """k-diffusion's sample_dpmpp_2m, in its own variables."""
    old = None
    for i in range(len(sigmas) - 1):
        denoised = predict(x, float(sigmas[i]))
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        d = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (t + sigmas[i - 1].log()) / h
            d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * d
        old = denoised
    return x


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_dpmpp_2m_is_that_of_k_diffusion_on_unequal_log_steps(end):
    sigmas = torch.tensor([14.0, 9.0, 2.0, 1.5, 0.3, 0.25, 0.1, end], dtype=torch.float64)
    start = torch.linspace(-20, 20, 9, dtype=torch.float64)

    def predict(z, sigma):
        return torch.tanh(z / (1 + sigma)) + 0.1 * sigma

    ours, theirs = dpmpp_2m(predict, start, sigmas), k_diffusion_2m(predict, start, sigmas)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("flow", [False, True])
def test_euler_through_the_predictor_is_the_blended_loop(flow):
    denoiser, source = ToyDenoiser(neighbourly(), flow=flow), random_latent(2, 4, 12, 12, seed=1)
    sigmas, schedule = SIGMAS / 14 * (0.95 if flow else 14), dilation_schedule(latent_pixels(), (5, 3, 1))
    background = Background(denoiser, source, [3, 4])
    start = background.at(float(sigmas[0]))
    loop = blended_denoise(denoiser, start, source, sigmas, schedule, PROMPTS, seeds=[3, 4])
    predict = blended_predictor(predictor(denoiser, PROMPTS), background, schedule, sigmas)
    assert torch.allclose(sample("ddim", predict, start, sigmas), loop, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_outside_ends_at_the_source(name):
    denoiser, source = ToyDenoiser(neighbourly()), random_latent(1, 4, 12, 12, seed=2)
    background, schedule = Background(denoiser, source, [9]), constant_schedule(latent_pixels())
    predict = blended_predictor(predictor(denoiser, PROMPTS), background, schedule, SIGMAS)
    out = sample(name, predict, background.at(14.0), SIGMAS)
    outside = (latent_pixels() == 0).expand_as(out)
    assert (out - source)[outside].abs().max() < 1e-5 and not torch.allclose(out[~outside], source[~outside])


def test_samplers_of_comfyui_alone_are_refused_by_name():
    with pytest.raises(ParameterError, match="uni_pc"):
        sample("uni_pc", lambda z, sigma: z, torch.zeros(1), SIGMAS)
