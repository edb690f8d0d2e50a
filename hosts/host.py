"""The host behind the nodes: MODEL, CLIP, VAE and CONDITIONING as the protocols of `pipelines/core/protocols.py`.

In ComfyUI the sockets hold native objects, which the `_host_*` modules adapt (they alone import `comfy`, and only when
a native object arrives). Without ComfyUI they hold the `Headless*` objects of `_host_base`, which carry protocol objects.
Nothing here changes what a socket holds: what must be patched or tuned is cloned first.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pipelines.attention.pair_sampling import PairPlan
from ..pipelines.core.errors import EditError, ParameterError
from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.masks import MaskSchedule
from ..pipelines.core.progress import Progress
from ..pipelines.core.protocols import Context, Denoiser, ImageEncoder, LatentCodec, TextEncoder, TunableDenoiser
from ..pipelines.inversion.negative_embeddings import Embeddings
from ..pipelines.layerdiffusion.embeddings import IterativeGuidance
from . import latent as _latent
from .embeddings import (
    embeddings_in,
    embeddings_out,
    learned_in,
    negative_in,
    opened_for,
    prompts_to_open,
    value_embeddings_in,
    value_embeddings_rest,
)
from .files import (
    embedding_files,
    embedding_name,
    embedding_path,
    new_embedding_path,
    new_lora_path,
    set_headless_output,
)
from .latent import DeviceLatent, finished_out, latent_in, latent_out, reordered, samples, to_host, unnoised_samples
from .loading import (
    diffusers_folders,
    load_bundled,
    load_bundled_ranker,
    load_diffusers_folder,
    load_ranker_file,
    ranker_files,
)
from .sockets import (
    Blend,
    HeadlessClip,
    HeadlessGuider,
    HeadlessModel,
    HeadlessVae,
    conditioning,
    context,
    held,
    in_comfyui,
    intermediate_device,
)
from .trajectory import trajectory_in, trajectory_out, trajectory_rest

__all__ = [
    "Blend",
    "DeviceLatent",
    "HeadlessClip",
    "HeadlessGuider",
    "HeadlessModel",
    "HeadlessVae",
    "batch_that_fits",
    "blended_model",
    "codec",
    "conditioning",
    "context",
    "diffusers_folders",
    "embedding_files",
    "embedding_name",
    "embedding_path",
    "embeddings_guider",
    "embeddings_in",
    "embeddings_out",
    "finished_out",
    "held",
    "image_encoder",
    "image_size",
    "in_comfyui",
    "intermediate_device",
    "iterative_guider",
    "latent_grid",
    "latent_in",
    "latent_out",
    "learned_in",
    "levels",
    "load_bundled",
    "load_bundled_ranker",
    "load_diffusers_folder",
    "load_ranker_file",
    "native_bundled",
    "negative_in",
    "new_embedding_path",
    "new_lora_path",
    "open_denoiser",
    "opened_for",
    "paired_model",
    "progress",
    "prompts_to_open",
    "ranker_files",
    "reordered",
    "samples",
    "set_headless_output",
    "set_headless_progress",
    "text_encoder",
    "to_host",
    "trajectory_in",
    "trajectory_out",
    "trajectory_rest",
    "tunable",
    "tuned_model",
    "unnoised_samples",
    "vae_of",
    "value_embeddings_in",
    "value_embeddings_rest",
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
    from .comfyui.model_sampling import NativeModelSampling

    return NativeModelSampling(model)


@contextmanager
def open_denoiser(
    model: Any,
    batch_shape: Sequence[int],
    contexts: Sequence[Context],
    *,
    sigmas: Tensor | None = None,
    learning: bool = False,
) -> Iterator[Denoiser]:
    """A MODEL made ready to predict: loaded, its hooks, LoRAs and ControlNets in force, cleaned up at the end.

    Args:
        batch_shape: latent shape [B, C, h, w] of the largest batch to come (for the memory estimate).
        contexts: every prompt to come. Others may follow only if they derive from these (`with_tokens`) or carry no
            hooks and no ControlNet.
        sigmas: the grid of the run; hooks that act on a part of the steps need it.
        learning: gradients may pass through the model (never to its weights); the memory that takes is made free first.
    Raises: FamilyError for a model that cannot edit still images; ParameterError for one whose patches (blending, an
        attention edit) only a native sampler brings about.
    """
    if hasattr(model, "editkit_denoiser"):
        _refuse_pairs(getattr(model, "editkit_pairs", None) is not None)
        _refuse_blend(getattr(model, "editkit_blend", None) is not None)
        yield model.editkit_denoiser
        return
    _require_native(model, "model")
    from .comfyui.blend_patch import blends
    from .comfyui.denoiser import native_denoiser
    from .comfyui.pair_patch import has_attention_edit

    _refuse_pairs(has_attention_edit(model))
    _refuse_blend(blends(model))
    with native_denoiser(model, tuple(batch_shape), list(contexts), sigmas, learning) as denoiser:
        yield denoiser


def _refuse_pairs(patched: bool) -> None:
    if patched:
        raise ParameterError(
            "this MODEL has an attention edit, which acts in native samplers (KSampler, SamplerCustomAdvanced): for a node "
            "of EditKit connect the MODEL from before it"
        )


def _refuse_blend(patched: bool) -> None:
    if patched:
        raise ParameterError(
            "this MODEL is blended, which acts in native samplers (KSampler, SamplerCustomAdvanced): for a node of EditKit "
            "connect the MODEL from before 'Blended model'"
        )


def batch_that_fits(model: Any, shape: Sequence[int]) -> int | None:
    """How many latents of `shape` [B, C, h, w] one call of an opened MODEL should have at most; None = it does not say."""
    if hasattr(model, "editkit_denoiser"):
        return None
    from .comfyui.memory import batch_that_fits as native

    return native(model, shape)


def codec(vae: Any) -> LatentCodec:
    """A VAE as a LatentCodec. Raises FamilyError for one that is not of still images."""
    if hasattr(vae, "editkit_codec"):
        return vae.editkit_codec
    _require_native(vae, "vae")
    from .comfyui.vae import NativeCodec

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
    from .comfyui.text_encoder import NativeTextEncoder

    return NativeTextEncoder(clip)


def image_encoder(value: Any, socket: str = "image_encoder") -> ImageEncoder:
    """A CLIP_VISION, or a ranker's image tower, as an ImageEncoder. Raises EditError for something else."""
    if isinstance(value, ImageEncoder):
        return value
    if not hasattr(value, "encode_image"):
        raise EditError(f"{socket} is a {type(value).__name__}: connect 'Load CLIP Vision' or 'Load ranker'")
    _require_native(value, socket)
    from .comfyui.memory import NativeVision

    return NativeVision(value)


_headless_progress: Progress | None = None


def set_headless_progress(callback: Progress | None) -> None:
    """Where progress goes without ComfyUI: `callback(done, total, preview)`, may raise to cancel; None = the log."""
    global _headless_progress
    _headless_progress = callback


def progress(total: int, model: Any = None) -> Progress:
    """A `Progress` of `total` steps that shows itself on the node, previews where `model` can, and raises on cancel."""
    if in_comfyui():
        from .comfyui.memory import native_progress

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
    from .comfyui.blend_patch import native_blended_model

    return native_blended_model(model, schedule, source, sigmas)


def paired_model(model: Any, plan: PairPlan) -> Any:
    """A clone of MODEL under which any sampler edits pairs of latents (source, target) as `plan` says."""
    if hasattr(model, "editkit_denoiser"):
        if model.editkit_pairs is not None:
            raise ParameterError(
                "this MODEL already has an attention edit: connect the MODEL from before the first one"
            )
        return replace(model, editkit_pairs=plan)
    _require_native(model, "model")
    from .comfyui.pair_patch import native_paired_model

    return native_paired_model(model, plan)


def embeddings_guider(model: Any, positive: Context, embeddings: Embeddings, scale: float) -> Any:
    """A GUIDER whose negative is the embedding of the step in force. Raises MismatchError for another model's."""
    embeddings.check(levels(model))
    if hasattr(model, "editkit_denoiser"):
        return HeadlessGuider(model, EditPrompts(positive, embeddings, scale))
    from .comfyui.guiders import EmbeddingsGuider

    return EmbeddingsGuider(model, positive, embeddings, scale)


def iterative_guider(model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> Any:
    """A GUIDER whose positive alternates from step to step. Raises ParameterError for a MODEL with an attention edit."""
    if hasattr(model, "editkit_denoiser"):
        _refuse_pairs(getattr(model, "editkit_pairs", None) is not None)
        return HeadlessGuider(model, EditPrompts(guidance, negative, scale))
    _require_native(model, "model")
    from .comfyui.iterative_guider import IterativeGuider
    from .comfyui.pair_patch import has_attention_edit

    _refuse_pairs(has_attention_edit(model))
    return IterativeGuider(model, guidance, negative, scale)


def tunable(model: Any, contexts: Sequence[Context]) -> TunableDenoiser:
    """A MODEL whose copies may learn; `contexts` are the prompts that they will see. The MODEL itself is not changed."""
    if hasattr(model, "editkit_denoiser"):
        return model.editkit_denoiser
    _require_native(model, "model")
    from .comfyui.finetune import NativeTunable

    return NativeTunable(model, contexts)  # type: ignore[return-value]  # it predicts through its copies only


def tuned_model(model: Any, changes: Mapping[str, Tensor]) -> Any:
    """A clone of MODEL with learned weights (`weights.py`) as patches. Raises MismatchError for another model's."""
    if hasattr(model, "editkit_denoiser"):
        return replace(model, editkit_denoiser=model.editkit_denoiser.with_changes(changes))
    _require_native(model, "model")
    from .comfyui.finetune import native_tuned_model

    return native_tuned_model(model, changes)


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
    from .comfyui.bundled import build

    return build(Path(folder))


def latent_grid(mask: Tensor, latent: Mapping[str, Any] | None, vae: Any) -> tuple[int, int, int | None]:
    """See `_latent.latent_grid`."""
    return _latent.latent_grid(mask, latent, None if vae is None else codec(vae))


def image_size(latent: Mapping[str, Any], vae: Any) -> tuple[int, int, int]:
    """See `_latent.picture_size`."""
    return _latent.image_size(latent, None if vae is None else codec(vae))
