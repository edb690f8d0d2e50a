"""A copy of a diffusers U-Net that is fine-tuned, and a denoiser with the learned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.learning.weight_deltas import Learner, apply_changes, copied, learning_need

PREFIX = "lora_unet_"


class UNetDenoiser(Protocol):
    """The part of a `DiffusersDenoiser` (a dataclass) that this module reads and replaces."""

    unet: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


D = TypeVar("D", bound=UNetDenoiser)


def layer_name(name: str) -> str:
    """A U-Net layer as LoRA files call it: lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q."""
    return PREFIX + name.replace(".", "_")


def network_blocks(unet: Any) -> list[nn.Module]:
    """The blocks for gradient checkpointing (`optimise.recomputing`)."""
    return [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]


class DiffusersClone:
    """See `DenoiserClone`."""

    parameters: Sequence[Tensor]
    blocks: Sequence[nn.Module]

    def __init__(self, denoiser: UNetDenoiser, plan: TunePlan) -> None:
        learning_need(denoiser.unet, plan).check(denoiser.device, "a copy of the model that learns")
        self._learner: Any = Learner(denoiser.unet, plan, layer_name)
        self.denoiser: Any = _with_unet(denoiser, self._learner.network)
        self.parameters = self._learner.parameters
        self.blocks = network_blocks(self._learner.network)

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
    unet = copied(denoiser.unet, denoiser.dtype)
    apply_changes(unet, changes, layer_name)
    return _with_unet(denoiser, unet)


def _with_unet(denoiser: D, unet: nn.Module) -> D:
    return replace(denoiser, unet=unet, _fingerprint=None)  # type: ignore[type-var]  # it is a dataclass
