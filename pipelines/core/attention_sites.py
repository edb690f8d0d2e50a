"""Attention layers and batch rows, as a host describes them to an `AttentionControl`.

A batch row is identified by its role, branch and image, never by its position, and a step by its sigma, never by counting
calls. A source and a target that share attention are neighbours in one batch (`pair_rows`) under one context with a row
for each, which no host splits. Conditional and unconditional rows may come in one call or in two, in either order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Role = Literal["source", "target"]
Branch = Literal["cond", "uncond"]
Place = Literal["down", "mid", "up"]
Grid = tuple[int, int]  # height, width


class Row(NamedTuple):
    """One batch row of a network call."""

    role: Role
    branch: Branch
    image: int


@dataclass(frozen=True)
class RowMap:
    """The meaning of the latents and the contexts of a `denoise` call.

    Attributes:
        batch: role and image of every latent of the batch.
        branches: branch of every context, in the order they are given.
        mixed: the branch of every latent, where one context has rows of both branches (`trio_rows`); `branches` then has
            one entry, which is not used.
    """

    batch: tuple[tuple[Role, int], ...]
    branches: tuple[Branch, ...]
    mixed: tuple[Branch, ...] = ()

    def chunk(self, context: int) -> tuple[Row, ...]:
        """The batch rows of context number `context`; a network call stacks such chunks."""
        branches = self.mixed or (self.branches[context],) * len(self.batch)
        return tuple(Row(role, branch, image) for (role, image), branch in zip(self.batch, branches, strict=True))

    @property
    def unit(self) -> int:
        """How many neighbouring latents must stay in one call; a batch may be split at multiples of it."""
        if all(role == "target" for role, _ in self.batch) or all(role == "source" for role, _ in self.batch):
            return 1
        first = self.batch[0][1]
        return next((i for i, (_, image) in enumerate(self.batch) if image != first), len(self.batch))


@dataclass(frozen=True)
class Site:
    """One attention layer in one network call.

    Attributes:
        place: "down", "mid" or "up".
        block: number of the U-Net block in its place, as Stable Diffusion's original files count them (input blocks
            from 0 = the first convolution, middle 0, output blocks from 0).
        blocks: how many blocks its place has (Stable Diffusion 1: 12 input, 1 middle, 12 output blocks).
        depth: number of the transformer layer in its block.
        order: number of the transformer layer in the whole network, in order of execution, from 0.
        layers: how many transformer layers the network has.
        grid: (height, width) of the layer's feature map; their product is the count of query tokens.
        latent_pixels: (height, width) of the latent.
        cross: True for cross-attention (keys come from the text), False for self-attention.
        sigma: of the call.
        rows: the meaning of every batch row of q, k and v.
        cross_grids: place and grid of every cross-attention layer of the network; empty = not known.
    """

    place: Place
    block: int
    blocks: int
    depth: int
    order: int
    layers: int
    grid: tuple[int, int]
    latent_pixels: tuple[int, int]
    cross: bool
    sigma: float
    rows: tuple[Row, ...]
    cross_grids: frozenset[tuple[Place, Grid]] = frozenset()

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def within(self, divisor: int) -> bool:
        """Whether the grid is at most 1 / `divisor` of the latent on both sides (sizes that do not divide round up)."""
        return all(side <= -(-whole // divisor) for side, whole in zip(self.grid, self.latent_pixels, strict=True))


@dataclass(frozen=True)
class FeatureSite:
    """The residual branch of one convolutional block (what it adds to its skip), in one network call; see `Site`.

    The middle has two: block 0 before its attention and block 1 after it.
    """

    place: Place
    block: int
    blocks: int
    latent_pixels: tuple[int, int]
    sigma: float
    rows: tuple[Row, ...]


class AttentionControl(Protocol):
    """Reads and changes the attention and the residual features of a network. Subclass `Passive` and override."""

    def wants(self, site: Site) -> bool:
        """Whether `inputs` or `attend` acts at this layer; otherwise the host's own attention runs."""

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Replace the inputs of the key and the value projection, [rows, tokens, width] each, possibly one tensor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """Replace the attention of one layer.

        Args:
            q: queries [rows, heads, N, d]; N = the latent pixels of the layer's grid.
            k: keys [rows, heads, M, d]; M = N at self-attention, the text tokens at cross-attention.
            v: values [rows, heads, M, d].
            site: the layer, the sigma, and the meaning of every row.
        Returns: the attention [rows, heads, N, d], before the output projection; None leaves the layer as it is.
        """

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        """Whether `features` acts on this block; asked once, when the hooks are placed."""

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        """Replace the residual features [rows, C, h, w], before they are added to the skip."""


class Passive:
    """An `AttentionControl` that changes nothing."""

    def wants(self, site: Site) -> bool:
        return False

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """See `AttentionControl.attend`. Changes nothing."""
        return None

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        return False

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        return x


@dataclass(frozen=True)
class Controlled:
    """A control and the batch rows of the call it is for: what `Denoiser.denoise` takes as `control`."""

    control: AttentionControl
    rows: RowMap
