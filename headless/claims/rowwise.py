"""Many scenes at once: a denoiser with separate low-rank weights for every image of a batch.

Tuning and sampling 32 scenes one by one would cost 32 times the model calls. Image b of a batch goes through the network
with weights of its own, and its loss gives the others no gradient, so each image learns as it would alone. Batch row r of
a call belongs to image `r % images`: pairs of source and reference, conditional and unconditional rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...hosts.diffusers.denoiser import DiffusersDenoiser
from ...hosts.diffusers.finetune import network_blocks
from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.learning.weight_deltas import attention_layers


class RowLowRank(nn.Module):
    """`LowRank` of `pipelines/learning/weight_deltas.py`, with factors [images, ...]."""

    def __init__(self, layer: nn.Linear, images: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rank, bound = min(rank, layer.in_features, layer.out_features), 1 / math.sqrt(layer.in_features)
        down = torch.rand(rank, layer.in_features, generator=generator) * 2 * bound - bound
        self.layer = layer
        self.down = nn.Parameter(down.repeat(images, 1, 1), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(images, layer.out_features, rank), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        images = len(self.down)
        rows = x.reshape(-1, images, *x.shape[1:])
        low = torch.matmul(rows, _summed(self.down).transpose(1, 2))
        return self.layer(x) + torch.matmul(low, _summed(self.up).transpose(1, 2)).reshape(*x.shape[:-1], -1)


def _summed(value: Tensor) -> Tensor:
    """`value`, with the gradient of a sum over the images in place of their mean: the gradient of each image alone."""
    return value + (len(value) - 1) * (value - value.detach())


@dataclass
class RowwiseDenoiser(DiffusersDenoiser):
    """A denoiser of `images` scenes whose clone learns for each of them."""

    images: int = 1

    def model_clone(self, plan: TunePlan, shape: Sequence[int]) -> RowwiseClone:  # type: ignore[override]
        return RowwiseClone(self, plan)

    def with_rows(self, changes: dict[str, Tensor]) -> RowwiseDenoiser:
        """A denoiser with the weights that a `RowwiseClone` learned."""
        clone = RowwiseClone(self, TunePlan("lora", rank=next(iter(changes.values())).shape[-1]))
        for name, layer in clone.added.items():
            layer.up.data, layer.down.data = changes[f"{name}.up"], changes[f"{name}.down"]
        return clone.denoiser


class RowwiseClone:
    """See `DenoiserClone`. `changes` has one entry per image, which no file format holds."""

    def __init__(self, denoiser: RowwiseDenoiser, plan: TunePlan) -> None:
        unet: Any = copy.deepcopy(denoiser.unet)
        generator = torch.Generator("cpu").manual_seed(plan.seed)
        self.added = {
            name: RowLowRank(layer, denoiser.images, plan.rank, generator)
            for name, layer in attention_layers(unet).items()
        }
        for name, layer in self.added.items():
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer)
        self.parameters: Sequence[Tensor] = [v for layer in self.added.values() for v in (layer.down, layer.up)]
        self.blocks: Sequence[nn.Module] = network_blocks(unet)
        self.denoiser: Any = replace(denoiser, unet=unet, _fingerprint=None)

    def changes(self) -> dict[str, Tensor]:
        found = {f"{name}.up": layer.up.detach().clone() for name, layer in self.added.items()}
        return found | {f"{name}.down": layer.down.detach().clone() for name, layer in self.added.items()}

    def release(self) -> None:
        self.denoiser = None
        self.parameters, self.blocks = (), ()


def rowwise(denoiser: DiffusersDenoiser, images: int) -> RowwiseDenoiser:
    """The same weights for `images` scenes."""
    fields = {name: getattr(denoiser, name) for name in DiffusersDenoiser.__dataclass_fields__}
    return RowwiseDenoiser(**fields, images=images)
