"""ComfyUI's memory management, progress bar and previews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...pipelines.core.progress import Progress
from ...pipelines.evaluation.drawing import curve, to_pil
from .page import LiveLearning

CURVE_SIZE = 512  # largest side of a preview on the page, in pixels
RESERVE = 1.5  # free memory that ComfyUI wants for a batch, as a multiple of its estimate


class _Tensor(torch.nn.Module):
    """One tensor as a module, because ComfyUI's memory manager counts parameters."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.device: torch.device | None = None  # set by ModelPatcher
        self.tensor = torch.nn.Parameter(tensor.detach(), requires_grad=False)


class Evictable:
    """A tensor on the accelerator that ComfyUI may move to main memory when it needs room."""

    def __init__(self, tensor: Tensor) -> None:
        offload = management.unet_offload_device()
        self.device = tensor.device
        self.patcher = comfy.model_patcher.ModelPatcher(_Tensor(tensor), self.device, offload)
        # Tells the manager that the memory is taken; the tensor is there already and does not move.
        management.load_models_gpu([self.patcher], force_full_load=True)

    def get(self) -> Tensor:
        """The tensor on its accelerator; a copy there if it was evicted.

        It does not load through the manager: a latent is read while a model is open, and loading might evict the model.
        """
        return self.patcher.model.tensor.data.to(self.device)


def native_batch_that_fits(model: Any, shape: Sequence[int]) -> int:
    """See `batch_that_fits`: from ComfyUI's own estimate, with the reserve that its sampler leaves.

    Ask it after the weights are loaded, because it counts the memory that is free at that moment.
    """
    one_latent = model.memory_required([1, *shape[1:]])
    return max(1, int(management.get_free_memory(model.load_device) / (RESERVE * one_latent)))


def native_progress(total: int, model: Any | None) -> Progress:
    """See `progress_bar`."""
    return NativeProgress(total, _previewer(model))


class NativeProgress:
    """The node's progress bar. Its preview is the latent, or the loss curve of an optimisation (`LossProgress`).

    The page may end an optimisation (`StoppableProgress`).
    """

    refresh = 0.5  # seconds between two curves

    def __init__(self, total: int, previewer: Any | None) -> None:
        self._bar, self._previewer = comfy.utils.ProgressBar(total), previewer
        self._live = LiveLearning()
        self._curve: Any | None = None

    def __call__(self, done: int, total: int, preview: Tensor | None = None) -> None:
        management.throw_exception_if_processing_interrupted()
        image, self._curve = self._curve, None
        if self._previewer is not None and preview is not None:
            with torch.inference_mode():  # an optimisation reports with gradients on
                image = self._previewer.decode_latent_to_preview_image("JPEG", preview)
        self._bar.update_absolute(done, total, image)
        self._live.step(done, total)

    def losses(self, values: Sequence[float]) -> None:
        """See `LossProgress.losses`; the curve is shown with the next step."""
        self._curve = ("JPEG", to_pil(curve(values, "loss")[0]), CURVE_SIZE)
        self._live.losses(values)

    def stop_requested(self) -> bool:
        """See `StoppableProgress.stop_requested`."""
        return self._live.stop_requested()

    def proceed(self) -> None:
        """See `StoppableProgress.proceed`."""
        self._live.proceed()


def _previewer(model: Any | None) -> Any | None:
    if model is None:
        return None
    import latent_preview

    return latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))


class ManagedRanker:
    """A `Ranker` and `ImageEncoder` whose weights ComfyUI moves to the accelerator for a call and may evict afterwards."""

    def __init__(self, ranker: Any) -> None:
        self._ranker = ranker
        device, offload = management.get_torch_device(), management.unet_offload_device()
        self._patcher = comfy.model_patcher.ModelPatcher(ranker.model, device, offload)

    @property
    def device(self) -> torch.device:
        return self._patcher.load_device

    def embed_images(self, images: Tensor) -> Tensor:
        management.load_models_gpu([self._patcher], force_full_load=True)
        return self._ranker.embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        management.load_models_gpu([self._patcher], force_full_load=True)
        return self._ranker.embed_texts(texts)

    def image_tokens(self, images: Tensor) -> Tensor:
        management.load_models_gpu([self._patcher], force_full_load=True)
        return self._ranker.image_tokens(images)


class NativeVision:
    """A CLIP_VISION as an `ImageEncoder`: every token after the last norm, without the projection."""

    def __init__(self, vision: Any) -> None:
        self._vision = vision

    def image_tokens(self, images: Tensor) -> Tensor:
        """See `ImageEncoder.image_tokens`."""
        hidden = self._vision.encode_image(images)["last_hidden_state"]
        tower = getattr(self._vision.model, "vision_model", None)
        if tower is None or getattr(tower, "output_layernorm", False):
            return hidden.float()  # DINOv2 and SigLIP normalise them already
        with torch.inference_mode():
            return tower.post_layernorm(hidden.to(self._vision.load_device)).float()
