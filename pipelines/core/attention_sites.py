"""Where attention happens and whose rows are in a call: what a host tells an `AttentionControl`.

Rows are addressed by meaning, never by position; steps by sigma, never by counting calls. A source and a target that must
see each other travel as neighbours of one batch (`pair_rows`), under one context with a row for each: no host splits
that. Conditional and unconditional rows may come together, apart, or in either order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Role = Literal["source", "target"]
Branch = Literal["cond", "uncond"]
Place = Literal["down", "mid", "up"]


class Row(NamedTuple):
    """One row of a network call."""

    role: Role
    branch: Branch
    image: int


@dataclass(frozen=True)
class RowMap:
    """What the batch rows and the contexts of a `denoise` call mean.

    Attributes:
        batch: role and image of every latent of the batch.
        branches: branch of every context, in the order they are given.
        mixed: where one context has rows of both branches, the branch of every latent; `branches` then has one entry,
            which is not read (`trio_rows`).
    """

    batch: tuple[tuple[Role, int], ...]
    branches: tuple[Branch, ...]
    mixed: tuple[Branch, ...] = ()

    def chunk(self, context: int) -> tuple[Row, ...]:
        """The rows that context number `context` is evaluated on; network calls stack such chunks."""
        branches = self.mixed or (self.branches[context],) * len(self.batch)
        return tuple(Row(role, branch, image) for (role, image), branch in zip(self.batch, branches, strict=True))

    @property
    def unit(self) -> int:
        """How many neighbouring latents must share a call; a batch may be cut at its multiples."""
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
        layers: how many there are.
        grid: (height, width) in cells; their product is the count of query tokens.
        cells: (height, width) of the latent.
        cross: keys come from the text; otherwise from the picture itself.
        sigma: noise level of the call.
        rows: the meaning of every row of q, k and v.
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
    """Reads and changes what the attention layers of a network compute. Subclass `Passive` and override."""

    def wants(self, site: Site) -> bool:
        """Whether `inputs` or `attend` would do anything here: where it is False, the host's own attention runs."""

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Inputs of the key and the value projection, [rows, tokens, width] each, possibly one tensor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """Attention of q [rows, heads, N, d] over k, v [rows, heads, M, d]: [rows, heads, N, d]; None = plain."""

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        """Whether `features` is to be called for this block at all (asked when hooks are placed)."""

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        """Residual features [rows, C, h, w], before they are added to the skip."""


class Passive:
    """An `AttentionControl` that changes nothing."""

    def wants(self, site: Site) -> bool:
        return False

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        return key, value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        return None

    def wants_features(self, place: Place, block: int, blocks: int) -> bool:
        return False

    def features(self, x: Tensor, site: FeatureSite) -> Tensor:
        return x


@dataclass(frozen=True)
class Controlled:
    """A control and the meaning of the rows it will meet: what `Denoiser.denoise` takes as `control`."""

    control: AttentionControl
    rows: RowMap
