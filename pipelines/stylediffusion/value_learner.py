"""What StyleDiffusion's learning does inside cross-attention: other values for the text, and maps held to a goal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.token_maps import has_grid, map_divisor
from ..core.attention_sites import Passive, Row, Site

GAIN = 2.0**12
FLOOR = 6  # cells per side: what a map must have to hold a layout. Word masks, which show shapes, need more


class ValueLearner(Passive):
    """The control of one conditional row per image while its values are learned.

    Gradients inside the network are 4096 times their size, so that half precision does not lose them: `amplified` on the
    way in, the inverse where they leave (methods.md, 9, pitfalls). A power of two changes no float32 result.

    Attributes:
        value: value inputs [B, T, D] of cross-attention, with gradients; None = the text itself.
        compare: whether maps are looked at.
        goals: maps [B, heads, cells, T] by layer. While it is None, maps are collected in `seen`; afterwards their distance
            from it is summed up.
        seen: see `goals`.
        distance: sum over layers of the mean squared distance of each image's maps, [B].
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self.images, self.device = images, device
        self.value: Tensor | None = None
        self.compare = True
        self.goals: dict[int, Tensor] | None = None
        self.seen: dict[int, Tensor] = {}
        self.distance = torch.zeros(images, device=device)
        self._index: dict[tuple[Row, ...], Tensor] = {}

    def begin(self, value: Tensor | None, compare: bool = True) -> None:
        """Before each evaluation of the network."""
        self.value = None if value is None else amplified(value, 1 / GAIN)
        self.compare = compare
        self.distance = torch.zeros(self.images, device=self.device)

    def collect(self) -> None:
        """The next evaluation says what the maps should be."""
        self.goals, self.seen = None, {}
        self.begin(None)

    def keep(self) -> None:
        """What was collected is the goal from now on."""
        self.goals, self.seen = self.seen, {}

    def wants(self, site: Site) -> bool:
        return site.cross and (self.value is not None or self._compares(site))

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        if self.value is None:
            return key, value
        return key, self._of_rows(self.value, site).to(value.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """Attention by its explicit map where maps are compared; both are needed with gradients, and once."""
        if not self._compares(site):
            return None
        maps = torch.softmax(q.float() @ (k.float() * q.shape[-1] ** -0.5).mT, dim=-1)
        if self.goals is None:
            goal = self.seen.setdefault(site.order, maps.new_zeros(self.images, *maps.shape[1:]))
            goal[self._images(site)] = maps.detach()
        else:
            gap = (maps - self._of_rows(self.goals[site.order], site)).square().flatten(1).mean(1)
            self.distance = self.distance.index_add(0, self._images(site), amplified(gap, GAIN))
        return maps.to(v.dtype) @ v

    def _compares(self, site: Site) -> bool:
        return self.compare and compared(site)

    def _of_rows(self, values: Tensor, site: Site) -> Tensor:
        """Rows of a call, from a tensor with an entry per image; a call of all images needs no copy."""
        return values if len(site.rows) == self.images else values[self._images(site)]

    def _images(self, site: Site) -> Tensor:
        if site.rows not in self._index:
            self._index[site.rows] = torch.tensor([row.image for row in site.rows], device=self.device)
        return self._index[site.rows]


def compared(site: Site) -> bool:
    """Whether a layer's maps are part of the loss: cross-attention on the way down and up, at a quarter of the latent's
    grid (16 x 16 of 64 x 64 as published; at half of it where that would have fewer than 6 cells per side)."""
    return site.cross and site.place != "mid" and has_grid(site, map_divisor(site.latent_pixels, FLOOR))


def amplified(x: Tensor, gain: float) -> Tensor:
    """`x`, whose gradient is `gain` times what arrives."""
    return _Amplified.apply(x, gain)


class _Amplified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * ctx.gain, None


__all__ = ["GAIN", "ValueLearner", "amplified", "compared"]
