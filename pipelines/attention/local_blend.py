"""LocalBlend: the target differs from its source only where the edited words attend (Hertz et al. 2022, section 3.2).

After step t, with M_w and M*_w the cross-attention maps of the blend words of source and target, summed over the steps so
far, and B(M) = [M / max M > threshold],

    alpha = B(M_w) or B(M*_w),    z*_t <- (1 - alpha) z_t + alpha z*_t.

docs/methods.md, section 7.5, lists the details of the official code: layers, pooling, words whose region is subtracted.
"""

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
from .token_maps import EditedMaps, MapGrid, WordMaps, word_weights


@dataclass(frozen=True)
class LocalBlendOptions:
    """Defaults as published.

    Attributes:
        start: fraction of the steps before the first blend, 0 to 1; 1 = never.
        threshold: a latent pixel may change where the blend words' map exceeds this fraction of its maximum; 1 or more =
            nowhere, below 0 = everywhere.
        keep_threshold: the same for the words whose region must stay.
        pool: odd side of the max-pool over the blend words' map, in pixels of that map; 1 = off.
        smooth: enlarge maps bilinearly instead of by repetition.
        divisor: latent side / grid side of the layers whose maps count. None = 4, less for small latents. The
            nearest that the network has counts where it has none there.
        edited_maps: read the target's maps as the edit has changed them, as the published code does, which edits the maps
            that it has stored; False = the target's own.
    """

    start: float = 0.2
    threshold: float = 0.3
    keep_threshold: float = 0.3
    pool: int = 3
    smooth: bool = False
    divisor: int | None = None
    edited_maps: bool = False

    def __post_init__(self) -> None:
        check_fraction("start", self.start)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ParameterError(f"pool is {self.pool}: give an odd number of map pixels (3 as published, 1 = off)")
        if self.divisor is not None and self.divisor < 1:
            raise ParameterError(f"divisor is {self.divisor}: give 1 (layers of the latent's own size) or more")


class LocalBlend:
    """Collects the maps of an edit's blend words during sampling, and blends the target after each step."""

    def __init__(self, edit: PromptEdit, steps: int, options: LocalBlendOptions) -> None:
        self.options = options
        self.first_step = whole(options.start * steps)
        self._words: dict[Role, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "source": (edit.blend_source, edit.keep_source),
            "target": (edit.blend_target, edit.keep_target),
        }
        weights = {role: word_weights(words, edit.token_count) for role, words in self._words.items() if any(words)}
        self._maps = WordMaps(weights)
        self._grid = MapGrid(options.divisor)

    @property
    def needs_source(self) -> bool:
        """Whether the source's own maps are used."""
        return any(self._words["source"])

    def clear(self) -> None:
        self._maps.clear()

    def wants(self, site: Site) -> bool:
        return self._grid.has(site) and self._maps.wants(site.rows)

    def add(self, q: Tensor, k: Tensor, site: Site, edited: EditedMaps | None = None) -> None:
        """Add one layer's maps of the blend words.

        Args:
            q: queries [rows, heads, N, d].
            k: keys [rows, heads, M, d].
            site: the layer, the sigma and the meaning of the rows.
            edited: see `WordMaps.add`.
        """
        self._maps.add(q, k, site, edited)

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        """z* after `step`: the target where it may change, the source elsewhere, both bit for bit; [B, C, h, w]."""
        if step < self.first_step:
            return target
        source = match_batch(source, len(target), "source latent", "latent")
        alpha = self.mask(len(target), (target.shape[2], target.shape[3]))
        return torch.where(alpha, target, source)

    def mask(self, images: int, latent_pixels: tuple[int, int]) -> Tensor:
        """alpha after the steps so far, bool [images, 1, h, w]: where the blend words of either prompt attend."""
        options = self.options
        change, keep = [], []
        for role, (blend_words, keep_words) in self._words.items():
            if not blend_words and not keep_words:
                continue
            maps = self._maps.total(role, images)[0]
            if blend_words:
                change.append(self._region(maps[:, :1], latent_pixels, options.threshold, options.pool))
            if keep_words:
                keep.append(self._region(maps[:, 1:], latent_pixels, options.keep_threshold, 1))
        alpha = _union(change)
        return alpha & ~_union(keep) if keep else alpha

    def _region(self, maps: Tensor, latent_pixels: tuple[int, int], threshold: float, pool: int) -> Tensor:
        """B(M): where a map [B, 1, height, width] exceeds `threshold` of its maximum, bool [B, 1, h, w]."""
        if pool > 1:
            maps = F.max_pool2d(maps, pool, 1, pool // 2)
        maps = F.interpolate(maps, size=latent_pixels, mode="bilinear" if self.options.smooth else "nearest")
        return maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12) > threshold


def _union(masks: Sequence[Tensor]) -> Tensor:
    union = masks[0]
    for mask in masks[1:]:
        union = union | mask
    return union


def wants_local_blend(edit: PromptEdit, options: LocalBlendOptions) -> bool:
    """Whether the edit names blend words. Raises ParameterError for words to keep without words to change."""
    if (edit.keep_source or edit.keep_target) and not (edit.blend_source or edit.blend_target):
        raise ParameterError(
            "there are words whose region must stay but none whose region may change: name the blend words too"
        )
    return bool(edit.blend_source or edit.blend_target) and options.start < 1
