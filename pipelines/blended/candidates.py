"""Candidates: several edits of each image of a batch (BLD, algorithm 1), in the order of ComfyUI's Repeat Latent Batch.

Two images a and b with three copies become a b a b a b. A noised batch carries the index of each candidate's source, so
that a source is never paired with another image's candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import ParameterError
from ..core.noise import image_seeds, seeded_noise, start_latent
from ..core.protocols import Denoiser
from ..core.shapes import Sources, candidate_sources, check_latent


@dataclass(frozen=True)
class Candidates:
    """Noised candidates.

    Attributes:
        z: model scale, [images x copies, C, h, w].
        sources: which image each was made from.
        batch_index: for every candidate the number that its seed is made from; None counts from 0.
    """

    z: Tensor
    sources: Sources
    batch_index: list[int] | None


def noised_candidates(
    denoiser: Denoiser,
    latent: Tensor,
    sigma: float,
    *,
    seed: int,
    copies: int = 1,
    batch_index: Sequence[int] | None = None,
    from_source: bool = True,
) -> Candidates:
    """Noise each image of a batch to `sigma`, `copies` times with different noise.

    Args:
        denoiser: the model; no prediction is made.
        latent: clean latents, unscaled, [B, C, h, w].
        sigma: sigma to reach.
        seed: see `image_seeds`.
        copies: candidates per image, at least 1.
        batch_index: of the images, as a LATENT carries it; the copies continue it as Repeat Latent Batch does.
        from_source: see `start_latent`.
    Returns: the candidates at `sigma`, with the index of each one's source.
    Raises: ShapeError for anything but a latent; ParameterError for less than one copy.
    """
    if copies < 1:
        raise ParameterError(f"copies is {copies}: give 1 or more")
    source = denoiser.scale_in(check_latent(latent, "latent").repeat(copies, 1, 1, 1))
    images = len(latent)
    index = None if batch_index is None or len(batch_index) != images else repeated_index(batch_index, copies)
    noise = seeded_noise(source.shape[1:], image_seeds(seed, len(source), index), source.device)
    z = start_latent(denoiser, source, sigma, noise, from_source=from_source)
    return Candidates(z, candidate_sources(images, copies), index)


def repeated_index(batch_index: Sequence[int], copies: int) -> list[int]:
    """The batch indices of repeated images: every copy continues behind the largest of the copy before it."""
    offset = max(batch_index) - min(batch_index) + 1
    return [int(number) + copy * offset for copy in range(copies) for number in batch_index]
