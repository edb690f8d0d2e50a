"""Token maps: the cross-attention probabilities of a few text tokens (docs/methods.md, section 0.6, item 5).

LocalBlend, masked MasaCtrl and the map drawings need the maps of a few words only. These are computed from queries and keys
as exp(q k_j / sqrt(d) - logsumexp), one column j of the softmax at a time, beside the network's own attention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.attention_sites import PLACES, Branch, Grid, Place, Role, Row, Site
from ..core.errors import MismatchError
from .joint import image_word_maps

log = logging.getLogger("editkit")
SMALLEST_GRID = 8  # side of the smallest attention grid whose maps still show shapes


def token_maps(q: Tensor, k: Tensor, tokens: Sequence[int], count: int) -> Tensor:
    """The attention that goes to some of the keys (docs/methods.md, section 0.6); differentiable.

    Args:
        q: queries [rows, heads, N, d].
        k: keys [rows, heads, M, d]. M is `count`, or a multiple of it where a host has repeated a prompt to the length of
            another; the probabilities of the copies are then added.
        tokens: which of the `count` text tokens, from 0.
        count: the tokens of the prompt, T.
    Returns: probabilities, float32 [rows, heads, N, len(tokens)]. Over all tokens they sum to 1.
    Raises: MismatchError if M is no multiple of `count`.
    """
    check_tokens(k.shape[2], count)
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    total = logits.logsumexp(-1, keepdim=True)
    if len(tokens) == count:
        chosen = logits.unflatten(-1, (-1, count))
    else:
        index = torch.tensor(list(tokens), device=q.device)
        chosen = logits.unflatten(-1, (-1, count)).index_select(-1, index)
    return (chosen - total.unsqueeze(-1)).exp().sum(-2)


def check_tokens(keys: int, count: int) -> None:
    """Raises MismatchError unless `keys` is a multiple of `count`."""
    if keys % count:
        raise MismatchError(
            f"the prompt has {keys} tokens here but the prompts were aligned on {count}: align the prompts that are "
            "connected to the sampler"
        )


def check_joint_tokens(site: Site, count: int) -> None:
    """Raises MismatchError unless a joint layer has `count` text tokens: repeated text would change its softmax."""
    if site.text != count:
        raise MismatchError(
            f"the model attends to {site.text} text tokens but the prompts were aligned on {count}: align the prompts that "
            "are connected to the sampler, both as long as each other and without text that the model adds"
        )


def map_divisor(latent_pixels: tuple[int, int], smallest: int = SMALLEST_GRID) -> int:
    """How much smaller than the latent the map grid is: 4 as published (16 x 16 of 64 x 64), less for small latents.

    Args:
        latent_pixels: (height, width) of the latent.
        smallest: no side of the map grid may be smaller, unless the latent itself is.
    """
    return next((d for d in (4, 2) if all(-(-side // d) >= smallest for side in latent_pixels)), 1)


class MapGrid:
    """The attention grid whose maps count: 1 / `divisor` of the latent, or the nearest with cross-attention.

    SDXL has no cross-attention at the latent's own size, which small latents would need. Joint attention has one grid in all
    layers, which is the one that counts.
    """

    def __init__(self, divisor: int | None = None, places: tuple[Place, ...] = PLACES, smallest: int = SMALLEST_GRID):
        """Args: divisor: None = `map_divisor`. places: where layers count. smallest: see `map_divisor`."""
        self.divisor = divisor
        self.places = places
        self.smallest = smallest
        self._warned = False

    def has(self, site: Site) -> bool:
        """Whether the maps of a layer count: it attends to text, and is on the grid. Warns once of another grid."""
        if not (site.cross or site.joint) or site.place not in self.places:
            return False
        if site.joint:
            return True
        wanted = _divided(site.latent_pixels, self.divisor or map_divisor(site.latent_pixels, self.smallest))
        grids = {grid for place, grid in site.cross_grids if place in self.places} or {wanted}
        grid = min(grids, key=lambda grid: (abs(math.log(math.prod(grid) / math.prod(wanted))), -math.prod(grid)))
        if grid != wanted and not self._warned:
            self._warned = True
            log.warning(
                "this model has no cross-attention on a grid of %d x %d: the maps are read on its nearest, %d x %d",
                *(wanted[1], wanted[0], grid[1], grid[0]),
            )
        return site.grid == grid


def _divided(latent_pixels: Grid, divisor: int) -> Grid:
    """1 / `divisor` of the latent on both sides, rounded up."""
    height, width = latent_pixels
    return -(-height // divisor), -(-width // divisor)


def word_weights(words: Sequence[Sequence[int]], count: int) -> Tensor:
    """Which of `count` tokens belong to which word, for `WordMaps`: float32 [count, len(words)] in {0, 1}."""
    weights = torch.zeros(count, len(words))
    for word, members in enumerate(words):
        weights[list(members), word] = 1
    return weights


def _word_maps(q: Tensor, k: Tensor, weights: Tensor, site: Site) -> Tensor:
    """Maps [rows, N, words] averaged over heads, of words with token weights [T, words]."""
    if site.joint:
        check_joint_tokens(site, len(weights))
        return image_word_maps(q, k, weights, site.text, site.attention)
    tokens = weights.any(dim=1).nonzero().flatten().tolist()
    return token_maps(q, k, tokens, len(weights)).mean(1) @ weights[tokens]


@dataclass(frozen=True)
class EditedMaps:
    """A target's cross-attention maps after an edit: A_source W1 + A_target W2 (`step_ranges.folded_weights`).

    Attributes:
        source_of: for every row of the call, the row of its source, int64 [rows].
        from_source: W1 [T, T].
        from_target: the diagonal of W2 [T].
    """

    source_of: Tensor
    from_source: Tensor
    from_target: Tensor

    def word_maps(self, q: Tensor, k: Tensor, rows: Tensor, weights: Tensor, site: Site) -> Tensor:
        """The edited maps of words.

        Args:
            q: queries [rows of the call, heads, N, d].
            k: keys [rows of the call, heads, M, d].
            rows: the targets' rows, int64.
            weights: weight of every text token in every word, float32 [T, words].
            site: the layer.
        Returns: [len(rows), N, words], averaged over heads.
        """
        sources = self.source_of[rows]
        maps = torch.zeros(len(rows), q.shape[2], weights.shape[1], device=q.device)
        for index, share in (
            (sources, self.from_source.to(weights) @ weights),
            (rows, self.from_target.to(weights)[:, None] * weights),
        ):
            if share.any():
                maps = maps + _word_maps(q.index_select(0, index), k.index_select(0, index), share, site)
        return maps


class WordMaps:
    """Cross-attention maps of words, averaged over heads and summed over layers and sigmas, for each row of a model call.

    A sigma that is evaluated again counts once (a call split for want of memory, a sampler of second order).
    """

    def __init__(self, words: Mapping[Role, Tensor], branch: Branch = "cond") -> None:
        """`words`: per role, the weight of every text token in every word, float32 [T, words]; other roles are skipped."""
        self.words = dict(words)
        self.branch = branch
        self._tokens = {role: weights.any(dim=1).nonzero().flatten().tolist() for role, weights in self.words.items()}
        self.clear()

    def clear(self) -> None:
        self._sigma: float | None = None
        self._now: dict[tuple[Row, int], Tensor] = {}
        self._before: dict[tuple[Row, tuple[int, int]], Tensor] = {}

    def wants(self, rows: tuple[Row, ...]) -> bool:
        return any(self._tokens.get(row.role) and row.branch == self.branch for row in rows)

    def add(self, q: Tensor, k: Tensor, site: Site, edited: EditedMaps | None = None) -> None:
        """Add the maps of one cross-attention or joint layer.

        Args:
            q: queries [rows, heads, N, d].
            k: keys [rows, heads, M, d].
            site: the layer, the sigma and the meaning of the rows.
            edited: what an edit does to the target's maps here; None adds them as they are.
        """
        if site.sigma != self._sigma:
            self._before = self._sums()
            self._now = {}
            self._sigma = site.sigma
        for role, tokens in self._tokens.items():
            rows = [i for i, row in enumerate(site.rows) if row.role == role and row.branch == self.branch]
            if not rows or not tokens:
                continue
            index, weights = torch.tensor(rows, device=q.device), self.words[role].to(q.device)
            if edited is None or role != "target":
                maps = _word_maps(q.index_select(0, index), k.index_select(0, index), weights, site)
            else:
                maps = edited.word_maps(q, k, index, weights, site)
            maps = maps.movedim(-1, 1).unflatten(-1, site.grid)
            for i, value in zip(rows, maps, strict=True):
                self._now[site.rows[i], site.order] = value

    def total(self, role: Role, images: int) -> list[Tensor]:
        """Sums [images, words, height, width], one tensor per attention grid, coarsest first.

        Raises: MismatchError if an image has none: no layer had the requested size.
        """
        sums = self._sums()
        grids = sorted({grid for _, grid in sums})
        rows = [Row(role, self.branch, image) for image in range(images)]
        if not grids or any((row, grid) not in sums for row in rows for grid in grids):
            raise MismatchError(
                f"no attention maps of the {role} were recorded: this network has no cross-attention at the requested "
                "size, or another extension replaces it"
            )
        return [torch.stack([sums[row, grid] for row in rows]) for grid in grids]

    def before(self, sigma: float, rows: Sequence[Row]) -> Tensor | None:
        """Sums [len(rows), words, height, width] of the sigmas before `sigma`; None if there are none yet.

        The maps of `sigma` itself are left out, because they would depend on the order of the model calls. Rows may be of
        either branch.
        """
        sums = self._before if sigma == self._sigma else self._sums()
        found = {row: value for (row, _), value in sums.items()}
        wanted = [row._replace(branch=self.branch) for row in rows]
        return torch.stack([found[row] for row in wanted]) if all(row in found for row in wanted) else None

    def _sums(self) -> dict[tuple[Row, tuple[int, int]], Tensor]:
        sums = dict(self._before)
        for (row, _), value in self._now.items():
            key = row, (value.shape[-2], value.shape[-1])
            sums[key] = sums[key] + value if key in sums else value
        return sums
