"""EditKit itself as a `Host`, without ComfyUI: the sockets hold `Headless*` objects over diffusers models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...pipelines.attention.pair_sampling import PairPlan
from ...pipelines.core.errors import EditError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.masks import MaskSchedule
from ...pipelines.core.progress import Progress
from ...pipelines.core.protocols import Context, Denoiser, ImageEncoder, LatentCodec, TextEncoder, TunableDenoiser
from ...pipelines.inversion.negative_embeddings import Embeddings
from ...pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from ..sockets import (
    Blend,
    HeadlessClip,
    HeadlessGuider,
    HeadlessModel,
    HeadlessVae,
    refuse_patched,
    refuse_second_blend,
    refuse_second_edit,
)

if TYPE_CHECKING:
    from .loading import LoadedModel

log = logging.getLogger("editkit")


def log_progress(done: int, total: int, preview: Tensor | None = None) -> None:
    """The progress of a run that nobody watches."""
    log.debug("step %d of %d", done, total)


@dataclass(frozen=True)
class HeadlessRun:
    """What the headless host needs of the run that is under way.

    Attributes:
        output_folder: where files are written.
        progress: told after every step; it may raise to cancel.
    """

    output_folder: Path = Path()
    progress: Progress = log_progress


_run: ContextVar[HeadlessRun] = ContextVar("editkit_headless_run", default=HeadlessRun())  # noqa: B039 (it is frozen)


@contextmanager
def headless_run(output_folder: Path = Path(), progress: Progress = log_progress) -> Iterator[None]:
    """Inside, nodes write to `output_folder` and report to `progress`. Runs in other threads keep their own."""
    token = _run.set(HeadlessRun(output_folder, progress))
    try:
        yield
    finally:
        _run.reset(token)


class HeadlessHost:
    """See `Host`."""

    def sampling(self, model: HeadlessModel) -> Denoiser:
        return model.denoiser

    @contextmanager
    def open_denoiser(
        self,
        model: HeadlessModel,
        batch_shape: Sequence[int],
        contexts: Sequence[Context],
        sigmas: Tensor | None,
        learning: bool,
    ) -> Iterator[Denoiser]:
        """See `host.open_denoiser`. The network is loaded already, so only the patches are checked."""
        refuse_patched(blended=model.blend is not None, paired=model.pairs is not None)
        yield model.denoiser

    def batch_that_fits(self, model: HeadlessModel, shape: Sequence[int]) -> None:
        return None

    def tunable(self, model: HeadlessModel, contexts: Sequence[Context]) -> TunableDenoiser:
        return model.denoiser  # type: ignore[return-value]  # the denoisers that this host loads can be tuned

    def tuned_model(self, model: HeadlessModel, changes: Mapping[str, Tensor]) -> HeadlessModel:
        denoiser: Any = model.denoiser
        return replace(model, denoiser=denoiser.with_changes(changes))

    def blended_model(
        self, model: HeadlessModel, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None
    ) -> HeadlessModel:
        """See `host.blended_model`."""
        refuse_second_blend(blended=model.blend is not None)
        return replace(model, blend=Blend(schedule, source, sigmas))

    def paired_model(self, model: HeadlessModel, plan: PairPlan) -> HeadlessModel:
        refuse_second_edit(paired=model.pairs is not None)
        return replace(model, pairs=plan)

    def embeddings_guider(
        self, model: HeadlessModel, positive: Context, embeddings: Embeddings, scale: float
    ) -> HeadlessGuider:
        """See `host.embeddings_guider`."""
        return HeadlessGuider(model, EditPrompts(positive, embeddings, scale))

    def iterative_guider(
        self, model: HeadlessModel, guidance: IterativeGuidance, negative: Context, scale: float
    ) -> HeadlessGuider:
        """See `host.iterative_guider`."""
        refuse_patched(blended=False, paired=model.pairs is not None)
        return HeadlessGuider(model, EditPrompts(guidance, negative, scale))

    def codec(self, vae: HeadlessVae) -> LatentCodec:
        return vae.codec

    def vae(self, codec: LatentCodec) -> HeadlessVae:
        return HeadlessVae(codec)

    def text_encoder(self, clip: HeadlessClip) -> TextEncoder:
        return clip.text_encoder

    def image_encoder(self, vision: Any) -> ImageEncoder:
        """There is no headless CLIP_VISION: rankers are image encoders already."""
        raise EditError(f"image_encoder is a {type(vision).__name__}: connect 'Load CLIP Ranker'")

    def progress(self, total: int, model: Any) -> Progress:
        return _run.get().progress

    def intermediate_device(self) -> torch.device:
        return torch.device("cpu")

    def keep_on_device(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def output_folder(self) -> Path:
        return _run.get().output_folder

    def model_folders(self, kind: str) -> list[Path]:
        return []

    def load_bundled(self, model: str) -> tuple[HeadlessModel, HeadlessClip, HeadlessVae]:
        from .loading import load_bundled

        return _sockets(partial(load_bundled, model=model))

    def load_diffusers_folder(self, folder: Path) -> tuple[HeadlessModel, HeadlessClip, HeadlessVae]:
        from .loading import load_model

        return _sockets(partial(load_model, folder))

    def load_checkpoint(self, file: Path) -> tuple[HeadlessModel, HeadlessClip, HeadlessVae]:
        return self.load_diffusers_folder(file)

    def managed_ranker(self, ranker: Any) -> Any:
        return ranker


def _sockets(load: Callable[[], LoadedModel]) -> tuple[HeadlessModel, HeadlessClip, HeadlessVae]:
    """Loaded outside inference mode, whatever the caller is in: autograd may save the weights."""
    with torch.inference_mode(False):
        loaded = load()
    return HeadlessModel(loaded.denoiser), HeadlessClip(loaded.text), HeadlessVae(loaded.codec)
