"""SDEdit (Meng et al. 2022): noise an image partly and denoise it with a new prompt (docs/methods.md, section 11.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .core.errors import ShapeError
from .core.guidance import EditPrompts
from .core.noise import seeded_noise, start_latent
from .core.progress import Progress, silent
from .core.protocols import Denoiser
from .core.samplers import predictor, sample
from .core.shapes import check_latent


@torch.no_grad()
def sdedit(
    denoiser: Denoiser,
    latent: Tensor,
    prompts: EditPrompts,
    *,
    seeds: list[int],
    steps: int = 50,
    strength: float = 0.6,
    sampler: str = "euler",
    progress: Progress = silent,
) -> Tensor:
    """Edit an image with a prompt alone.

    Args:
        denoiser: the model.
        latent: clean source latent, unscaled, [B, C, h, w].
        prompts: positive, negative and guidance scale.
        seeds: one per image.
        steps: steps of the whole grid.
        strength: fraction of the steps that run, [0, 1]. 0 returns the source. 1 starts from noise alone, so that the
            result is plain text-to-image from the same seeds.
        sampler: name of a sampler (`samplers.sample`).
        progress: called after every step.
    Returns: edited latent, unscaled, [B, C, h, w].
    Raises: ShapeError, ParameterError, MismatchError.
    """
    latent = check_latent(latent, "latent", denoiser.channels)
    if len(seeds) != len(latent):
        raise ShapeError(f"there are {len(seeds)} seeds but {len(latent)} images: give one seed per image")
    if strength == 0:
        return latent
    sigmas = denoiser.schedule(steps, strength)
    prompts.check(denoiser, sigmas)
    source = denoiser.scale_in(latent)
    noise = seeded_noise(source.shape[1:], seeds, source.device)
    z = start_latent(denoiser, source, float(sigmas[0]), noise, from_source=strength < 1)
    return denoiser.scale_out(sample(sampler, predictor(denoiser, prompts), z, sigmas, progress))
