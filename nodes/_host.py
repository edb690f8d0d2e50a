"""The host behind the nodes: MODEL, CLIP, VAE and CONDITIONING as the protocols of `pipelines/protocols.py`.

In ComfyUI the sockets hold native objects, which the `_host_*` modules adapt (they alone import `comfy`, and only when
a native object arrives). Without ComfyUI they hold the `Headless*` objects of `_host_base`, which carry protocol objects.
Nothing here changes what a socket holds: what must be patched or tuned is cloned first.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipelines.errors import EditError, ParameterError
from ..pipelines.masks import MaskSchedule
from ..pipelines.progress import Progress
from ..pipelines.protocols import Context, Denoiser, LatentCodec, TextEncoder
from . import _latent
from ._host_base import (
    Blend,
    HeadlessClip,
    HeadlessModel,
    HeadlessVae,
    conditioning,
    context,
    held,
    in_comfyui,
    intermediate_device,
)
from ._host_load import (
    diffusers_folders,
    load_bundled,
    load_bundled_ranker,
    load_diffusers_folder,
    load_ranker_file,
    ranker_files,
)
from ._latent import DeviceLatent, finished_out, latent_in, latent_out, reordered, samples, to_host

__all__ = [
    "Blend",
    "DeviceLatent",
    "HeadlessClip",
    "HeadlessModel",
    "HeadlessVae",
    "blended_model",
    "codec",
    "conditioning",
    "context",
    "diffusers_folders",
    "finished_out",
    "held",
    "in_comfyui",
    "intermediate_device",
    "latent_grid",
    "latent_in",
    "latent_out",
    "levels",
    "load_bundled",
    "load_bundled_ranker",
    "load_diffusers_folder",
    "load_ranker_file",
    "native_bundled",
    "open_denoiser",
    "progress",
    "ranker_files",
    "reordered",
    "samples",
    "set_headless_progress",
    "text_encoder",
    "to_host",
    "vae_of",
]

log = logging.getLogger("editkit")


def _require_native(value: Any, socket: str) -> None:
    if value is None:
        raise EditError(f"{socket} is empty: the loader before it has none to give; connect another loader")
    if not in_comfyui():
        raise EditError(
            f"{socket} holds a {type(value).__name__}, which only ComfyUI can run: use EditKit's own loader here"
        )


def levels(model: Any) -> Any:
    """A MODEL's noise levels, scales and names without its weights: a `Denoiser` that lacks `denoise` and `combine`.

    For steps that evaluate nothing (a sigma grid, a noised latent): no memory is taken and no weights are moved.
    """
    if hasattr(model, "editkit_denoiser"):
        return model.editkit_denoiser
    _require_native(model, "model")
    from ._host_levels import NativeLevels

    return NativeLevels(model)


@contextmanager
def open_denoiser(
    model: Any, batch_shape: Sequence[int], contexts: Sequence[Context], *, sigmas: Tensor | None = None
) -> Iterator[Denoiser]:
    """A MODEL made ready to predict: loaded, its hooks, LoRAs and ControlNets in force, cleaned up at the end.

    Args:
        batch_shape: latent shape [B, C, h, w] of the largest batch to come (for the memory estimate).
        contexts: every prompt to come. Others may follow only if they derive from these (`with_tokens`) or carry no
            hooks and no ControlNet.
        sigmas: the grid of the run; hooks that act on a part of the steps need it.
    Raises: FamilyError for a model that cannot edit still images.
    """
    if hasattr(model, "editkit_denoiser"):
        yield model.editkit_denoiser
        return
    _require_native(model, "model")
    from ._host_model import native_denoiser

    with native_denoiser(model, tuple(batch_shape), list(contexts), sigmas) as denoiser:
        yield denoiser


def codec(vae: Any) -> LatentCodec:
    """A VAE as a LatentCodec. Raises FamilyError for one that is not of still images."""
    if hasattr(vae, "editkit_codec"):
        return vae.editkit_codec
    _require_native(vae, "vae")
    from ._host_vae import NativeCodec

    return NativeCodec(vae)


def vae_of(codec: LatentCodec) -> Any:
    """The VAE to put on a socket for `codec` (for one that `DecoderClone.finish` made: the patched copy)."""
    native = getattr(codec, "vae", None)
    return HeadlessVae(codec) if native is None or not in_comfyui() else native


def text_encoder(clip: Any) -> TextEncoder:
    """A CLIP as a TextEncoder."""
    if hasattr(clip, "editkit_text"):
        return clip.editkit_text
    _require_native(clip, "clip")
    from ._host_text import NativeTextEncoder

    return NativeTextEncoder(clip)


_headless_progress: Progress | None = None


def set_headless_progress(callback: Progress | None) -> None:
    """Where progress goes without ComfyUI: `callback(done, total, preview)`, may raise to cancel; None = the log."""
    global _headless_progress
    _headless_progress = callback


def progress(total: int, model: Any = None) -> Progress:
    """A `Progress` of `total` steps that shows itself on the node, previews where `model` can, and raises on cancel."""
    if in_comfyui():
        from ._host_memory import native_progress

        return native_progress(total, None if hasattr(model, "editkit_denoiser") else model)
    return _headless_progress or _log_progress


def _log_progress(done: int, total: int, preview: Tensor | None = None) -> None:
    log.debug("step %d of %d", done, total)


def blended_model(model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
    """A clone of MODEL under which any sampler edits inside the schedule's masks only and leaves the source outside.

    Args:
        source: unscaled latent [B or 1, C, h, w]; None takes the latent that the sampler is given.
        sigmas: grid [N + 1] on which the schedule's steps are counted; None takes the sampler's own.
    """
    if hasattr(model, "editkit_denoiser"):
        return _with_blend(model, Blend(schedule, source, sigmas))
    _require_native(model, "model")
    from ._host_blend import native_blended_model

    return native_blended_model(model, schedule, source, sigmas)


def _with_blend(model: Any, blend: Blend) -> Any:
    if getattr(model, "editkit_blend", None) is not None:
        raise ParameterError("this MODEL already blends: connect the MODEL from before the first blending node")
    clone = copy.copy(model)
    object.__setattr__(clone, "editkit_blend", blend)
    return clone


def native_bundled(folder: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the bundled model, built natively from a folder in diffusers layout."""
    if not in_comfyui():
        raise EditError("the native model can only be built inside ComfyUI: use the headless loader here")
    from ._host_native import build

    return build(Path(folder))


def latent_grid(mask: Tensor, latent: Mapping[str, Any] | None, vae: Any) -> tuple[int, int, int | None]:
    """See `_latent.latent_grid`."""
    return _latent.latent_grid(mask, latent, None if vae is None else codec(vae))
