"""Background reconstruction by learning: the decoder, or the latent, of one edited image (BLD, section 4.2).

A VAE loses detail, so an edited image differs from its source even where nothing was edited. Fitting the decoder to
this one image brings the source back outside the mask and leaves the edit as it is, without a seam (methods.md, 3). The
alternatives that do not learn are in `composite.py` and `poisson.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import ParameterError, ShapeError
from ..core.progress import Progress, silent
from ..core.protocols import DecoderClone, LatentCodec
from ..core.shapes import check_image, check_latent, check_mask, common_batch, match_batch, padded_length, same_size
from ..evaluation.metrics import psnr_outside
from ..learning.early_stopping import Plateau
from ..learning.memory import measured
from ..learning.optimise import OptimiseResult, autocast, learning_mode, optimise, own, recomputing

BACKGROUND = 1  # index of the background in the loss terms


@dataclass(frozen=True)
class TuneSettings:
    """How to learn.

    Attributes:
        steps: Adam steps, >= 0.
        lr: Adam's step size. For a latent the published code uses 0.1; the paper says 1e-4, which moves nothing.
        background_weight: weight of the background loss against the loss inside the mask, >= 0.
        patience: stop when this many steps have improved the background loss by less than 1 %; 0 = never.
        low_memory: keep no activations inside a decoder block but compute them again: slower, about a block's memory.
        compute_dtype: of the arithmetic around the float32 weights, e.g. torch.bfloat16; None = float32.
    """

    steps: int = 75
    lr: float = 0.1
    background_weight: float = 100.0
    patience: int = 0
    low_memory: bool = False
    compute_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class DecoderSettings(TuneSettings):
    """How the decoder learns: `blocks` is "all" (as published) or the number of last blocks.

    What lies before them is computed once: several times faster, and less memory, for a little less background.
    """

    lr: float = 1e-4
    blocks: int | str = "all"


@dataclass(frozen=True)
class Tuning:
    """What learning gave.

    Attributes:
        image: IMAGE [B, H, W, 3] in [0, 1], of the source's size.
        losses: total loss before each step.
        edit_losses, background_losses: its two terms (the second with its weight).
        psnr_before, psnr_after: dB outside the mask against the source, mean of the batch; NaN for a full mask.
        steps: steps taken.    stopped: whether patience ended it.
    """

    image: Tensor
    losses: list[float]
    edit_losses: list[float]
    background_losses: list[float]
    psnr_before: float
    psnr_after: float
    steps: int
    stopped: bool


@dataclass(frozen=True)
class DecoderTuning(Tuning):
    """`codec` decodes with the learned weights and encodes as before."""

    codec: LatentCodec


@dataclass(frozen=True)
class LatentTuning(Tuning):
    """`latent` is the learned one, float32 [B, C, h, w], unscaled."""

    latent: Tensor


def tune_decoder(
    codec: LatentCodec,
    latent: Tensor,
    source: Tensor,
    edited: Tensor | None,
    mask: Tensor,
    *,
    settings: DecoderSettings | None = None,
    progress: Progress = silent,
) -> DecoderTuning:
    """Fit a copy of the decoder to the source outside the mask and to the edit inside it.

    theta* = argmin MSE(D(z) m, edited m) + weight MSE(D(z) (1 - m), source (1 - m)), means over all elements, images in
    [-1, 1] (methods.md, 3). All images of a batch share the one decoder: tune a single image for the best result.

    Args:
        latent: z [B, C, h, w] from the sampler, unscaled; its size is the source's, padded to whole cells.
        source: IMAGE [B, H, W, 3] in [0, 1]; only its own pixels count, never the padding.
        edited: IMAGE to keep inside the mask; None takes the plain decode, without clamping.
        mask: MASK at pixel resolution, 1 = edit; soft values share a pixel.
        progress: called after every step; raising there cancels, and the user's weights are as they were.
    Raises: ShapeError, ParameterError; EditError if the loss overflows, or if there is not enough memory to start.
    """
    settings = settings or DecoderSettings()
    _check(settings)
    task = _task(codec, latent, source, edited, mask)
    with learning_mode():
        clone = codec.decoder_clone()
        try:
            return _learn_decoder(clone, task, settings, progress)
        except BaseException:
            clone.release()
            raise


def tune_latent(
    codec: LatentCodec,
    latent: Tensor,
    source: Tensor,
    edited: Tensor | None,
    mask: Tensor,
    *,
    settings: TuneSettings | None = None,
    progress: Progress = silent,
) -> LatentTuning:
    """The same losses with the latent learning and the decoder fixed: over-smooth backgrounds (BLD, figure 4).

    Arguments and errors as `tune_decoder`; every image learns for itself, whatever the batch.
    """
    settings = settings or TuneSettings()
    _check(settings)
    task = _task(codec, latent, source, edited, mask)
    with learning_mode():
        clone = codec.decoder_clone()
        try:
            return _learn_latent(clone, task, settings, progress)
        finally:
            clone.release()


# ------------------------------------------------------------------------------------------------------- the task
@dataclass(frozen=True)
class _Task:
    """Checked inputs with one batch size: latent [B, C, h, w], pictures [B, 3, H, W] in [-1, 1], mask [B, 1, H, W]."""

    latent: Tensor
    source: Tensor
    edited: Tensor | None
    mask: Tensor

    def owned(self, device: torch.device) -> _Task:
        edited = None if self.edited is None else own(self.edited, device)
        return _Task(self.latent, own(self.source, device), edited, own(self.mask, device))

    def crop(self, image: Tensor) -> Tensor:
        height, width = self.mask.shape[-2:]
        return image[..., :height, :width]

    def target(self, first: Tensor) -> Tensor:
        """What the edit should stay: the given one, or the plain decode `first`."""
        return self.crop(first).float().clone() if self.edited is None else self.edited

    def terms(self, made: Tensor, target: Tensor, weight: float) -> Tensor:
        """The two losses [2] of a decoded picture."""
        made = self.crop(made).float()
        edit = ((made - target) * self.mask).square().mean()
        background = ((made - self.source) * (1 - self.mask)).square().mean()
        return torch.stack([edit, weight * background])

    def image(self, made: Tensor) -> Tensor:
        return (self.crop(made).float().movedim(1, -1) * 0.5 + 0.5).clamp(0, 1).contiguous()

    def background(self, image: Tensor) -> float:
        """Mean PSNR outside the mask over the images that have an outside."""
        source = self.source.movedim(1, -1) * 0.5 + 0.5
        return float(psnr_outside(image, source, self.mask[:, 0]).nanmean())


def _task(codec: LatentCodec, latent: Tensor, source: Tensor, edited: Tensor | None, mask: Tensor) -> _Task:
    latent = check_latent(latent, "latent", codec.channels)
    source, mask = check_image(source, "source"), check_mask(mask, "mask")
    same_size(source, mask, "source", "mask")
    sized = {"latent": latent, "source": source, "mask": mask}
    if edited is not None:
        edited = sized["edited"] = check_image(edited, "edited")
        same_size(edited, source, "edited", "source")
    batch = common_batch(**sized)
    height, width = source.shape[1:3]
    latent_pixels = (
        padded_length(height, codec.factor) // codec.factor,
        padded_length(width, codec.factor) // codec.factor,
    )
    if tuple(latent.shape[-2:]) != latent_pixels:
        raise ShapeError(
            f"latent is {latent.shape[3]} x {latent.shape[2]} cells but source, {width} x {height} pixels, needs"
            f" {latent_pixels[1]} x {latent_pixels[0]} with this VAE: encode the same picture, or resize source and mask"
        )
    return _Task(
        match_batch(latent, batch, "latent", "source"),
        _image(source, batch),
        None if edited is None else _image(edited, batch),
        match_batch(mask, batch, "mask", "source")[:, None],
    )


def _image(image: Tensor, batch: int) -> Tensor:
    return match_batch(image, batch, "image", "latent").movedim(-1, 1) * 2 - 1


def _check(settings: TuneSettings) -> None:
    if not settings.background_weight >= 0:
        raise ParameterError(f"background_weight is {settings.background_weight}: give 0 or more (100 as published)")
    if settings.patience < 0:
        raise ParameterError(f"patience is {settings.patience}: give a number of steps, or 0 for all of them")


# ------------------------------------------------------------------------------------------------------- learning
def _learn_decoder(clone: DecoderClone, task: _Task, settings: DecoderSettings, progress: Progress) -> DecoderTuning:
    split = len(clone.blocks) - _learning_blocks(settings.blocks, len(clone.blocks))
    prefix, learning = list(clone.blocks[:split]), list(clone.blocks[split:])
    weights = list(dict.fromkeys(weight for block in learning for weight in block.parameters()))
    with torch.no_grad():
        start = _run(prefix, clone.prepare(own(task.latent)))
    with recomputing(learning if settings.low_memory else ()):
        first = _first(weights, lambda: _run(learning, start), "tuning the decoder")
        task = task.owned(first.device)
        target, before = task.target(first), task.background(task.image(first))
        del first

        def loss(step: int) -> Tensor:
            with autocast(start.device, settings.compute_dtype):
                made = _run(learning, start)
            return task.terms(made, target, settings.background_weight)

        result = _optimise(weights, loss, settings, progress)
    with torch.no_grad():
        image = task.image(_run(learning, start))
    after = task.background(image)
    return DecoderTuning(image, *_report(result, 1), before, after, result.steps, result.stopped, clone.finish())


def _learn_latent(clone: DecoderClone, task: _Task, settings: TuneSettings, progress: Progress) -> LatentTuning:
    blocks = [block.requires_grad_(False) for block in clone.blocks]
    latent = own(task.latent, next(weight.device for block in blocks for weight in block.parameters()))
    with recomputing(blocks if settings.low_memory else ()):
        first = _first([latent], lambda: _run(blocks, clone.prepare(latent)), "tuning the latent")
        task = task.owned(first.device)
        target, before, batch = task.target(first), task.background(task.image(first)), len(latent)
        del first

        def loss(step: int) -> Tensor:
            start = clone.prepare(latent)
            with autocast(start.device, settings.compute_dtype):
                made = _run(blocks, start)
            return task.terms(made, target, settings.background_weight) * batch  # each latent learns as it would alone

        result = _optimise([latent], loss, settings, progress)
    with torch.no_grad():
        image = task.image(_run(blocks, clone.prepare(latent)))
    after = task.background(image)
    return LatentTuning(image, *_report(result, batch), before, after, result.steps, result.stopped, latent)


def _first(parameters: Sequence[Tensor], make: Callable[[], Tensor], what: str) -> Tensor:
    """The picture before learning; refuses to start where a step would not fit into memory."""
    with measured(parameters) as need:
        first = make().detach()
    need.check(first.device, what)
    return first


def _run(blocks: Sequence[nn.Module], value: Tensor) -> Tensor:
    for block in blocks:
        value = block(value)
    return value


def _optimise(
    parameters: Sequence[Tensor], loss: Callable[[int], Tensor], settings: TuneSettings, progress: Progress
) -> OptimiseResult:
    stop = Plateau(settings.patience, term=BACKGROUND) if settings.patience else None
    return optimise(parameters, loss, steps=settings.steps, lr=settings.lr, stop=stop, progress=progress)


def _learning_blocks(blocks: int | str, count: int) -> int:
    if blocks == "all":
        return count
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= count:
        raise ParameterError(
            f'blocks is {blocks!r}: give "all" or how many of the decoder\'s last {count} blocks learn (1 to {count})'
        )
    return blocks


def _report(result: OptimiseResult, batch: int) -> tuple[list[float], list[float], list[float]]:
    """Total, edit and background losses, as the mean of the batch."""
    edit, background = ([terms[i] / batch for terms in result.terms] for i in (0, BACKGROUND))
    return [loss / batch for loss in result.losses], edit, background
