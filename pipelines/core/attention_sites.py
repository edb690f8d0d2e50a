"""Attention layers and batch rows, as a host describes them to an `AttentionControl`.

A batch row is identified by its role, branch and image, never by its position, and a step by its sigma, never by counting
calls. A source and a target that share attention are neighbours in one batch (`pair_rows`) under one context with a row
for each, which no host splits. Conditional and unconditional rows may come in one call or in two, in either order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from .errors import FamilyError

Role = Literal["source", "target"]
Branch = Literal["cond", "uncond"]
Place = Literal["down", "mid", "up"]
Grid = tuple[int, int]  # height, width
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # softmax(q k^T / sqrt(d)) v
PLACES: tuple[Place, ...] = ("down", "mid", "up")


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
        place: "down", "mid" or "up"; of a transformer without U-Net, the first, middle and last third of the layers.
        block: number of the U-Net block in its place, as Stable Diffusion's original files count them (input blocks
            from 0 = the first convolution, middle 0, output blocks from 0).
        blocks: how many blocks its place has (Stable Diffusion 1: 12 input, 1 middle, 12 output blocks).
        depth: number of the transformer layer in its block.
        order: number of the transformer layer in the whole network, in order of execution, from 0.
        layers: how many transformer layers the network has.
        grid: (height, width) of the layer's feature map; their product is the count of image tokens.
        latent_pixels: (height, width) of the latent.
        cross: True for cross-attention (keys come from the text), False for self-attention and joint attention.
        sigma: of the call.
        rows: the meaning of every batch row of q, k and v.
        cross_grids: place and grid of every cross-attention layer of the network; empty = not known.
        text: joint attention: how many text tokens come before the image tokens, in q, k and v alike; 0 = the layer is not
            joint.
        attention: the host's own attention function on [rows, heads, tokens, d], for joint layers.
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
    text: int = 0
    attention: Attention = field(default=F.scaled_dot_product_attention, compare=False)

    @property
    def joint(self) -> bool:
        """Whether text and image tokens attend to each other in this layer."""
        return self.text > 0

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
    """Reads and changes the attention and the residual features of a network. Subclass `Passive` and override.

    Attributes:
        joint: whether it knows joint attention; hosts refuse the others on networks that have it.
    """

    joint: bool

    def wants(self, site: Site) -> bool:
        """Whether `inputs` or `attend` acts at this layer; otherwise the host's own attention runs."""

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Replace the inputs of the key and the value projection, [rows, tokens, width] each, possibly one tensor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        """Replace the attention of one layer.

        Args:
            q: queries [rows, heads, N, d]; N = the latent pixels of the layer's grid, after `site.text` text tokens.
            k: keys [rows, heads, M, d]; M = N at self- and joint attention, the text tokens at cross-attention.
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

    joint = False

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


def third(order: int, layers: int) -> Place:
    """The place of layer `order` of a transformer without U-Net."""
    return PLACES[3 * order // layers]


def check_joint(control: AttentionControl, network: str) -> None:
    """Raises FamilyError for a control that does not know joint attention; `network` names the network."""
    if not control.joint:
        raise FamilyError(
            f"{type(control).__name__} needs the separate self- and cross-attention of an SD 1.x, SD 2.x or SDXL model, but "
            f"{network} attends to text and image jointly: use P2P or MasaCtrl, FlowEdit, or a mask (blended edit, DiffEdit)"
        )


@dataclass(frozen=True)
class Controlled:
    """A control and the batch rows of the call it is for: what `Denoiser.denoise` takes as `control`."""

    control: AttentionControl
    rows: RowMap
