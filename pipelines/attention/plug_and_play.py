"""Plug-and-Play: the source's features in the target (Tumanyan et al. 2023; methods.md, 11.7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Branch, FeatureSite, Place, Site
from ..core.errors import ParameterError
from .pair_control import NOTHING, PairControl
from .step_ranges import check_fraction, whole

BOTH: frozenset[Branch] = frozenset({"cond", "uncond"})
SOURCE: frozenset[Branch] = frozenset({"cond"})


@dataclass(frozen=True)
class PlugAndPlayOptions:
    """Defaults as published.

    Attributes:
        features_until: part of the run with the source's residual features, 0 (never) to 1.
        attention_until: part of the run with its self-attention's queries and keys.
        inclusive: the step at which a part ends still belongs to it, as published: 41 and 26 of 50 steps.
        feature_block: number of the output block whose features are taken; None = a third of the way (4 of 12).
        attention_from: the first output block whose self-attention is taken; None = the same place.
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


class FeatureInjection(PairControl):
    """The edit in force on one run along `sigmas`; one source row, on its own prompt, serves both branches."""

    shared_source = True

    def __init__(self, sigmas: Tensor, options: PlugAndPlayOptions | None = None) -> None:
        super().__init__(sigmas)
        self.options = options or PlugAndPlayOptions()

    def _open(self, part: float, step: int) -> bool:
        end = whole(self.steps * part)
        return part > 0 and (step <= end if self.options.inclusive else step < end)

    def needs(self, step: int) -> frozenset[Branch]:
        parts = (self.options.features_until, self.options.attention_until)
        return SOURCE if any(self._open(part, step) for part in parts) else NOTHING

    # -------------------------------------------------------------------------------------------------------- attention
    def wants(self, site: Site) -> bool:
        """Self-attention of the way up from `attention_from` on, until `attention_until`, where there is a target."""
        if site.cross or site.place != "up" or not any(row.role == "target" for row in site.rows):
            return False
        first = self.options.attention_from
        if site.block < (site.blocks // 3 if first is None else first):
            return False
        return self._open(self.options.attention_until, self.step(site.sigma))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """The source's queries and keys [rows, heads, N, d] over each row's own values (PnP, section 4)."""
        partners = self.partners(site.rows, BOTH, q.device)
        if partners is None:
            return None
        takes = partners.takes
        return F.scaled_dot_product_attention(q.index_select(0, takes), k.index_select(0, takes), v)

    # --------------------------------------------------------------------------------------------------------- features
    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        """`feature_block` of the way up. Raises ParameterError where the network has no such block."""
        chosen = self.options.feature_block
        if chosen is not None and chosen >= blocks and place == "up":
            raise ParameterError(f"feature_block is {chosen}: this network has output blocks 0 to {blocks - 1}")
        return (
            place == "up" and self.options.features_until > 0 and block == (blocks // 3 if chosen is None else chosen)
        )

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        """Residual features [rows, C, h, w], the source's in its targets' rows (PnP, section 4)."""
        if not self._open(self.options.features_until, self.step(site.sigma)):
            return x
        partners = self.partners(site.rows, BOTH, x.device)
        return x if partners is None else x.index_select(0, partners.takes)
