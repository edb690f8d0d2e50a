"""Where the words look: cross-attention maps averaged over heads, layers and noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Controlled, Passive, Place, Site
from ..core.errors import ParameterError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import check_latent
from .pair_batch import single_rows
from .token_maps import WordMaps, has_grid, map_divisor, word_weights


@dataclass(frozen=True)
class LayerChoice:
    """Which cross-attention layers are read.

    Attributes:
        divisors: grids as parts of the latent's side: 1 = its own size, 2 = half. Empty = 4, less for small latents.
        places: "down", "mid", "up".
    """

    divisors: tuple[int, ...] = ()
    places: tuple[Place, ...] = ("down", "mid", "up")

    def has(self, site: Site) -> bool:
        divisors = self.divisors or (map_divisor(site.latent_pixels),)
        return site.cross and site.place in self.places and any(has_grid(site, divisor) for divisor in divisors)


class MapCollector(Passive):
    """Reads the maps of words of one prompt; changes nothing.

    Attributes:
        maps: the sums so far.    orders: the layers that were read.
    """

    def __init__(self, words: Tensor, layers: LayerChoice) -> None:
        """`words` [T, words]: the weight of every text token in every word."""
        self.layers, self.orders = layers, set[int]()
        self.maps = WordMaps({"source": words, "target": words})

    def wants(self, site: Site) -> bool:
        return self.layers.has(site) and self.maps.wants(site.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        self.orders.add(site.order)
        self.maps.add(q, k, site)
        return None


@torch.no_grad()
def attention_maps(
    denoiser: Denoiser,
    levels: Sequence[tuple[float, Tensor]],
    context: Context,
    words: Sequence[Sequence[int]],
    *,
    layers: LayerChoice | None = None,
    progress: Progress = silent,
) -> Tensor:
    """One map per word, averaged over heads, layers and noise levels; one model row per level and image.

    Args:
        levels: (sigma, latent at that level [B, C, h, w] in model scale); from a trajectory, or noised.
        words: tokens of each word; the tokens of one word are added.
    Returns: float32 [B, words, h, w] on the latent grid: the part of the attention that goes to the word, in [0, 1].
    Raises: ParameterError without words or levels; MismatchError if no layer has the grid asked for; FamilyError.
    """
    if not words or not levels or any(not word for word in words):
        raise ParameterError("maps need at least one word with a token, and one noise level")
    collected = []
    for done, (sigma, z) in enumerate(levels, 1):
        check_latent(z, "latent", denoiser.channels)
        seen = MapCollector(word_weights(words, context.tokens.shape[1]), layers or LayerChoice())
        denoiser.denoise(z, sigma, [context], Controlled(seen, single_rows(len(z), ("cond",))))
        sums = [F.interpolate(grid, size=z.shape[-2:], mode="bilinear") for grid in seen.maps.total("target", len(z))]
        collected.append(torch.stack(sums).sum(0) / len(seen.orders))
        progress(done, len(levels))
    return torch.stack(collected).mean(0)
