"""What the sockets hold: the headless MODEL, CLIP, VAE and GUIDER, and CONDITIONING on either host.

Inside ComfyUI the sockets hold ComfyUI's own objects. Without it they hold the `Headless*` objects below, which carry
objects that follow `pipelines/core/protocols.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..pipelines.attention.pair_sampling import PairPlan
from ..pipelines.core.errors import EditError, ParameterError
from ..pipelines.core.guidance import EQUAL_PROMPTS, EditPrompts, warn_of_equal_prompts
from ..pipelines.core.masks import MaskSchedule
from ..pipelines.core.protocols import Context, Denoiser, LatentCodec, TextEncoder
from ..pipelines.core.shapes import check_tokens


@dataclass(frozen=True)
class Blend:
    """The arguments of `blended_model`, for a headless sampler."""

    schedule: MaskSchedule
    source: Tensor | None
    sigmas: Tensor | None


@dataclass(frozen=True)
class HeadlessModel:
    """A MODEL without ComfyUI.

    Attributes:
        denoiser: the network. It may also be a `TunableDenoiser`.
        blend: set by `blended_model`.
        pairs: the attention edit, set by `paired_model`.
    """

    denoiser: Denoiser
    blend: Blend | None = None
    pairs: PairPlan | None = None


@dataclass(frozen=True)
class HeadlessClip:
    """A CLIP without ComfyUI."""

    text_encoder: TextEncoder


@dataclass(frozen=True)
class HeadlessVae:
    """A VAE without ComfyUI."""

    codec: LatentCodec


@dataclass(frozen=True)
class HeadlessGuider:
    """A GUIDER without ComfyUI, for the headless SamplerCustomAdvanced."""

    model: HeadlessModel
    prompts: EditPrompts


def refuse_patched(*, blended: bool, paired: bool) -> None:
    """Raise ParameterError for a MODEL whose patches act only in a sampler node."""
    if paired:
        raise ParameterError(
            "this MODEL has an attention edit, which acts in native samplers (KSampler, SamplerCustomAdvanced): connect "
            "the MODEL from before it to EditKit's nodes"
        )
    if blended:
        raise ParameterError(
            "this MODEL is blended, which acts in native samplers (KSampler, SamplerCustomAdvanced): connect the MODEL "
            "from before the blended model patch to EditKit's nodes"
        )


def refuse_second_edit(*, paired: bool) -> None:
    """Raise ParameterError for a MODEL that already has an attention edit."""
    if paired:
        raise ParameterError("this MODEL already has an attention edit: connect the MODEL from before the first one")


def refuse_second_blend(*, blended: bool) -> None:
    """Raise ParameterError for a MODEL that already blends."""
    if blended:
        raise ParameterError("this MODEL already blends: connect the MODEL from before the first blending node")


def context_of(conditioning: Any, socket: str) -> Context:
    """CONDITIONING as a Context; its `host` keeps the whole of it (areas, masks, ControlNets, hooks).

    Raises: EditError for an empty one, one without a text embedding, and one with NaN or infinity, naming the socket.
    """
    if not isinstance(conditioning, (list, tuple)) or not conditioning:
        raise EditError(f"{socket} is an empty CONDITIONING: connect a CLIP Text Encode node")
    for part in conditioning:
        if not (isinstance(part, (list, tuple)) and len(part) > 1 and isinstance(part[0], Tensor)):
            raise EditError(f"{socket} has no text embedding: connect a CLIP Text Encode node")
        if not isinstance(part[1], Mapping):
            raise EditError(f"{socket} has a {type(part[1]).__name__} beside its text: connect a CLIP Text Encode node")
        check_tokens(part[0], socket)
        pooled = part[1].get("pooled_output")
        if isinstance(pooled, Tensor) and not pooled.isfinite().all():
            raise EditError(f"{socket} contains NaN or infinity in its pooled text: check the CLIP that made it")
    tokens, extras = conditioning[0][0], conditioning[0][1]
    guidance = guidance_of(extras, socket)
    return Context(tokens, extras.get("pooled_output"), extras.get("editkit_text"), conditioning, socket, guidance)


def prompt_pair(source: Any, target: Any) -> tuple[Context, Context]:
    """The CONDITIONINGs of an edit by two prompts as Contexts. Warns where they are equal. Raises EditError as `context_of`."""
    pair = context_of(source, "source"), context_of(target, "target")
    warn_of_equal_prompts(*pair, EQUAL_PROMPTS)
    return pair


def guidance_of(extras: Mapping[str, Any], socket: str) -> float | None:
    """What ComfyUI's FluxGuidance wrote into a CONDITIONING. Raises ParameterError for a value that is no number."""
    value = extras.get("guidance")
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ParameterError(f"{socket} has guidance {value!r}: connect FluxGuidance with a number")
    return number


def conditioning_of(context: Context) -> list:
    """The CONDITIONING of a Context: the host's own, or a rebuilt one where the embedding was replaced.

    Raises: ParameterError where the CONDITIONING has several embeddings, so that it is not known which was replaced.
    """
    host = context.host
    if host is None:
        extras = {"pooled_output": context.pooled, "guidance": context.guidance}
        return [[context.tokens, {key: value for key, value in extras.items() if value is not None}]]
    first = host[0][1]
    known = context.guidance in (None, first.get("guidance"))
    if known and context.tokens is host[0][0] and context.pooled is first.get("pooled_output"):
        return host
    if len(host) != 1:
        raise ParameterError(
            f"the CONDITIONING has {len(host)} combined parts, one embedding of which is to change: connect one with 1"
        )
    extras = dict(host[0][1])
    if context.pooled is not None:
        extras["pooled_output"] = context.pooled
    if context.guidance is not None:
        extras["guidance"] = context.guidance
    return [[context.tokens, extras]]
