"""Seeded noise, drawn on the CPU with one generator per image: neither device nor batch split changes a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .protocols import Denoiser

STEP_STRIDE = 0x9E3779B97F4A7C15  # spreads (seed, draw) pairs over the 64-bit seeds


def seeded_noise(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu", draw: int = 0
) -> Tensor:
    """Unit-variance noise [B, ...] in float32; image b depends only on `seeds[b]` and `draw`.

    Args:
        shape: the shape of one image's noise, [C, h, w].
        seeds: one seed per image, 0 to 2**64 - 1.
        draw: 0 is the noise an edit starts from; step i of a run that draws afresh uses i + 1.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed((int(seed) + draw * STEP_STRIDE) % 2**64)
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows).to(device)


def seeded_draw(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu", draw: int = 0
) -> tuple[Tensor, Tensor]:
    """A uniform number in [0, 1) for every image, float32 [B], and noise as `seeded_noise` gives it, of one draw.

    What a loss over random noise levels needs at every step; independent of the batch split too.
    """
    uniform, rows = [], []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed((int(seed) + draw * STEP_STRIDE) % 2**64)
        uniform.append(torch.rand((), generator=generator))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(uniform).to(device), torch.stack(rows).to(device)


def image_seeds(seed: int, batch: int, batch_index: Sequence[int] | None = None) -> list[int]:
    """Image b of a batch has seed + b, so that it can be made again alone; a LATENT's batch_index replaces b."""
    index = list(range(batch)) if batch_index is None or len(batch_index) != batch else [int(i) for i in batch_index]
    return [(seed + i) % 2**64 for i in index]


def start_latent(
    denoiser: Denoiser, source: Tensor, sigma: float, noise: Tensor, *, from_source: bool = True
) -> Tensor:
    """The latent an edit starts from: the source noised to `sigma` (algorithm 1), or noise alone.

    `from_source=False` is the published SD2 script's start (section 16, row 3): unit Gaussian in the network's own
    input scale, whatever the level, so the first call sees an image that is too clean for its timestep.
    """
    if from_source:
        return denoiser.noise(source, noise, sigma)
    # unit variance at the network's input: VP models divide z by sqrt(1 + sigma^2); flow models take z as it is
    return noise * (1.0 if denoiser.flow else (1 + sigma * sigma) ** 0.5)
