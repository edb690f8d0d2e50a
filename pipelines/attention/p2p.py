"""Prompt-to-Prompt (Hertz et al. 2022) and P2Plus (Li et al. 2023, section 3.4): the target uses its source's attention maps.

With maps A = softmax(Q K^T / sqrt(d)), starred for the target, in step s of N:

    cross-attention, s <  tau_c N     A*_c <- c (a (A_c M) + (1 - a) A*_c)      replace, refine, reweight (`PromptEdit`)
    self-attention,  s <  tau_s N     A*_s <- A_s                               conditional branch
    self-attention,  s <  tau_u N     A*_u <- A_u                               unconditional branch: P2Plus

In joint attention (MMDiT), cross-attention is the block of the joint map from image to text, and self-attention the queries
and keys of the image tokens (`joint.py`; docs/methods.md, section 18.4).

No map is materialised. A_s V* is attention with the source's queries and keys over the target's values, and the edited
cross-attention is A_c (W1 V*) + A*_c (W2 V*), at most two attentions (`folded_weights`; docs/methods.md, sections 0.6, 7, 8).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Branch, Site
from ..core.errors import ParameterError
from .joint import WordMix, mixed_words, with_image_of
from .local_blend import LocalBlend, LocalBlendOptions, wants_local_blend
from .pair_control import NO_BRANCH, PairControl
from .prompts.prompt_edit import PromptEdit
from .step_ranges import check_fraction, folded_weights, step_table, whole, word_mix
from .token_maps import EditedMaps, check_joint_tokens, check_tokens

COND: tuple[Branch, ...] = ("cond",)


@dataclass(frozen=True)
class P2POptions:
    """Step ranges and layers that use the source's attention. Ranges are fractions of the steps, 0 (none) to 1 (all).

    Attributes:
        cross_until: tau_c, for cross-attention. Tokens with a step range of their own follow that instead.
        self_until: tau_s, for self-attention of the conditional branch.
        uncond_self_until: tau_u, for self-attention of the unconditional branch: P2Plus. This branch has the weight 1 - w in
            guidance, which is negative for w > 1, so the result moves away from the source's structure. 0 is plain
            Prompt-to-Prompt.
        self_divisor: self-attention is replaced in layers whose grid is at most 1 / self_divisor of the latent per side.
            2 gives the published layers (32 x 32 and less of 64 x 64) at any size; 1 = every layer.
        local_blend: used where the edit names blend words.
        from_layer, until_layer: attention is edited in the transformer layers between these fractions of the network, in order
            of execution, 0 (first) to 1 (last).
    """

    cross_until: float = 0.8
    self_until: float = 0.4
    uncond_self_until: float = 0.0
    self_divisor: int = 2
    local_blend: LocalBlendOptions = field(default_factory=LocalBlendOptions)
    from_layer: float = 0.0
    until_layer: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cross_until", "self_until", "uncond_self_until", "from_layer", "until_layer"):
            check_fraction(name, getattr(self, name))
        if self.self_divisor < 1:
            raise ParameterError(f"self_divisor is {self.self_divisor}: give 1 (every layer) or more (2 as published)")
        if self.from_layer >= self.until_layer:
            raise ParameterError(
                f"from_layer is {self.from_layer} and until_layer {self.until_layer}: give a range from 0 (the first layer) to "
                "1 (the last)"
            )

    def in_layers(self, site: Site) -> bool:
        """Whether a layer is between `from_layer` and `until_layer`."""
        return whole(self.from_layer * site.layers) <= site.order < whole(self.until_layer * site.layers)


class P2PControl(PairControl):
    """Prompt-to-Prompt or P2Plus along one grid."""

    joint = True

    def __init__(self, edit: PromptEdit, sigmas: Tensor, options: P2POptions | None = None) -> None:
        super().__init__(sigmas)
        self.edit = edit
        self.options = options or P2POptions()
        self.local_blend = None
        if wants_local_blend(edit, self.options.local_blend):
            self.local_blend = LocalBlend(edit, self.steps, self.options.local_blend)
        self._edited_tokens = step_table(edit, self.options.cross_until, self.steps)
        self._edits_cross = self._edited_tokens.any(dim=1).tolist()
        self._weights: dict[tuple, tuple[Tensor | None, Tensor | None]] = {}
        self._mixes: dict[tuple, WordMix] = {}

    def reset(self) -> None:
        super().reset()
        self._weights.clear()
        self._mixes.clear()
        if self.local_blend is not None:
            self.local_blend.clear()

    # ------------------------------------------------------------------------------------------------ what a loop asks
    def self_branches(self, step: int) -> tuple[Branch, ...]:
        """The branches whose self-attention maps are the source's at `step`."""
        until: dict[Branch, float] = {"cond": self.options.self_until, "uncond": self.options.uncond_self_until}
        return tuple(branch for branch, tau in until.items() if step < whole(self.steps * tau))

    def needs(self, step: int) -> frozenset[Branch]:
        branches = set(self.self_branches(step))
        if self._edits_cross[step] or (self.local_blend is not None and self.local_blend.needs_source):
            branches.add("cond")
        return frozenset(branches)

    def active(self, step: int) -> bool:
        return bool(self.needs(step)) or self.local_blend is not None

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        return target if self.local_blend is None else self.local_blend.blend(source, target, step)

    # ------------------------------------------------------------------------------------------------ what a host calls
    def wants(self, site: Site) -> bool:
        """Whether a target's attention is edited here, or LocalBlend records maps."""
        return self._records(site) or bool(self._edited_branches(site, words=True) | self._edited_branches(site))

    def _edited_branches(self, site: Site, words: bool = False) -> frozenset[Branch]:
        """The branches of the targets whose attention to words, or among image tokens, is edited in a layer."""
        step = self.step(site.sigma)
        if not self.options.in_layers(site):
            return NO_BRANCH
        if words:
            edited = COND if (site.cross or site.joint) and self._edits_cross[step] else ()
        else:
            edited = () if site.cross or not site.within(self.options.self_divisor) else self.self_branches(step)
        return frozenset(row.branch for row in site.rows if row.role == "target" and row.branch in edited)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """Attention with the edited maps in the target's rows, plain attention in all other rows.

        Args:
            q: queries [rows, heads, N, d].
            k, v: keys and values [rows, heads, M, d].
            site: the layer, the sigma and the meaning of the rows.
        Returns: [rows, heads, N, d]; None = nothing is edited here.
        Raises: MismatchError for a target without its source, or another number of tokens than the edit has.
        """
        step = self.step(site.sigma)
        if self.local_blend is not None and self._records(site):
            self.local_blend.add(q, k, site, self._edited_maps(site, step, q.device))
        words, layout = self._edited_branches(site, words=True), self._edited_branches(site)
        if site.joint:
            return self._joint_attention(q, k, v, site, words, layout)
        if words:
            return self._cross_attention(q, k, v, site, step)
        return self._self_attention(q, k, v, site, layout) if layout else None

    def _records(self, site: Site) -> bool:
        return self.local_blend is not None and self.local_blend.wants(site)

    def _edited_maps(self, site: Site, step: int, device: torch.device) -> EditedMaps | None:
        """What the edit does to the target's maps in this step, where LocalBlend wants to know."""
        if not self.options.local_blend.edited_maps or not self._edited_branches(site, words=True):
            return None
        if site.joint:
            raise ParameterError(
                "edited_maps is on, but this model attends to text and image jointly, where it is not defined: switch it off"
            )
        partners = self.partners(site.rows, COND, device)
        if partners is None:
            return None
        w1, w2 = folded_weights(self.edit, self._edited_tokens[step])
        return EditedMaps(partners.source_of, w1, w2)

    def _self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, site: Site, branches: Collection[Branch]
    ) -> Tensor | None:
        """A_s V*: the source's queries and keys over the target's values."""
        partners = self.partners(site.rows, branches, q.device)
        if partners is None:
            return None
        source = partners.source_of
        return site.attention(q.index_select(0, source), k.index_select(0, source), v)

    def _cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site, step: int) -> Tensor | None:
        """A_c (W1 V*) + A*_c (W2 V*) for the conditional targets; where W2 = 0, one attention serves every row."""
        partners = self.partners(site.rows, COND, q.device)
        if partners is None:
            return None
        check_tokens(v.shape[2], self.edit.token_count)
        targets, sources, source_of, _ = partners
        w1, w2 = self._folded(step, v)
        v_target = v.index_select(0, targets).unflatten(2, (-1, self.edit.token_count))
        w1_v = None if w1 is None else (w1 @ v_target).flatten(2, 3)
        if w2 is None and w1_v is not None:
            return F.scaled_dot_product_attention(
                q.index_select(0, source_of), k.index_select(0, source_of), v.index_copy(0, targets, w1_v)
            )
        w2_v = (torch.zeros_like(v_target) if w2 is None else v_target * w2).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v.index_copy(0, targets, w2_v))
        if w1_v is None:
            return out
        from_source = F.scaled_dot_product_attention(q.index_select(0, sources), k.index_select(0, sources), w1_v)
        return out.index_add(0, targets, from_source)

    def _joint_attention(
        self, q: Tensor, k: Tensor, v: Tensor, site: Site, words: Collection[Branch], layout: Collection[Branch]
    ) -> Tensor | None:
        """Joint attention with the edited blocks in the target's image rows.

        Args:
            q, k, v: of the layer, [rows, heads, T + N, d].
            site: the layer.
            words: branches in which image tokens attend to words as in the source.
            layout: branches in which image tokens have the source's queries and keys.
        Returns: [rows, heads, T + N, d]; None = nothing is edited here.
        """
        own, text = (q, k), site.text
        placed = self.partners(site.rows, layout, q.device)
        if placed is not None:
            own = (with_image_of(q, placed.source_of, text), with_image_of(k, placed.source_of, text))
        partners = self.partners(site.rows, words, q.device)
        if partners is None:
            return None if placed is None else site.attention(*own, v)
        check_joint_tokens(site, self.edit.token_count)
        mix = self._mix(self.step(site.sigma), v)
        return mixed_words((q, k, v), own, partners, mix, text, site.attention)

    def _mix(self, step: int, like: Tensor) -> WordMix:
        edited = self._edited_tokens[step]
        key = (edited.numpy().tobytes(), like.dtype, like.device)
        if key not in self._mixes:
            self._mixes[key] = word_mix(self.edit, edited).to(like)
        return self._mixes[key]

    def _folded(self, step: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """W1 [T, T] and W2's diagonal [T, 1] in the dtype and on the device of `like`; None where all is zero."""
        edited = self._edited_tokens[step]
        key = (edited.numpy().tobytes(), like.dtype, like.device)
        if key not in self._weights:
            w1, w2 = folded_weights(self.edit, edited)
            self._weights[key] = (
                w1.to(like.dtype).to(like.device) if bool(w1.any()) else None,
                w2[:, None].to(like.dtype).to(like.device) if bool(w2.any()) else None,
            )
        return self._weights[key]
