"""LocalBlend: the target differs from the source only where its words look (Hertz et al. 2022; methods.md, 7.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Role, Site
from ..core.errors import ParameterError
from ..core.shapes import match_batch
from .prompts.prompt_edit import PromptEdit
from .step_ranges import check_fraction, whole
from .token_maps import WordMaps, has_grid, map_divisor, word_weights


@dataclass(frozen=True)
class LocalBlendOptions:
    """Defaults as published.

    Attributes:
        start: part of the run after which the target is blended, 0 to 1; 1 = never.
        threshold: a cell may change where the map of the words exceeds this share of its maximum; 1 or more = nowhere,
            below 0 = everywhere.
        keep_threshold: likewise, for the words whose place must stay.
        pool: odd side, in cells of the map, of the square whose maximum is taken (words that may change only); 1 = off.
        smooth: enlarge maps bilinearly instead of by repetition.
        divisor: which layers: those whose grid is 1 / divisor of the latent per side. None = 4, less for small latents.
    """

    start: float = 0.2
    threshold: float = 0.3
    keep_threshold: float = 0.3
    pool: int = 3
    smooth: bool = False
    divisor: int | None = None

    def __post_init__(self) -> None:
        check_fraction("start", self.start)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ParameterError(f"pool is {self.pool}: give an odd number of cells (3 as published, 1 = off)")
        if self.divisor is not None and self.divisor < 1:
            raise ParameterError(f"divisor is {self.divisor}: give 1 (layers of the latent's own size) or more")


class LocalBlend:
    """Collects the maps of an edit's blend words during a run, and blends after each step."""

    def __init__(self, edit: PromptEdit, steps: int, options: LocalBlendOptions) -> None:
        self.options, self.first = options, whole(options.start * steps)
        self._words: dict[Role, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "source": (edit.blend_source, edit.keep_source),
            "target": (edit.blend_target, edit.keep_target),
        }
        self._maps = WordMaps(
            {role: word_weights(words, edit.token_count) for role, words in self._words.items() if any(words)}
        )

    @property
    def needs_source(self) -> bool:
        """Whether the source's own maps are read."""
        return any(self._words["source"])

    def clear(self) -> None:
        self._maps.clear()

    def wants(self, site: Site) -> bool:
        divisor = self.options.divisor or map_divisor(site.latent_pixels)
        return site.cross and has_grid(site, divisor) and self._maps.wants(site.rows)

    def add(self, q: Tensor, k: Tensor, site: Site) -> None:
        """Remember where the words of this layer look, before any edit of it."""
        self._maps.add(q, k, site)

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        """`target` where it may differ, `source` elsewhere, both exactly; [B, C, h, w] after `step`."""
        if step < self.first:
            return target
        source = match_batch(source, len(target), "source latent", "latent")
        return torch.where(self.mask(len(target), (target.shape[2], target.shape[3])), target, source)

    def mask(self, images: int, latent_pixels: tuple[int, int]) -> Tensor:
        """Where the target may differ so far, bool [images, 1, h, w]: where the words of either prompt look."""
        options = self.options
        change, keep = [], []
        for role, (blend, stay) in self._words.items():
            if blend or stay:
                maps = self._maps.total(role, images)[0]
                if blend:
                    change.append(self._region(maps[:, :1], latent_pixels, options.threshold, options.pool))
                if stay:
                    keep.append(self._region(maps[:, 1:], latent_pixels, options.keep_threshold, 1))
        mask = _either(change)
        return mask & ~_either(keep) if keep else mask

    def _region(self, maps: Tensor, latent_pixels: tuple[int, int], threshold: float, pool: int) -> Tensor:
        if pool > 1:
            maps = F.max_pool2d(maps, pool, 1, pool // 2)
        maps = F.interpolate(maps, size=latent_pixels, mode="bilinear" if self.options.smooth else "nearest")
        return maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12) > threshold


def _either(masks: Sequence[Tensor]) -> Tensor:
    mask = masks[0]
    for other in masks[1:]:
        mask = mask | other
    return mask


def blends(edit: PromptEdit, options: LocalBlendOptions) -> bool:
    """Whether the edit asks for a LocalBlend. Raises ParameterError for words to keep without words to change."""
    if (edit.keep_source or edit.keep_target) and not (edit.blend_source or edit.blend_target):
        raise ParameterError(
            "there are words whose place must stay but none whose place may change: name the blend words too"
        )
    return bool(edit.blend_source or edit.blend_target) and options.start < 1
