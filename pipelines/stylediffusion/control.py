"""Value embeddings during sampling: what StyleDiffusion adds to attention control (docs/methods.md, section 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.pair_control import NO_BRANCH, PairControl
from ..attention.step_ranges import check_fraction, whole
from ..attention.token_maps import check_tokens
from ..core.attention_sites import Branch, FeatureSite, Place, Role, Site
from .networks import value_embedding
from .value_embeddings import ValueEmbeddings


class StyleControl(PairControl):
    """Value embeddings in the conditional passes of source and target, combined with another edit.

    The other edit is a P2PControl or PlugAndPlay, for example. Keys, and the unconditional passes, use the text. Source and
    target each scale and shift the text embedding of their own prompt.
    """

    def __init__(
        self,
        embeddings: ValueEmbeddings,
        inner: PairControl | None = None,
        *,
        source: bool = True,
        target_until: float = 1.0,
    ) -> None:
        """Prepare sampling on the grid of `embeddings`.

        Args:
            embeddings: of the inversion.
            inner: the other edit, on the same grid; None = value embeddings alone.
            source: whether the source uses value embeddings, in every step.
            target_until: tau_v, the fraction of the steps in which the target uses value embeddings, 0 (never) to 1.
        Raises: ParameterError.
        """
        super().__init__(embeddings.sigmas)
        self.embeddings = embeddings
        self.inner = inner or PairControl(embeddings.sigmas)
        self.source = source
        self.target_until = check_fraction("value_until", target_until)
        self.shared_source = self.inner.shared_source
        self._last: tuple[Tensor, Site, Tensor] | None = None

    # ------------------------------------------------------------------------------------------ called by sampling loops
    def reset(self) -> None:
        super().reset()
        self.inner.reset()
        self._last = None

    def needs(self, step: int) -> frozenset[Branch]:
        return self.inner.needs(step)

    def active(self, step: int) -> bool:
        return (
            self._changes("target", step) or (self.source and self.needs(step) != NO_BRANCH) or self.inner.active(step)
        )

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        return self.inner.blend(source, target, step)

    # -------------------------------------------------------------------------------------------------- called by hosts
    def wants(self, site: Site) -> bool:
        return self.inner.wants(site) or (site.cross and any(self._chosen(site)))

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        if self.inner.wants(site):
            key, value = self.inner.inputs(key, value, site)
        return key, self._with_value_embeddings(value, site) if site.cross else value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. The other edit decides."""
        return self.inner.attend(q, k, v, site) if self.inner.wants(site) else None

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        return self.inner.wants_features(place, block, blocks)

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        return self.inner.features(x, site)

    # ------------------------------------------------------------------------------------------------- value embeddings
    def _changes(self, role: Role, step: int) -> bool:
        if step < self.embeddings.first:
            return False
        return self.source if role == "source" else step < whole(self.steps * self.target_until)

    def _chosen(self, site: Site) -> list[bool]:
        step = self.step(site.sigma)
        return [row.branch == "cond" and self._changes(row.role, step) for row in site.rows]

    def _with_value_embeddings(self, value: Tensor, site: Site) -> Tensor:
        """Value inputs [rows, T, D] with value embeddings in the chosen rows.

        All layers of one network call receive the same text, so the result is computed once per call.
        """
        if self._last is not None:
            given, at, made = self._last
            if given is value and at.sigma == site.sigma and at.rows == site.rows:
                return made
        chosen = [index for index, wanted in enumerate(self._chosen(site)) if wanted]
        if not chosen:
            return value
        rows = torch.tensor(chosen, device=value.device)
        new = self._value_embeddings(value.index_select(0, rows), [site.rows[index].image for index in chosen], site)
        made = value.index_copy(0, rows, new.to(value.dtype))
        self._last = value, site, made
        return made

    def _value_embeddings(self, text: Tensor, images: list[int], site: Site) -> Tensor:
        """Value embeddings of text embeddings [rows, T, D] that belong to `images`, in the step of a call."""
        scale, shift = self.embeddings.at(self.step(site.sigma))
        images = images if len(shift) > 1 else [0] * len(images)
        check_tokens(text.shape[1], shift.shape[1])
        repeats = text.shape[1] // shift.shape[1]  # a host may repeat a prompt to the length of another

        def of_rows(learned: Tensor) -> Tensor:
            return learned.to(text.device)[images].repeat(1, repeats, 1)

        return value_embedding(None if scale is None else of_rows(scale), of_rows(shift), text.float())


__all__ = ["StyleControl"]
