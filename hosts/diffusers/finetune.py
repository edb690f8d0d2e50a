"""A copy of a diffusers network that is fine-tuned, and a denoiser with the learned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.learning.weight_deltas import Learner, apply_changes, copied, learning_need


class Trainable(Protocol):
    """The part of a `NetworkDenoiser` that this module reads and replaces."""

    layer_prefix: str
    """How LoRA files begin the names of the network's layers."""

    @property
    def network(self) -> Any: ...
    @property
    def blocks(self) -> list[nn.Module]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def with_network(self, network: Any) -> Any: ...


D = TypeVar("D", bound=Trainable)


def layer_name(denoiser: Trainable, name: str) -> str:
    """A layer as LoRA files call it: lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q."""
    return denoiser.layer_prefix + name.replace(".", "_")


def network_blocks(unet: Any) -> list[nn.Module]:
    """The blocks of a U-Net for gradient checkpointing (`optimise.recomputing`)."""
    return [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]


class DiffusersClone:
    """See `DenoiserClone`."""

    parameters: Sequence[Tensor]
    blocks: Sequence[nn.Module]

    def __init__(self, denoiser: Trainable, plan: TunePlan) -> None:
        learning_need(denoiser.network, plan).check(denoiser.device, "a copy of the model that learns")
        self._learner: Any = Learner(denoiser.network, plan, partial(layer_name, denoiser))
        self.denoiser: Any = denoiser.with_network(self._learner.network)
        self.parameters = self._learner.parameters
        self.blocks = self.denoiser.blocks

    def changes(self) -> dict[str, Tensor]:
        """See `DenoiserClone.changes`."""
        return self._learner.changes()

    def release(self) -> None:
        """See `DenoiserClone.release`."""
        self.denoiser = self._learner = None
        self.parameters = ()
        self.blocks = ()


def with_changes(denoiser: D, changes: Mapping[str, Tensor]) -> D:
    """A denoiser of the same type with a copy of the weights, to which `changes` are added (`weight_deltas.py`)."""
    network = copied(denoiser.network, denoiser.dtype)
    apply_changes(network, changes, partial(layer_name, denoiser))
    return denoiser.with_network(network)
