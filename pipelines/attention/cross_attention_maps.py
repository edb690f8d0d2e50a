"""Cross-attention maps of the words of a prompt, averaged over heads, layers and sigmas (as DAAM, Tang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import PLACES, Controlled, Passive, Place, Site
from ..core.errors import ParameterError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import check_latent
from .pair_batch import single_rows
from .token_maps import MapGrid, WordMaps, word_weights


@dataclass(frozen=True)
class LayerChoice:
    """The cross-attention layers whose maps are averaged.

    Attributes:
        divisors: latent side / grid side of the layers: 1 = the latent's own size, 2 = half. Empty = 4, less for small
            latents (`map_divisor`). The nearest grid that the network has counts where it has no layer on one of them.
        places: "down", "mid", "up".
    """

    divisors: tuple[int, ...] = ()
    places: tuple[Place, ...] = PLACES

    def __post_init__(self) -> None:
        grids = tuple(MapGrid(divisor, self.places) for divisor in self.divisors or (None,))
        object.__setattr__(self, "_grids", grids)

    def has(self, site: Site) -> bool:
        grids: tuple[MapGrid, ...] = vars(self)["_grids"]
        found = [grid.has(site) for grid in grids]  # all of them, because each may warn
        return any(found)


class MapCollector(Passive):
    """Records the maps of the words of one prompt and changes nothing.

    Attributes:
        maps: the sums so far.
        orders: the layers that were recorded.
    """

    joint = True

    def __init__(self, words: Tensor, layers: LayerChoice) -> None:
        """`words` [T, words]: the weight of every text token in every word."""
        self.layers = layers
        self.orders: set[int] = set()
        self.maps = WordMaps({"source": words, "target": words})

    def wants(self, site: Site) -> bool:
        return self.layers.has(site) and self.maps.wants(site.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. Records the maps and changes nothing."""
        self.orders.add(site.order)
        self.maps.add(q, k, site)
        return None


@torch.no_grad()
def attention_maps(
    denoiser: Denoiser,
    states: Sequence[tuple[float, Tensor]],
    context: Context,
    words: Sequence[Sequence[int]],
    *,
    layers: LayerChoice | None = None,
    progress: Progress = silent,
) -> Tensor:
    """One cross-attention map per word, the mean over heads, layers and sigmas; one forward pass per sigma and image.

    Args:
        denoiser: the model whose attention is recorded.
        states: (sigma, latent at sigma [B, C, h, w], model scale), from a trajectory or noised.
        context: the prompt, [1 or B, T, D].
        words: the tokens of each word; the maps of one word's tokens are added.
        layers: which layers; None = all places at the default grid.
        progress: called after each sigma.
    Returns: float32 [B, words, h, w] at the latent's size: the share of the attention that goes to the word, in [0, 1].
    Raises: ParameterError without words or sigmas; MismatchError if no layer has the requested grid; FamilyError.
    """
    if not words or not states or any(not word for word in words):
        raise ParameterError("maps need at least one word with a token, and one sigma")
    layers = layers or LayerChoice()
    collected = []
    for done, (sigma, z) in enumerate(states, 1):
        check_latent(z, "latent", denoiser.channels)
        collector = MapCollector(word_weights(words, context.tokens.shape[1]), layers)
        denoiser.denoise(z, sigma, [context], Controlled(collector, single_rows(len(z), ("cond",))))
        grids = collector.maps.total("target", len(z))
        sums = [F.interpolate(grid, size=z.shape[-2:], mode="bilinear") for grid in grids]
        collected.append(torch.stack(sums).sum(0) / len(collector.orders))
        progress(done, len(states))
    return torch.stack(collected).mean(0)
