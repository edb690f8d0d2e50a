"""Prompt-to-Prompt and P2Plus: the target attends as its source does (Hertz et al. 2022; Li et al. 2023, section 3.4).

Every edit is at most two plain attentions with folded values (methods.md, 0.6, 7 and 8): the source's queries and keys with
one, the target's own with the other. Maps are computed for LocalBlend's words only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Branch, Site
from ..core.errors import ParameterError
from .local_blend import LocalBlend, LocalBlendOptions, blends
from .pair_control import PairControl
from .prompts.prompt_edit import PromptEdit
from .step_ranges import check_fraction, folded_weights, step_table, whole
from .token_maps import check_tokens

COND: tuple[Branch, ...] = ("cond",)


@dataclass(frozen=True)
class P2POptions:
    """How long and where the source's attention is used; parts of the run from 0 (never) to 1 (all of it).

    Attributes:
        cross_until: tau_c, for cross-attention; tokens with a window of their own follow that instead.
        self_until: tau_s, for self-attention of the conditional branch.
        uncond_self_until: tau_u, for self-attention of the unconditional branch: P2Plus. Its weight in guidance is
            negative, so this pushes away from the source's structure; 0 is plain Prompt-to-Prompt.
        self_divisor: self-attention is replaced in layers whose grid is at most 1 / self_divisor of the latent per side.
            2 gives the published layers (32 x 32 and less of 64 x 64) at any size; 1 = every layer.
        local_blend: used where the edit names blend words.
    """

    cross_until: float = 0.8
    self_until: float = 0.4
    uncond_self_until: float = 0.0
    self_divisor: int = 2
    local_blend: LocalBlendOptions = field(default_factory=LocalBlendOptions)

    def __post_init__(self) -> None:
        for name in ("cross_until", "self_until", "uncond_self_until"):
            check_fraction(name, getattr(self, name))
        if self.self_divisor < 1:
            raise ParameterError(f"self_divisor is {self.self_divisor}: give 1 (every layer) or more (2 as published)")


class P2PControl(PairControl):
    """An edit in force on one run along `sigmas`."""

    def __init__(self, edit: PromptEdit, sigmas: Tensor, options: P2POptions | None = None) -> None:
        super().__init__(sigmas)
        self.edit, self.options = edit, options or P2POptions()
        self.local = None
        if blends(edit, self.options.local_blend):
            self.local = LocalBlend(edit, self.steps, self.options.local_blend)
        self._gates = step_table(edit, self.options.cross_until, self.steps)
        self._cross_open = self._gates.any(dim=1).tolist()
        self._weights: dict[tuple, tuple[Tensor | None, Tensor | None]] = {}

    def reset(self) -> None:
        super().reset()
        self._weights.clear()
        if self.local is not None:
            self.local.clear()

    # ------------------------------------------------------------------------------------------------ what a loop asks
    def self_branches(self, step: int) -> tuple[Branch, ...]:
        """The branches whose self-attention is the source's at `step`."""
        until: dict[Branch, float] = {"cond": self.options.self_until, "uncond": self.options.uncond_self_until}
        return tuple(branch for branch, part in until.items() if step < whole(self.steps * part))

    def needs(self, step: int) -> frozenset[Branch]:
        branches = set(self.self_branches(step))
        if self._cross_open[step] or (self.local is not None and self.local.needs_source):
            branches.add("cond")
        return frozenset(branches)

    def active(self, step: int) -> bool:
        return bool(self.needs(step)) or self.local is not None

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        return target if self.local is None else self.local.blend(source, target, step)

    # ------------------------------------------------------------------------------------------------ what a host calls
    def wants(self, site: Site) -> bool:
        """Where a gate is open for a target of the call, or LocalBlend collects maps."""
        step = self.step(site.sigma)
        if not site.cross:
            return site.within(self.options.self_divisor) and _has_target(site, self.self_branches(step))
        collects = self.local is not None and self.local.wants(site)
        return collects or (self._cross_open[step] and _has_target(site, COND))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """Attention of q, k, v [rows, heads, N or M, d] with the source's maps in its targets' rows (methods.md, 7 and 8).

        Raises: MismatchError for a target without its source, or another number of tokens than the edit has.
        """
        step = self.step(site.sigma)
        if site.cross:
            if self.local is not None and self.local.wants(site):
                self.local.add(q, k, site)
            return self._cross(q, k, v, site, step) if self._cross_open[step] else None
        partners = self.partners(site.rows, self.self_branches(step), q.device)
        if partners is None:
            return None
        takes = partners.takes
        return F.scaled_dot_product_attention(q.index_select(0, takes), k.index_select(0, takes), v)

    def _cross(self, q: Tensor, k: Tensor, v: Tensor, site: Site, step: int) -> Tensor | None:
        """A_source (W1 V) + A_target (W2 V) for the conditional targets, plain attention for all others."""
        partners = self.partners(site.rows, COND, q.device)
        if partners is None:
            return None
        check_tokens(v.shape[2], self.edit.token_count)
        targets, sources, takes, _ = partners
        first, second = self._folded(step, v)
        own = v.index_select(0, targets).unflatten(2, (-1, self.edit.token_count))
        mapped = None if first is None else (first @ own).flatten(2, 3)
        if second is None and mapped is not None:
            # nothing of the target's own maps is left: one attention does for every row
            return F.scaled_dot_product_attention(
                q.index_select(0, takes), k.index_select(0, takes), v.index_copy(0, targets, mapped)
            )
        kept = torch.zeros_like(own) if second is None else own * second
        out = F.scaled_dot_product_attention(q, k, v.index_copy(0, targets, kept.flatten(2, 3)))
        if mapped is None:
            return out
        extra = F.scaled_dot_product_attention(q.index_select(0, sources), k.index_select(0, sources), mapped)
        return out.index_add(0, targets, extra)

    def _folded(self, step: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """W1 [T, T] and W2's diagonal [T, 1] in the dtype and on the device of `like`; None where all is zero."""
        gate = self._gates[step]
        key = (gate.numpy().tobytes(), like.dtype, like.device)
        if key not in self._weights:
            first, second = folded_weights(self.edit, gate)
            self._weights[key] = (
                first.to(like.dtype).to(like.device) if bool(first.any()) else None,
                second[:, None].to(like.dtype).to(like.device) if bool(second.any()) else None,
            )
        return self._weights[key]


def _has_target(site: Site, branches: tuple[Branch, ...]) -> bool:
    return any(row.role == "target" and row.branch in branches for row in site.rows)
