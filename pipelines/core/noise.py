"""Seeded noise, drawn on the CPU with one generator per image, so that neither device nor batch split changes a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .protocols import Denoiser

STEP_STRIDE = 0x9E3779B97F4A7C15  # spreads (seed, draw) pairs over the 64-bit seeds
WORD = 2**32
SEEDS = 2**64


def seeded_noise(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu", draw: int = 0
) -> Tensor:
    """Draw noise of unit variance; that of image b depends only on `seeds[b]` and `draw`.

    Args:
        shape: the shape of one image's noise, [C, h, w].
        seeds: one seed per image, 0 to 2**64 - 1.
        device: where the noise is moved to; it is drawn on the CPU.
        draw: 0 is the initial noise of an edit; step i of a run that draws new noise uses i + 1.
    Returns: float32 [B, C, h, w] with B = len(seeds).
    """
    noise = [torch.randn(tuple(shape), generator=_generator(seed, draw)) for seed in seeds]
    return torch.stack(noise).to(device)


def seeded_draw(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu", draw: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw a uniform number and noise for every image: a loss over random sigmas needs both at every step.

    The noise is not the one of `seeded_noise` with this `draw`.

    Args:
        shape: the shape of one image's noise, [C, h, w].
        seeds: one seed per image, 0 to 2**64 - 1.
        device: where both are moved to; they are drawn on the CPU.
        draw: number of the draw, from 0.
    Returns: numbers in [0, 1), float32 [B], and noise of unit variance, float32 [B, C, h, w], with B = len(seeds).
    """
    uniform = []
    noise = []
    for seed in seeds:
        generator = _generator(seed, draw)
        uniform.append(torch.rand((), generator=generator))
        noise.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(uniform).to(device), torch.stack(noise).to(device)


def seeded_uniform(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu", draw: int = 0
) -> Tensor:
    """Draw uniform numbers in [0, 1) for every image.

    Args:
        shape: the shape of one image's numbers.
        seeds: one seed per image, 0 to 2**64 - 1.
        device: where they are moved to; they are drawn on the CPU.
        draw: number of the draw, from 0.
    Returns: float32 [B, *shape] with B = len(seeds).
    """
    numbers = [torch.rand(tuple(shape), generator=_generator(seed, draw)) for seed in seeds]
    return torch.stack(numbers).to(device)


def _generator(seed: int, draw: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed((folded_seed(seed) + draw * STEP_STRIDE) % SEEDS)


def mixed(number: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of the 64-bit numbers that keeps 0."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % SEEDS
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % SEEDS
    return number ^ (number >> 31)


def folded_seed(seed: int) -> int:
    """A 64-bit seed as 32 bits, because PyTorch's generator on the CPU ignores the rest; smaller seeds stay as they are."""
    seed = int(seed) % SEEDS
    return (seed ^ mixed(seed >> 32)) % WORD


def image_seeds(seed: int, batch: int, batch_index: Sequence[int] | None = None) -> list[int]:
    """Seeds of a batch. Image 0 has the seed itself, every other image a seed mixed from it and the image's number.

    So runs with neighbouring seeds share no image, and an image's noise does not depend on how a batch is split.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        batch: number of images.
        batch_index: the numbers of the images, as a LATENT carries them; None, or one of another length, counts from 0.
    """
    index = range(batch) if batch_index is None or len(batch_index) != batch else [int(i) for i in batch_index]
    seed = int(seed) % SEEDS
    return [seed if i == 0 else mixed(mixed((seed + STEP_STRIDE) % SEEDS) ^ i) for i in index]


def noised_latents(denoiser: Denoiser, clean: Tensor, sigmas: Sequence[float], seeds: Sequence[int]) -> list[Tensor]:
    """Noise clean latents to each sigma, with the same noise.

    Args:
        denoiser: adds the noise.
        clean: clean latents [B, C, h, w], unscaled.
        sigmas: sigmas to noise to.
        seeds: one per image.
    Returns: one latent [B, C, h, w] per sigma, model scale.
    """
    noise = seeded_noise(clean.shape[1:], seeds, denoiser.device)
    source = denoiser.scale_in(clean)
    return [denoiser.noise(source, noise, sigma) for sigma in sigmas]


def start_latent(
    denoiser: Denoiser, source: Tensor, sigma: float, noise: Tensor, *, from_source: bool = True
) -> Tensor:
    """The latent that an edit starts from (BLD, algorithm 1).

    Args:
        denoiser: noises the source.
        source: source latent [B, C, h, w], model scale.
        sigma: the first sigma of the run.
        noise: unit-variance noise of the same shape.
        from_source: True noises the source to `sigma`. False starts from pure noise as the published SD2 script does
            (docs/methods.md, section 16, row 3): unit variance in the network's own input scale at any sigma, so the
            first forward pass sees a latent with too little noise for its timestep.
    Returns: the latent [B, C, h, w] at `sigma`, model scale.
    """
    if from_source:
        return denoiser.noise(source, noise, sigma)
    # unit variance at the network's input: VP models divide z by sqrt(1 + sigma^2); flow models take z as it is
    return noise * (1.0 if denoiser.flow else (1 + sigma * sigma) ** 0.5)
