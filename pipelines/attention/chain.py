"""Several attention controls as one."""

from __future__ import annotations

from torch import Tensor

from .sites import AttentionControl, FeatureSite, Place, Site


class Chain:
    """Every control sees every site; inputs and features go through all, attention is the first's that has an answer.

    The controls after that one do not see the site's queries and keys: put those that only read first.
    """

    def __init__(self, *controls: AttentionControl) -> None:
        self.controls = controls

    def wants(self, site: Site) -> bool:
        return any(control.wants(site) for control in self.controls)

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        for control in self.controls:
            if control.wants(site):
                key, value = control.inputs(key, value, site)
        return key, value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        for control in self.controls:
            out = control.attend(q, k, v, site) if control.wants(site) else None
            if out is not None:
                return out
        return None

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        return any(control.wants_features(place, block, blocks) for control in self.controls)

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        for control in self.controls:
            if control.wants_features(site.place, site.block, site.blocks):
                x = control.features(x, site)
        return x
