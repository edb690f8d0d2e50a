"""A native MODEL through which gradients may pass, to what an edit learns and never to its weights.

The host loads weights under inference mode, and autograd refuses to save such tensors. They get no copies here: for the
length of a run, every weight is replaced by another view of the same memory that autograd may save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_management as management
import torch
from torch import Tensor, nn

# in host's estimates of one evaluation; what a backward pass keeps is 9 (SD 1.5, 512 px) to 19 of them (SDXL, 1024 px)
LEARNING_MEMORY = 20
NO_GRADIENTS = ("attention_sage", "attention_flash")
LAYERS = ("ResBlock", "SpatialTransformer")  # of a U-Net; its blocks are called layer by layer, never as a whole


def reserve(model: Any, shape: Sequence[int]) -> None:
    """Load all of a MODEL and make room for a backward pass of latents `shape` [B, C, h, w].

    All of it, because weights that are brought over for one call would be kept for the backward pass anyway.
    """
    need = LEARNING_MEMORY * model.memory_required(list(shape))
    management.load_models_gpu([model], memory_required=need, force_full_load=True)


@contextmanager
def learnable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, autograd may save every weight of `modules` and asks no gradient of any. Afterwards the very same
    tensors are back; weights that the host itself replaced meanwhile stay as it left them.
    """
    swapped: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    stand_ins: dict[int, Tensor] = {}  # shared weights stay shared
    try:
        for part in (part for module in modules for part in module.modules()):
            for name, value in _own_tensors(part):
                stand_in = stand_ins.setdefault(id(value), _view(value))
                swapped.append((part, name, value, stand_in))
                setattr(part, name, stand_in)
        yield
    finally:
        for part, name, value, stand_in in reversed(swapped):
            if getattr(part, name, None) is stand_in:
                setattr(part, name, value)


def _own_tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights and buffers of `part` itself that autograd could not save, or would ask gradients of.

    Packed formats of other packs are left alone: they unpack into ordinary tensors at every call.
    """
    own = [
        *part.named_parameters(recurse=False, remove_duplicate=False),
        *part.named_buffers(recurse=False, remove_duplicate=False),
    ]
    plain = [(name, value) for name, value in own if type(value) in (Tensor, nn.Parameter)]
    return [
        (name, value)
        for name, value in plain
        if value.layout is torch.strided and (value.is_inference() or value.requires_grad)
    ]


def _view(value: Tensor) -> Tensor:
    """The same memory as a frozen tensor that is none of inference mode's."""
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=value.dtype, device=value.device)
        view.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
        return nn.Parameter(view, requires_grad=False) if isinstance(value, nn.Parameter) else view


def differentiable_attention(options: dict) -> None:
    """Let a run with `options` use PyTorch's attention where the host was started with one that has no gradients."""
    without = {getattr(getattr(attention, name, None), "__wrapped__", None) for name in NO_GRADIENTS}

    def override(function: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        return (attention.attention_pytorch if function in without else function)(*args, **named)

    options.setdefault("transformer_options", {}).setdefault("optimized_attention_override", override)


def network_blocks(network: Any) -> list[nn.Module]:
    """What may run again in the backward pass (`optimise.recomputing`): a U-Net's layers, a transformer's blocks."""
    unet: list[Any] = [getattr(network, name, None) for name in ("input_blocks", "middle_block", "output_blocks")]
    if all(part is not None for part in unet):
        lists: list[Any] = [block for part in unet for block in (part if isinstance(part, nn.ModuleList) else [part])]
        return [layer for block in lists for layer in block if type(layer).__name__ in LAYERS]
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
