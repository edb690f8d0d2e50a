"""ComfyUI as a `Host`: every method hands over to the module that adapts that kind of object.

A method imports its adapter itself, so that a change of ComfyUI that breaks one adapter leaves the other nodes working.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import folder_paths
import torch
from torch import Tensor

from ...pipelines.attention.pair_sampling import PairPlan
from ...pipelines.core.errors import LoadError
from ...pipelines.core.masks import MaskSchedule
from ...pipelines.core.progress import Progress
from ...pipelines.core.protocols import Context, Denoiser, ImageEncoder, LatentCodec, TextEncoder, TunableDenoiser
from ...pipelines.inversion.negative_embeddings import Embeddings
from ...pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from ..bundled import BUNDLED_FLOW, flow_folder, tiny_folder
from ..sockets import HeadlessVae, refuse_patched
from .patch_keys import blends, has_attention_edit

if TYPE_CHECKING:
    from .memory import ManagedRanker
    from .model_sampling import NativeModelSampling
    from .vae import NativeCodec


class ComfyUIHost:
    """See `Host`."""

    def sampling(self, model: Any) -> NativeModelSampling:
        from .model_sampling import NativeModelSampling

        return NativeModelSampling(model)

    def open_denoiser(
        self, model: Any, batch_shape: Sequence[int], contexts: Sequence[Context], sigmas: Tensor | None, learning: bool
    ) -> AbstractContextManager[Denoiser]:
        """See `host.open_denoiser`."""
        from .denoiser import native_denoiser

        refuse_patched(blended=blends(model), paired=has_attention_edit(model))
        return native_denoiser(model, tuple(batch_shape), list(contexts), sigmas, learning)

    def batch_that_fits(self, model: Any, shape: Sequence[int]) -> int:
        from .memory import native_batch_that_fits

        return native_batch_that_fits(model, shape)

    def tunable(self, model: Any, contexts: Sequence[Context]) -> TunableDenoiser:
        from .finetune import NativeTunable

        return NativeTunable(model, contexts)  # type: ignore[return-value]  # it predicts through its copies only

    def tuned_model(self, model: Any, changes: Mapping[str, Tensor]) -> Any:
        from .finetune import native_tuned_model

        return native_tuned_model(model, changes)

    def blended_model(self, model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
        """See `host.blended_model`."""
        from .blend_patch import native_blended_model

        return native_blended_model(model, schedule, source, sigmas)

    def paired_model(self, model: Any, plan: PairPlan) -> Any:
        from .attention.pair_patch import native_paired_model

        return native_paired_model(model, plan)

    def embeddings_guider(self, model: Any, positive: Context, embeddings: Embeddings, scale: float) -> Any:
        """See `host.embeddings_guider`."""
        from .guiders import EmbeddingsGuider

        return EmbeddingsGuider(model, positive, embeddings, scale)

    def iterative_guider(self, model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> Any:
        """See `host.iterative_guider`."""
        from .guiders import IterativeGuider

        refuse_patched(blended=False, paired=has_attention_edit(model))
        return IterativeGuider(model, guidance, negative, scale)

    def codec(self, vae: Any) -> NativeCodec:
        from .vae import NativeCodec

        return NativeCodec(vae)

    def vae(self, codec: LatentCodec) -> Any:
        """A headless codec stays a headless VAE."""
        from .vae import NativeCodec

        return codec.vae if isinstance(codec, NativeCodec) else HeadlessVae(codec)

    def text_encoder(self, clip: Any) -> TextEncoder:
        from .text_encoder import NativeTextEncoder

        return NativeTextEncoder(clip)

    def image_encoder(self, vision: Any) -> ImageEncoder:
        from .memory import NativeVision

        return NativeVision(vision)

    def progress(self, total: int, model: Any) -> Progress:
        from .memory import native_progress

        return native_progress(total, model)

    def intermediate_device(self) -> torch.device:
        return management.intermediate_device()

    def keep_on_device(self, tensor: Tensor) -> Callable[[], Tensor]:
        from .memory import Evictable

        return (lambda: tensor) if tensor.device.type == "cpu" else Evictable(tensor).get

    def output_folder(self) -> Path:
        return Path(folder_paths.get_output_directory())

    def model_folders(self, kind: str) -> list[Path]:
        """The folders that are registered for this kind, and models/`kind` itself."""
        known = folder_paths.folder_names_and_paths
        registered = known[kind][0] if kind in known else []
        roots = [Path(root) for root in [*registered, Path(folder_paths.models_dir) / kind]]
        return [root for root in dict.fromkeys(roots) if root.is_dir()]

    def load_bundled(self, model: str) -> tuple[Any, Any, Any]:
        if model == BUNDLED_FLOW:
            from .bundled import build_bundled_flow

            return build_bundled_flow(flow_folder(), tiny_folder())
        from .bundled import build_bundled

        return build_bundled(tiny_folder())

    def load_diffusers_folder(self, folder: Path) -> tuple[Any, Any, Any]:
        import comfy.diffusers_load

        embeddings = folder_paths.get_folder_paths("embeddings")
        return comfy.diffusers_load.load_diffusers(
            str(folder), output_vae=True, output_clip=True, embedding_directory=embeddings
        )

    def load_checkpoint(self, file: Path) -> tuple[Any, Any, Any]:
        """As *Load Checkpoint* loads it. Raises LoadError for a file without the network, the text encoder or the VAE."""
        import comfy.sd

        embeddings = folder_paths.get_folder_paths("embeddings")
        found = comfy.sd.load_checkpoint_guess_config(
            str(file), output_vae=True, output_clip=True, embedding_directory=embeddings
        )[:3]
        missing = [part for part, value in zip(("model", "text encoder", "VAE"), found, strict=True) if value is None]
        if missing:
            raise LoadError(
                f"{file.name} has no {missing[0]}: load its parts with Load Diffusion Model, Load CLIP and Load VAE"
            )
        return tuple(found)

    def managed_ranker(self, ranker: Any) -> ManagedRanker:
        from .memory import ManagedRanker

        return ManagedRanker(ranker)
