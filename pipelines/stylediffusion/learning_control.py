"""The attention control of StyleDiffusion's learning: value embeddings in cross-attention, and the attention loss L_att.

(Li et al. 2023, section 3.3; docs/methods.md, section 9.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.token_maps import MapGrid
from ..core.attention_sites import Passive, Row, Site
from ..learning.loss_scaling import LossScaling

LOSS_SCALE = 2.0**12
LEAST_SIDE = (
    6  # latent pixels per side that a map needs to show a layout; the masks of LocalBlend, which show shapes, need more
)


class LearningControl(Passive):
    """Attention control with one conditional row per image, in force while value embeddings are learned.

    `collect_goals`, one evaluation and `keep_goals` store the cross-attention maps of the inversion. After that, `begin`
    precedes each evaluation, and `attention_loss` follows from it.

    Gradients enter the network at its output and at every compared map, and leave it at the value embeddings. All of them
    share one fixed loss scale, because float16 would lose them otherwise (docs/methods.md, section 9, pitfalls).

    Attributes:
        value: value embeddings [B, T, D] in place of the text, with gradients; None = the text itself.
        compare: whether maps are compared with their goals.
        goals: the inversion's maps [B, heads, latent pixels, T] by layer; None while they are collected.
        attention_loss: L_att of the last evaluation, [B]: the mean squared difference of each layer's maps from their
            goal, summed over layers.
        scaling: the loss scaling of the current evaluation. Apply `scaling.leave` to the network's prediction.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self.images, self.device = images, device
        self.value: Tensor | None = None
        self.compare = True
        self.goals: dict[int, Tensor] | None = None
        self.attention_loss = torch.zeros(images, device=device)
        self.scaling = LossScaling(None)
        self._maps: dict[int, Tensor] = {}
        self._grid = MapGrid(places=("down", "up"), smallest=LEAST_SIDE)
        self._index: dict[tuple[Row, ...], Tensor] = {}

    def begin(self, value: Tensor | None, compare: bool = True) -> None:
        """Prepare the next evaluation of the network.

        Args:
            value: value embeddings [B, T, D], or None for the text itself.
            compare: whether to compute the attention loss.
        """
        self.scaling = LossScaling(torch.float16, LOSS_SCALE)  # exact in float32, so no need to ask for the type
        self.value = None if value is None else self.scaling.enter(value)
        self.compare = compare
        self.attention_loss = torch.zeros(self.images, device=self.device)

    def collect_goals(self) -> None:
        """The maps of the next evaluation become the goals."""
        self.goals, self._maps = None, {}
        self.begin(None)

    def keep_goals(self) -> None:
        """Use the collected maps as goals from now on."""
        self.goals, self._maps = self._maps, {}

    # ---------------------------------------------------------------------------------------------- attention control
    def wants(self, site: Site) -> bool:
        return site.cross and (self.value is not None or self._compares(site))

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Keys of the text, values of the image (equation 6)."""
        if self.value is None:
            return key, value
        return key, self._of_rows(self.value, site).to(value.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. Compared layers compute the map itself, because it needs gradients."""
        if not self._compares(site):
            return None
        maps = torch.softmax(q.float() @ (k.float() * q.shape[-1] ** -0.5).mT, dim=-1)
        if self.goals is None:
            goal = self._maps.setdefault(site.order, maps.new_zeros(self.images, *maps.shape[1:]))
            goal[self._images(site)] = maps.detach()
        else:
            gap = (maps - self._of_rows(self.goals[site.order], site)).square().flatten(1).mean(1)
            self.attention_loss = self.attention_loss.index_add(0, self._images(site), self.scaling.leave(gap))
        return maps.to(v.dtype) @ v

    def _compares(self, site: Site) -> bool:
        """Whether L_att includes a layer's maps.

        It includes cross-attention in the down and up blocks at a quarter of the latent's grid: 16 x 16 of 64 x 64 as
        published. Small latents use half of their grid, or the whole, so that a map has at least 6 latent pixels per side.
        """
        return self.compare and self._grid.has(site)

    def _of_rows(self, per_image: Tensor, site: Site) -> Tensor:
        """The entries of a call's rows; a call with all images needs no copy."""
        return per_image if len(site.rows) == self.images else per_image[self._images(site)]

    def _images(self, site: Site) -> Tensor:
        if site.rows not in self._index:
            self._index[site.rows] = torch.tensor([row.image for row in site.rows], device=self.device)
        return self._index[site.rows]


__all__ = ["LOSS_SCALE", "LearningControl"]
