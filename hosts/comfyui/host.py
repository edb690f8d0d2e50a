"""ComfyUI as a `Host`: every method hands over to the module that adapts that kind of object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import comfy.diffusers_load
import comfy.model_management as management
import folder_paths
import torch
from torch import Tensor

from ...pipelines.attention.pair_sampling import PairPlan
from ...pipelines.core.masks import MaskSchedule
from ...pipelines.core.progress import Progress
from ...pipelines.core.protocols import Context, Denoiser, ImageEncoder, LatentCodec, TextEncoder, TunableDenoiser
from ...pipelines.inversion.negative_embeddings import Embeddings
from ...pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from ..bundled import tiny_folder
from ..sockets import HeadlessVae, refuse_patched
from .blend_patch import blends, native_blended_model
from .bundled import build_bundled
from .denoiser import native_denoiser
from .finetune import NativeTunable, native_tuned_model
from .guiders import EmbeddingsGuider, IterativeGuider
from .memory import Evictable, ManagedRanker, NativeVision, native_batch_that_fits, native_progress
from .model_sampling import NativeModelSampling
from .pair_patch import has_attention_edit, native_paired_model
from .text_encoder import NativeTextEncoder
from .vae import NativeCodec


class ComfyUIHost:
    """See `Host`."""

    def sampling(self, model: Any) -> NativeModelSampling:
        return NativeModelSampling(model)

    def open_denoiser(
        self, model: Any, batch_shape: Sequence[int], contexts: Sequence[Context], sigmas: Tensor | None, learning: bool
    ) -> AbstractContextManager[Denoiser]:
        """See `host.open_denoiser`."""
        refuse_patched(blended=blends(model), paired=has_attention_edit(model))
        return native_denoiser(model, tuple(batch_shape), list(contexts), sigmas, learning)

    def batch_that_fits(self, model: Any, shape: Sequence[int]) -> int:
        return native_batch_that_fits(model, shape)

    def tunable(self, model: Any, contexts: Sequence[Context]) -> TunableDenoiser:
        return NativeTunable(model, contexts)  # type: ignore[return-value]  # it predicts through its copies only

    def tuned_model(self, model: Any, changes: Mapping[str, Tensor]) -> Any:
        return native_tuned_model(model, changes)

    def blended_model(self, model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
        """See `host.blended_model`."""
        return native_blended_model(model, schedule, source, sigmas)

    def paired_model(self, model: Any, plan: PairPlan) -> Any:
        return native_paired_model(model, plan)

    def embeddings_guider(self, model: Any, positive: Context, embeddings: Embeddings, scale: float) -> Any:
        """See `host.embeddings_guider`."""
        return EmbeddingsGuider(model, positive, embeddings, scale)

    def iterative_guider(self, model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> Any:
        """See `host.iterative_guider`."""
        refuse_patched(blended=False, paired=has_attention_edit(model))
        return IterativeGuider(model, guidance, negative, scale)

    def codec(self, vae: Any) -> NativeCodec:
        return NativeCodec(vae)

    def vae(self, codec: LatentCodec) -> Any:
        """A headless codec stays a headless VAE."""
        return codec.vae if isinstance(codec, NativeCodec) else HeadlessVae(codec)

    def text_encoder(self, clip: Any) -> TextEncoder:
        return NativeTextEncoder(clip)

    def image_encoder(self, vision: Any) -> ImageEncoder:
        return NativeVision(vision)

    def progress(self, total: int, model: Any) -> Progress:
        return native_progress(total, model)

    def intermediate_device(self) -> torch.device:
        return management.intermediate_device()

    def keep_on_device(self, tensor: Tensor) -> Callable[[], Tensor]:
        return (lambda: tensor) if tensor.device.type == "cpu" else Evictable(tensor).get

    def output_folder(self) -> Path:
        return Path(folder_paths.get_output_directory())

    def model_folders(self, kind: str) -> list[Path]:
        """The folders that are registered for this kind, and models/`kind` itself."""
        known = folder_paths.folder_names_and_paths
        registered = known[kind][0] if kind in known else []
        roots = [Path(root) for root in [*registered, Path(folder_paths.models_dir) / kind]]
        return [root for root in dict.fromkeys(roots) if root.is_dir()]

    def load_bundled(self) -> tuple[Any, Any, Any]:
        return build_bundled(tiny_folder())

    def load_diffusers_folder(self, folder: Path) -> tuple[Any, Any, Any]:
        embeddings = folder_paths.get_folder_paths("embeddings")
        return comfy.diffusers_load.load_diffusers(
            str(folder), output_vae=True, output_clip=True, embedding_directory=embeddings
        )

    def managed_ranker(self, ranker: Any) -> ManagedRanker:
        return ManagedRanker(ranker)
