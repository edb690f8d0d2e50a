"""Plug-and-Play: inject the source's features into the target (Tumanyan et al. 2023, section 4).

While the guidance image I^G (the source) and the target x* are denoised side by side, with P the target prompt,

    f*^4_t <- f^4_t    residual features of output block 4, while t > tau_f,
    A*^l_t <- A^l_t    self-attention maps A = softmax(q k^T / sqrt(d)) of output blocks 4 to 11, while t > tau_A.

A^l V* is computed as attention with the source's queries and keys over the target's values (docs/methods.md, sections 0.6
and 11.7). The official code counts blocks of Stable Diffusion 1; other networks take the same third of their output blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Branch, FeatureSite, Place, Site
from ..core.errors import ParameterError
from .pair_control import NO_BRANCH, PairControl
from .step_ranges import check_fraction, whole

BOTH: frozenset[Branch] = frozenset({"cond", "uncond"})
COND: frozenset[Branch] = frozenset({"cond"})


@dataclass(frozen=True)
class PlugAndPlayOptions:
    """Defaults as published.

    Attributes:
        features_until: tau_f, the fraction of the steps with the source's residual features, 0 (none) to 1.
        attention_until: tau_A, the fraction of the steps with the source's self-attention maps, 0 (none) to 1.
        inclusive: the step at which a range ends still belongs to it, as published: 41 and 26 of 50 steps.
        feature_block: number of the output block whose features are injected; None = a third of the blocks (4 of 12).
        attention_from: the first output block whose self-attention is injected; None = the same block.
    """

    features_until: float = 0.8
    attention_until: float = 0.5
    inclusive: bool = True
    feature_block: int | None = None
    attention_from: int | None = None

    def __post_init__(self) -> None:
        for name in ("features_until", "attention_until"):
            check_fraction(name, getattr(self, name))
        for name in ("feature_block", "attention_from"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ParameterError(f"{name} is {value}: output blocks are counted from 0")


class PlugAndPlay(PairControl):
    """The injection along one grid. The source runs on its own prompt only and serves both branches of the target."""

    shared_source = True

    def __init__(self, sigmas: Tensor, options: PlugAndPlayOptions | None = None) -> None:
        super().__init__(sigmas)
        self.options = options or PlugAndPlayOptions()

    def _injects(self, until: float, step: int) -> bool:
        last = whole(self.steps * until)
        return until > 0 and (step <= last if self.options.inclusive else step < last)

    def needs(self, step: int) -> frozenset[Branch]:
        ranges = (self.options.features_until, self.options.attention_until)
        return COND if any(self._injects(until, step) for until in ranges) else NO_BRANCH

    # --------------------------------------------------------------------------------------------------- attention, A^l_t
    def wants(self, site: Site) -> bool:
        """Self-attention of the output blocks from `attention_from`, until tau_A, in model calls with a target."""
        if site.cross or site.place != "up" or not any(row.role == "target" for row in site.rows):
            return False
        first = self.options.attention_from
        if site.block < (site.blocks // 3 if first is None else first):
            return False
        return self._injects(self.options.attention_until, self.step(site.sigma))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. A^l_t V*: the source's queries and keys over each row's own values."""
        partners = self.partners(site.rows, BOTH, q.device)
        if partners is None:
            return None
        source = partners.source_of
        return F.scaled_dot_product_attention(q.index_select(0, source), k.index_select(0, source), v)

    # ---------------------------------------------------------------------------------------------------- features, f^4_t
    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        """Whether this is output block `feature_block`. Raises ParameterError where the network has no such block."""
        if place != "up":
            return False
        chosen = self.options.feature_block
        if chosen is not None and chosen >= blocks:
            raise ParameterError(f"feature_block is {chosen}: this network has output blocks 0 to {blocks - 1}")
        return self.options.features_until > 0 and block == (blocks // 3 if chosen is None else chosen)

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        """f*^4_t <- f^4_t: residual features [rows, C, h, w] with the source's in its targets' rows."""
        if not self._injects(self.options.features_until, self.step(site.sigma)):
            return x
        partners = self.partners(site.rows, BOTH, x.device)
        return x if partners is None else x.index_select(0, partners.source_of)
