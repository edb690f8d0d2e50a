"""Gradients through a native MODEL, to an embedding that an edit learns and never to the MODEL's weights.

ComfyUI loads weights in inference mode, and autograd refuses to save such tensors. The weights are not copied: during a
run, every weight is replaced by another view of the same memory, which autograd may save.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import comfy.ldm.flux.math as math
import comfy.ldm.modules.attention as attention
import comfy.model_management as management
import torch
from torch import Tensor, nn

from ...pipelines.core.errors import FamilyError

# Memory of a backward pass, in ComfyUI's estimates of one model call: measured 9 (SD 1.5, 512 px) to 19 (SDXL, 1024 px).
LEARNING_MEMORY = 20
OVERWRITE = {"Flux": "Flux", "HunyuanVideo": "HunyuanImage"}  # ComfyUI's networks by family
NO_GRADIENTS = ("attention_sage", "attention_flash")
LAYERS = ("ResBlock", "SpatialTransformer")  # a U-Net calls its blocks layer by layer, never as a whole


def refuse_learning(model: Any) -> None:
    """Raise FamilyError for a MODEL whose network a backward pass cannot cross.

    Some networks overwrite activations that it needs; newer versions of ComfyUI rotate queries and keys by their
    positions with an operator of another library that has no backward pass.
    """
    network = model.model.diffusion_model
    kinds = {kind.__name__ for kind in type(network).__mro__}
    family = next((family for kind, family in OVERWRITE.items() if kind in kinds), None)
    if family is not None:
        reason = f"({family}), whose network ComfyUI computes in place"
    elif not rotation_has_gradients() and rotates(network):
        reason = "whose positions this ComfyUI computes with an operator without gradients"
    else:
        return
    raise FamilyError(
        f"model is a {type(model.model).__name__} {reason}, so nothing can learn through it: connect an SD 1.x, SD 2.x, "
        "SDXL or SD3 model"
    )


@cache
def rotation_has_gradients() -> bool:
    """Whether a backward pass crosses ComfyUI's rotary position embedding."""
    with torch.inference_mode(False), torch.enable_grad():
        q = torch.ones(1, 1, 1, 2, requires_grad=True)
        try:
            torch.stack(math.apply_rope(q, q, torch.ones(1, 1, 1, 1, 2, 2))).sum().backward()
        except RuntimeError:
            return False
    return q.grad is not None


def rotates(network: nn.Module) -> bool:
    """Whether a module that defines a part of `network` uses ComfyUI's shared rotary position embedding."""
    shared = [vars(math)[name] for name in ("apply_rope", "apply_rope1", "attention") if name in vars(math)]
    modules = {type(part).__module__ for part in network.modules()}
    used = [value for module in modules for value in vars(sys.modules[module]).values()]
    return any(value is function for value in used for function in shared)


def reserve(model: Any, shape: Sequence[int]) -> None:
    """Load all of a MODEL and make room for a backward pass of latents `shape` [B, C, h, w].

    All of it is loaded, because the backward pass would keep weights that are moved over for one call anyway.
    """
    need = LEARNING_MEMORY * model.memory_required(list(shape))
    management.load_models_gpu([model], memory_required=need, force_full_load=True)


@contextmanager
def learnable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, autograd may save every weight of `modules`, and no weight asks for a gradient.

    Afterwards the same tensors are back. Weights that ComfyUI replaced meanwhile stay as it left them.
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
    """Weights and buffers of `part` itself that autograd could not save, or would compute gradients of.

    Packed formats of other packs are left alone, because they unpack into ordinary tensors at every call.
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
    """The same memory as a frozen tensor outside inference mode."""
    with torch.inference_mode(False):
        view = torch.empty(0, dtype=value.dtype, device=value.device)
        view.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
        return nn.Parameter(view, requires_grad=False) if isinstance(value, nn.Parameter) else view


def differentiable_attention(options: dict) -> None:
    """Make a run with `options` use PyTorch's attention if ComfyUI was started with an attention without gradients."""
    without = {getattr(getattr(attention, name, None), "__wrapped__", None) for name in NO_GRADIENTS}

    def override(function: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        return (attention.attention_pytorch if function in without else function)(*args, **named)

    options.setdefault("transformer_options", {}).setdefault("optimized_attention_override", override)


def network_blocks(network: Any) -> list[nn.Module]:
    """The parts for gradient checkpointing (`optimise.recomputing`): a U-Net's layers, a transformer's blocks."""
    unet: list[Any] = [getattr(network, name, None) for name in ("input_blocks", "middle_block", "output_blocks")]
    if all(part is not None for part in unet):
        lists: list[Any] = [block for part in unet for block in (part if isinstance(part, nn.ModuleList) else [part])]
        return [layer for block in lists for layer in block if type(layer).__name__ in LAYERS]
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
