"""Value embeddings in force during sampling: what an edit of a StyleDiffusion inversion adds to attention control."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.pair_control import NOTHING, PairControl
from ..attention.step_ranges import check_fraction, whole
from ..attention.token_maps import check_tokens
from ..core.attention_sites import Branch, FeatureSite, Place, Role, Site
from .networks import values
from .value_embeddings import ValueEmbeddings


class StyleControl(PairControl):
    """Learned values for conditional rows, and another edit (Prompt-to-Prompt, feature injection) on top of them.

    Keys and unconditional rows stay the text's own. Every row scales and shifts its own text embedding.
    """

    def __init__(
        self, embeddings: ValueEmbeddings, inner: PairControl | None = None, *, source: bool = True,
        target_until: float = 1.0,
    ) -> None:  # fmt: skip
        """Make it for the grid of `embeddings`, which must be that of `inner`.

        Args:
            source: whether source rows get their values, at every step.
            target_until: tau_v, the part of the run in which target rows get theirs, 0 (never) to 1.
        Raises: ParameterError.
        """
        super().__init__(embeddings.sigmas)
        self.embeddings, self.inner, self.source = embeddings, inner or PairControl(embeddings.sigmas), source
        self.target_until = check_fraction("value_until", target_until)
        self.shared_source = self.inner.shared_source
        self._last: tuple[Tensor, Site, Tensor] | None = None

    # ------------------------------------------------------------------------------------------------ what a loop asks
    def reset(self) -> None:
        super().reset()
        self.inner.reset()
        self._last = None

    def needs(self, step: int) -> frozenset[Branch]:
        return self.inner.needs(step)

    def active(self, step: int) -> bool:
        return self._changes("target", step) or (self.source and self.needs(step) != NOTHING) or self.inner.active(step)

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        return self.inner.blend(source, target, step)

    # ------------------------------------------------------------------------------------------------ what a host calls
    def wants(self, site: Site) -> bool:
        return self.inner.wants(site) or (site.cross and any(self._chosen(site)))

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        if self.inner.wants(site):
            key, value = self.inner.inputs(key, value, site)
        return key, self._valued(value, site) if site.cross else value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        return self.inner.attend(q, k, v, site) if self.inner.wants(site) else None

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        return self.inner.wants_features(place, block, blocks)

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        return self.inner.features(x, site)

    # ----------------------------------------------------------------------------------------------------------- values
    def _changes(self, role: Role, step: int) -> bool:
        if step < self.embeddings.first:
            return False
        return self.source if role == "source" else step < whole(self.steps * self.target_until)

    def _chosen(self, site: Site) -> list[bool]:
        step = self.step(site.sigma)
        return [row.branch == "cond" and self._changes(row.role, step) for row in site.rows]

    def _valued(self, value: Tensor, site: Site) -> Tensor:
        """Value inputs with the chosen rows replaced; every layer of one network call gets the same tensor, made once."""
        if self._last is not None:
            given, at, made = self._last
            if given is value and at.sigma == site.sigma and at.rows == site.rows:
                return made
        chosen = [i for i, wanted in enumerate(self._chosen(site)) if wanted]
        if not chosen:
            return value
        rows = torch.tensor(chosen, device=value.device)
        own = value.index_select(0, rows)
        scale, shift = self.embeddings.at(self.step(site.sigma))
        images = [site.rows[i].image if len(shift) > 1 else 0 for i in chosen]
        check_tokens(own.shape[1], shift.shape[1])
        repeats = own.shape[1] // shift.shape[1]  # where a host has repeated a prompt to the length of another

        def wide(part: Tensor) -> Tensor:
            return part.to(value.device)[images].repeat(1, repeats, 1)

        new = values(None if scale is None else wide(scale), wide(shift), own.float())
        made = value.index_copy(0, rows, new.to(value.dtype))
        self._last = value, site, made
        return made


__all__ = ["StyleControl"]
