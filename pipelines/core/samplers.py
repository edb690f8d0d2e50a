"""Deterministic samplers for the headless host. ComfyUI brings its own; with these a KSampler graph also runs without it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ParameterError
from .guidance import EditPrompts, guided
from .progress import Progress, silent
from .protocols import Denoiser
from .sigmas import check_sigmas, euler_step

Predict = Callable[[Tensor, float], Tensor]
"""The denoised latent [B, C, h, w] as a function of the latent z [B, C, h, w] (model scale) and its sigma."""


def predictor(denoiser: Denoiser, prompts: EditPrompts) -> Predict:
    """The guided prediction of `denoiser`."""
    return lambda z, sigma: guided(denoiser, z, sigma, prompts.positive, prompts.negative, prompts.guidance_scale)


def euler(predict: Predict, z: Tensor, sigmas: Tensor, progress: Progress = silent) -> Tensor:
    """First order, one prediction per step: DDIM with eta 0 for VP models (docs/methods.md, section 0.2).

    Args:
        predict: the denoised latent for a latent and its sigma.
        z: the latent [B, C, h, w] at `sigmas[0]`, model scale.
        sigmas: the grid [N + 1], falling.
        progress: called after every step.
    Returns: the latent [B, C, h, w] at `sigmas[-1]`.
    Raises: ParameterError for sigmas that do not fall.
    """
    grid = check_sigmas(sigmas).tolist()
    steps = len(grid) - 1
    for i in range(steps):
        denoised = predict(z, grid[i])
        z = euler_step(z, denoised, grid[i], grid[i + 1])
        progress(i + 1, steps, denoised)
    return z


def dpmpp_2m(predict: Predict, z: Tensor, sigmas: Tensor, progress: Progress = silent) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, by the prediction of the step before.

    One prediction per step; the first step and a last step to 0 are of first order.

    Args:
        predict: the denoised latent for a latent and its sigma.
        z: the latent [B, C, h, w] at `sigmas[0]`, model scale.
        sigmas: the grid [N + 1], falling.
        progress: called after every step.
    Returns: the latent [B, C, h, w] at `sigmas[-1]`.
    Raises: ParameterError for sigmas that do not fall.
    """
    grid = check_sigmas(sigmas).tolist()
    steps = len(grid) - 1
    previous: Tensor | None = None
    last_h = 0.0  # of log(sigma), the step before
    for i in range(steps):
        sigma, target = grid[i], grid[i + 1]
        denoised = predict(z, sigma)
        h = math.inf if target == 0 else math.log(sigma / target)
        if target == 0 or previous is None:
            z = euler_step(z, denoised, sigma, target)
        else:
            ratio = last_h / h
            extrapolated = (1 + 1 / (2 * ratio)) * denoised - previous / (2 * ratio)
            z = euler_step(z, extrapolated, sigma, target)
        previous = denoised
        last_h = h
        progress(i + 1, steps, denoised)
    return z


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "ddim": euler, "dpmpp_2m": dpmpp_2m}


@torch.no_grad()
def sample(name: str, predict: Predict, z: Tensor, sigmas: Tensor, progress: Progress = silent) -> Tensor:
    """Run a sampler by ComfyUI's name.

    Args:
        name: a key of SAMPLERS.
        predict: the denoised latent for a latent and its sigma.
        z: the latent [B, C, h, w] at `sigmas[0]`, model scale.
        sigmas: the grid [N + 1].
        progress: called after every step.
    Returns: the latent [B, C, h, w] at `sigmas[-1]`.
    Raises: ParameterError for a sampler that only ComfyUI has.
    """
    if name not in SAMPLERS:
        raise ParameterError(f"sampler {name!r} runs only in ComfyUI: headless has {', '.join(SAMPLERS)}")
    return SAMPLERS[name](predict, z, sigmas, progress)
