"""MasaCtrl: mutual self-attention (Cao et al. 2023, sections 3.2 and 3.3).

In step t and transformer layer l, with Q of the target and K_s, V_s of the source,

    EDIT(Q, K, V) = Attention(Q, K_s, V_s)  if t >= S and l >= L,  else  Attention(Q, K, V).

S leaves the first steps to the layout of the target prompt; L selects the layers that carry appearance. The object then
keeps its identity while its pose follows the new prompt. With object masks M_s (source) and M (target),

    f_o = Attention(Q, K_s, V_s; M_s),    f_b = Attention(Q, K_s, V_s; 1 - M_s),    f = f_o M + f_b (1 - M).

docs/methods.md, section 11.6, lists the details of the official code.
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
from .joint import mutual_attention, with_image_of
from .pair_control import NO_BRANCH, PairControl
from .prompts.prompt_edit import PromptEdit
from .step_ranges import check_fraction
from .token_maps import MapGrid, WordMaps, word_weights

BOTH: frozenset[Branch] = frozenset({"cond", "uncond"})
COND: frozenset[Branch] = frozenset({"cond"})


@dataclass(frozen=True)
class MasaCtrlOptions:
    """Defaults as published.

    Attributes:
        from_step: S, the first edited step, counted from 0 on the whole grid; the number of steps or more = off.
        from_layer: L, as the fraction of the network's transformer layers, in order of execution, that are not edited, 0 to
            1 (0.625: 10 of 16 in Stable Diffusion 1, 44 of 70 in SDXL).
        threshold: a pixel of the object's map, stretched to 0 to 1, belongs to the object above this, 0 to 1.
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
    """Mutual self-attention along one grid, with object masks if an edit names the object.

    The masks come from the cross-attention maps of the object's words, summed over the steps so far. In joint attention, the
    target's image tokens attend to the source's image tokens and to their own text.
    """

    joint = True

    def __init__(
        self, sigmas: Tensor, options: MasaCtrlOptions | None = None, object_of: PromptEdit | None = None
    ) -> None:
        """Make the control of one run.

        Args:
            sigmas: the whole grid, [N + 1].
            options: None = as published.
            object_of: an edit whose blend words name the object in both prompts; None = no masks.
        Raises: ParameterError if only one prompt names the object.
        """
        super().__init__(sigmas)
        self.options = options or MasaCtrlOptions()
        self._maps = None if object_of is None else _object_maps(object_of)
        self._grid = MapGrid()

    def reset(self) -> None:
        super().reset()
        if self._maps is not None:
            self._maps.clear()

    def needs(self, step: int) -> frozenset[Branch]:
        if step >= self.options.from_step:
            return BOTH
        return COND if self._collects else NO_BRANCH

    @property
    def _collects(self) -> bool:
        return self._maps is not None and self.options.from_step < self.steps

    def wants(self, site: Site) -> bool:
        """Self-attention where t >= S and l >= L and there is a target; cross-attention only to record the object's maps."""
        return self._records(site) or self._edits(site)

    def _records(self, site: Site) -> bool:
        at_grid = self._collects and self._grid.has(site)
        return at_grid and self._maps is not None and self._maps.wants(site.rows)

    def _edits(self, site: Site) -> bool:
        if site.cross:
            return False
        late = self.step(site.sigma) >= self.options.from_step
        deep = site.order >= math.ceil(self.options.from_layer * site.layers - 1e-9)
        return late and deep and any(row.role == "target" for row in site.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. Attention(Q, K_s, V_s) in the target's rows, masked if there is an object.

        Cross-attention stays plain; its maps are only recorded.
        """
        if self._maps is not None and (site.cross or self._records(site)):
            self._maps.add(q, k, site)
        partners = self.partners(site.rows, BOTH, q.device) if self._edits(site) else None
        if partners is None:
            return None
        target_mask, source_mask = (self._object_mask(site, rows) for rows in zip(*partners.pairs, strict=True))
        if target_mask is None or source_mask is None:
            source = partners.source_of
            if site.joint:
                return mutual_attention(q, k, v, source, site.text, site.attention)
            return site.attention(q, k.index_select(0, source), v.index_select(0, source))
        plain = site.attention(q, k, v)
        targets, text = partners.targets, site.text
        keys, values = (with_image_of(x, partners.source_of, text).index_select(0, targets) for x in (k, v))
        image = q[:, :, text:].index_select(0, targets)
        plain[targets, :, text:] = _masked_attention(image, keys, values, target_mask, source_mask)
        return plain

    def _object_mask(self, site: Site, rows: Sequence[Row]) -> Tensor | None:
        """M of each row, bool [rows, N]; None without an object, or before the first step is done."""
        maps = None if self._maps is None else self._maps.before(site.sigma, rows)
        if maps is None:
            return None
        low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
        maps = F.interpolate((maps - low) / (high - low).clamp(min=1e-12), size=site.grid, mode="bilinear")
        return (maps > self.options.threshold).flatten(1)


def _object_maps(edit: PromptEdit) -> WordMaps:
    if not (edit.blend_source and edit.blend_target):
        raise ParameterError("the object must be named in both prompts: give a blend word of each")
    return WordMaps(
        {
            "source": word_weights([edit.blend_source], edit.token_count),
            "target": word_weights([edit.blend_target], edit.token_count),
        }
    )


def _masked_attention(q: Tensor, k_s: Tensor, v_s: Tensor, target_mask: Tensor, source_mask: Tensor) -> Tensor:
    """f = f_o M + f_b (1 - M): the object attends to the source's object, the background to its background.

    Args:
        q: the target's queries [pairs, heads, N, d].
        k_s, v_s: the source's keys and values [pairs, heads, T + N, d], after T text tokens that every query attends to.
        target_mask, source_mask: M and M_s, bool [pairs, N]; where M_s is empty or full, all keys are used.
    """
    text = k_s.shape[2] - source_mask.shape[1]
    source_mask = source_mask[:, None, None, :]
    object_keys = F.pad(source_mask | ~source_mask.any(-1, keepdim=True), (text, 0), value=True)
    background_keys = F.pad(~source_mask | source_mask.all(-1, keepdim=True), (text, 0), value=True)
    f_o = F.scaled_dot_product_attention(q, k_s, v_s, attn_mask=object_keys)
    f_b = F.scaled_dot_product_attention(q, k_s, v_s, attn_mask=background_keys)
    return torch.where(target_mask[:, None, :, None], f_o, f_b)
