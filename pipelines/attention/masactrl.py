"""MasaCtrl: the target asks, the source answers (Cao et al. 2023; methods.md, 11.6).

Self-attention of the target uses the source's keys and values, late enough that the new layout is there and deep enough
that layers speak of looks: the object keeps its identity while its pose follows the new prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Branch, Row, Site
from ..core.errors import ParameterError
from .pair_control import NOTHING, PairControl
from .prompts.prompt_edit import PromptEdit
from .step_ranges import check_fraction
from .token_maps import WordMaps, has_grid, map_divisor, word_weights

BOTH: frozenset[Branch] = frozenset({"cond", "uncond"})


@dataclass(frozen=True)
class MasaCtrlOptions:
    """Defaults as published.

    Attributes:
        from_step: the first step, counted from 0 on the whole grid; as many as there are steps = off.
        from_layer: part of the network's transformer layers, in order of execution, that stay their own, 0 to 1
            (0.625: 10 of 16 in Stable Diffusion 1, 44 of 70 in SDXL).
        threshold: with an object: a cell belongs to it where its map, stretched to 0 to 1, exceeds this.
    """

    from_step: int = 4
    from_layer: float = 0.625
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("from_layer", self.from_layer)
        check_fraction("threshold", self.threshold)
        if self.from_step < 0:
            raise ParameterError(f"from_step is {self.from_step}: give 0 or more (4 as published)")


class MasaCtrl(PairControl):
    """The edit in force on one run along `sigmas`.

    With the words of an object, the target's object looks at the source's object only, and its background at the
    background: where each lies is read from the cross-attention of the steps so far.
    """

    def __init__(
        self, sigmas: Tensor, options: MasaCtrlOptions | None = None, object_of: PromptEdit | None = None
    ) -> None:
        """`object_of`: its blend words name the object. Raises ParameterError unless they do so in both prompts."""
        super().__init__(sigmas)
        self.options = options or MasaCtrlOptions()
        self._maps = None
        if object_of is not None:
            if not (object_of.blend_source and object_of.blend_target):
                raise ParameterError("the object must be named in both prompts: give a blend word of each")
            count = object_of.token_count
            self._maps = WordMaps({
                "source": word_weights([object_of.blend_source], count),
                "target": word_weights([object_of.blend_target], count),
            })  # fmt: skip

    def reset(self) -> None:
        super().reset()
        if self._maps is not None:
            self._maps.clear()

    def needs(self, step: int) -> frozenset[Branch]:
        if step >= self.options.from_step:
            return BOTH
        return frozenset({"cond"}) if self._collects else NOTHING

    @property
    def _collects(self) -> bool:
        return self._maps is not None and self.options.from_step < self.steps

    def wants(self, site: Site) -> bool:
        """Self-attention from step and layer on, where there is a target; cross-attention only to collect the object's maps."""
        if site.cross:
            at_grid = has_grid(site, map_divisor(site.latent_pixels))
            return self._collects and at_grid and self._maps is not None and self._maps.wants(site.rows)
        late = self.step(site.sigma) >= self.options.from_step
        deep = site.order >= math.ceil(self.options.from_layer * site.layers - 1e-9)
        return late and deep and any(row.role == "target" for row in site.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """A target's queries [rows, heads, N, d] over its source's keys and values, object and rest apart if masked.

        MasaCtrl, sections 3.2 and 3.3. None (plain) at cross-attention, whose maps are only read.
        """
        if site.cross:
            if self._maps is not None:
                self._maps.add(q, k, site)
            return None
        partners = self.partners(site.rows, BOTH, q.device)
        if partners is None:
            return None
        targets, sources, takes, pairs = partners
        mine, theirs = (self._objects(site, rows) for rows in zip(*pairs, strict=True))
        if mine is None or theirs is None:
            return F.scaled_dot_product_attention(q, k.index_select(0, takes), v.index_select(0, takes))
        own = F.scaled_dot_product_attention(q, k, v)
        q, k, v = q.index_select(0, targets), k.index_select(0, sources), v.index_select(0, sources)
        return own.index_copy(0, targets, _apart(q, k, v, mine, theirs))

    def _objects(self, site: Site, rows: Sequence[Row]) -> Tensor | None:
        """Cells of the object in each row, bool [rows, N]; None without an object, or before any step is done."""
        maps = None if self._maps is None else self._maps.before(site.sigma, rows)
        if maps is None:
            return None
        low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
        maps = F.interpolate((maps - low) / (high - low).clamp(min=1e-12), size=site.grid, mode="bilinear")
        return (maps > self.options.threshold).flatten(1)


def _apart(q: Tensor, k: Tensor, v: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    """Attention of objects over objects and backgrounds over backgrounds; masks are bool [rows, N]."""
    theirs = theirs[:, None, None, :]
    # a source that is all object, or has none, answers with everything
    on = theirs | ~theirs.any(-1, keepdim=True)
    off = ~theirs | theirs.all(-1, keepdim=True)
    inside = F.scaled_dot_product_attention(q, k, v, attn_mask=on)
    outside = F.scaled_dot_product_attention(q, k, v, attn_mask=off)
    return torch.where(mine[:, None, :, None], inside, outside)
