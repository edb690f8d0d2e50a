"""Deterministic samplers for the headless host.

ComfyUI brings its own samplers; these exist so that a workflow with KSampler also runs without it.
"""

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


def predictor(denoiser: Denoiser, prompts: EditPrompts) -> Predict:
    """The guided clean prediction as a function of latent and level."""
    return lambda z, sigma: guided(denoiser, z, sigma, prompts.positive, prompts.negative, prompts.guidance_scale)


def euler(predict: Predict, z: Tensor, sigmas: Tensor, progress: Progress = silent) -> Tensor:
    """First order, one prediction per step: DDIM with eta 0 for diffusion models."""
    levels = check_sigmas(sigmas).tolist()
    for i, (sigma, target) in enumerate(zip(levels, levels[1:], strict=False)):
        clean = predict(z, sigma)
        z = euler_step(z, clean, sigma, target)
        progress(i + 1, len(levels) - 1, clean)
    return z


def dpmpp_2m(predict: Predict, z: Tensor, sigmas: Tensor, progress: Progress = silent) -> Tensor:
    """DPM-Solver++(2M): second order from the previous prediction, one prediction per step (Lu et al. 2022, algorithm 2)."""
    levels = check_sigmas(sigmas).tolist()
    previous, last_h = None, 0.0
    for i, (sigma, target) in enumerate(zip(levels, levels[1:], strict=False)):
        clean = predict(z, sigma)
        if target == 0 or previous is None:
            z = euler_step(z, clean, sigma, target)
            last_h = math.inf if target == 0 else math.log(sigma / target)
        else:
            h = math.log(sigma / target)
            ratio = last_h / h
            mixed = (1 + 1 / (2 * ratio)) * clean - previous / (2 * ratio)
            z = euler_step(z, mixed, sigma, target)
            last_h = h
        previous = clean
        progress(i + 1, len(levels) - 1, clean)
    return z


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "ddim": euler, "dpmpp_2m": dpmpp_2m}


@torch.no_grad()
def sample(name: str, predict: Predict, z: Tensor, sigmas: Tensor, progress: Progress = silent) -> Tensor:
    """Run a sampler by ComfyUI's name. Raises ParameterError for one that only ComfyUI has."""
    if name not in SAMPLERS:
        raise ParameterError(f"sampler {name!r} runs only in ComfyUI: headless has {', '.join(SAMPLERS)}")
    return SAMPLERS[name](predict, z, sigmas, progress)
