"""KV-Edit: the background attends as the source's and keeps its latents (Zhu et al. 2025, section 3).

Outside the mask, the target has the source's keys and values in every layer, and the source's latent after every step:

    K <- M K + (1 - M) K_s,    V <- M V + (1 - M) V_s,    z <- M z + (1 - M) z_s.

What lies outside cannot drift, and the object is drawn beside the background of the source. With an inverted image as the
source, z_s is its trajectory. The publication stores K_s and V_s during the inversion and computes only the object's tokens;
here the source runs beside the target, so nothing is stored and every sampler works (docs/methods.md, section 18.5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention_sites import Branch, Row, Site
from ..core.masks import MaskSchedule
from .masactrl import BOTH
from .pair_control import PairControl


class KVEdit(PairControl):
    """The source's keys, values and latents outside a mask, along one grid.

    An image token counts as outside where no latent pixel below it is edited.
    """

    joint = True
    shared_source = True

    def __init__(self, sigmas: Tensor, masks: MaskSchedule) -> None:
        """Make the control of one run.

        Args:
            sigmas: the whole grid, [N + 1].
            masks: latent masks, 1 = edit, at least 0.5 counts as 1; one per image, or one for all.
        """
        super().__init__(sigmas)
        self.masks = masks

    def needs(self, step: int) -> frozenset[Branch]:
        return BOTH

    def wants(self, site: Site) -> bool:
        """Self-attention and joint attention in model calls with a target."""
        return not site.cross and any(row.role == "target" for row in site.rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. Text tokens attend to the mixed image tokens, too."""
        partners = self.partners(site.rows, BOTH, q.device)
        if partners is None:
            return None
        outside = self._outside([target for target, _ in partners.pairs], site).to(q.device)

        def mixed(x: Tensor) -> Tensor:
            own, theirs = x.index_select(0, partners.targets), x.index_select(0, partners.sources)
            return x.index_copy(0, partners.targets, torch.where(outside, theirs, own))

        return site.attention(q, mixed(k), mixed(v))

    def _outside(self, rows: list[Row], site: Site) -> Tensor:
        """Which keys of each row are the source's, bool [rows, 1, text + image tokens, 1]; words never are."""
        images = max(row.image for row in rows) + 1
        masks = self.masks.expanded(max(images, self.masks.batch), *site.latent_pixels)
        inside = (masks.at(self.step(site.sigma), self.sigmas) >= 0.5).float()
        edited = F.adaptive_max_pool2d(inside, site.grid).flatten(1)[[row.image for row in rows]]
        return F.pad(edited == 0, (site.text, 0))[:, None, :, None]

    def blend(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        """The target [B, C, h, w], with the source's latent pixels outside the mask."""
        masks = self.masks.expanded(len(target), *target.shape[-2:]).to(target.device)
        return torch.where(masks.at(step, self.sigmas) >= 0.5, target, source)
