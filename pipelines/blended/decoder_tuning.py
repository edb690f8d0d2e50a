"""Background reconstruction by learning: the decoder, or the latent, of one edited image (BLD, section 4.2).

A VAE loses detail, so an edited image differs from its source outside the mask too. Fine-tuning the decoder on this one
image restores the source outside the mask and keeps the edit inside it, without a seam (docs/methods.md, section 3). The
alternatives without learning are in `composite.py` and `poisson.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.errors import ParameterError
from ..core.progress import Progress, silent
from ..core.protocols import DecoderClone, Denoiser, LatentCodec
from ..learning.activations import compact_activations, units
from ..learning.early_stopping import Plateau
from ..learning.memory import measured
from ..learning.optimise import autocast, learning_mode, optimise, own, recomputing
from ..learning.orthogonal_steps import OrthogonalSteps, cosine_rate
from .background_loss import BACKGROUND, EDIT, BackgroundLoss, background_loss
from .last_layer import last_layer, solve_last_layer

SD_LATENT_SCALE = 0.18215  # of SD 1.x and 2.x, and of the published code

METHODS = ("published", "fast")
PUBLISHED, FAST = METHODS
PUBLISHED_STEPS, PUBLISHED_LR = 75, 1e-4
# Of the fast method where the published one makes 75 steps at 1e-4: chosen on six scenes and a photograph.
FAST_STEPS = 10
FAST_RATE = 0.025


@dataclass(frozen=True)
class TuneSettings:
    """How to learn.

    Attributes:
        steps: Adam steps, >= 0.
        lr: Adam's step size, > 0.
        background_weight: weight of the background loss against the loss inside the mask, >= 0.
        patience: stop when this many steps have improved the background loss by less than 1 %; 0 = never.
        low_memory: recompute the activations of a decoder block instead of storing them: slower, with the memory of
            about one block.
        compute_dtype: of the arithmetic around the float32 weights, e.g. torch.bfloat16; None = float32.
    """

    steps: int = 75
    lr: float = 1e-4
    background_weight: float = 100.0
    patience: int = 0
    low_memory: bool = False
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self.background_weight >= 0:
            raise ParameterError(f"background_weight is {self.background_weight}: give 0 or more (100 as published)")
        if self.patience < 0:
            raise ParameterError(f"patience is {self.patience}: give a number of steps, or 0 for all of them")


@dataclass(frozen=True)
class DecoderSettings(TuneSettings):
    """How the decoder learns.

    Attributes:
        blocks: "all" (as published), or how many of the last blocks learn. The blocks before them are computed once:
            several times faster and with less memory, for a slightly less exact background.
        method: "published" (Adam on the chosen blocks), or "fast": at 75 `steps` and an `lr` of 1e-4 it takes 10 steps of
            `OrthogonalSteps`, other values in proportion; with "all" blocks only those in the middle learn; the last
            convolution is solved exactly; activations are recomputed and stored as bfloat16.
    """

    blocks: int | str = "all"
    method: str = PUBLISHED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ParameterError(f"method is {self.method!r}: choose from {', '.join(METHODS)}")


@dataclass(frozen=True)
class LatentSettings(TuneSettings):
    """How the latent learns. `lr` counts on the scaled latent: 0.1 as published; the paper's 1e-4 changes nothing visible.

    Attributes:
        latent_scale: factor between the VAE's latent and the scaled latent of its model, > 0 (`latent_scale`). The
            default is that of SD 1.x and 2.x, where the published 0.1 is 0.549 on the VAE's latent.
    """

    lr: float = 0.1
    latent_scale: float = SD_LATENT_SCALE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.latent_scale > 0:
            raise ParameterError(f"latent_scale is {self.latent_scale}: give a number above 0 (0.18215 for SD 1.x)")


@dataclass(frozen=True)
class Tuning:
    """The result of learning.

    Attributes:
        image: IMAGE [B, H, W, 3] in [0, 1], of the source's size.
        losses: total loss before each step.
        edit_losses, background_losses: its two terms (the second with its weight).
        psnr_before, psnr_after: dB outside the mask against the source, mean of the batch; NaN for a full mask.
        steps: steps taken.
        stopped: whether `patience` ended it.
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
    """Fine-tune a copy of the decoder to the source outside the mask and to the edit inside it.

    theta* = argmin MSE(D(z) m, edited m) + weight MSE(D(z) (1 - m), source (1 - m)); see `background_loss.py`. All
    images of a batch share the one decoder: tune a single image for the best result.

    Args:
        codec: the VAE; its weights do not change.
        latent: z [B, C, h, w] from the sampler, unscaled; its size is that of the source, padded to whole latent pixels.
        source: IMAGE [B, H, W, 3] in [0, 1]; padding does not count.
        edited: IMAGE to keep inside the mask; None takes the plain decode, without clamping.
        mask: MASK at pixel resolution, 1 = edit; soft values weight both losses.
        settings: the published numbers by default.
        progress: called after every step; raising there cancels.
    Returns: the tuned codec and its image.
    Raises: ShapeError, ParameterError; EditError if the loss overflows, or if there is not enough memory to start.
    """
    settings = settings or DecoderSettings()
    loss = background_loss(codec, latent, source, edited, mask, settings.background_weight)
    with learning_mode():
        clone = codec.decoder_clone()
        try:
            tuning = _learn_decoder(clone, loss, settings, progress)
            return DecoderTuning(**vars(tuning), codec=clone.finish())
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
    settings: LatentSettings | None = None,
    progress: Progress = silent,
) -> LatentTuning:
    """The same losses with the latent learning and the decoder fixed: backgrounds come out too smooth (BLD, figure 4).

    Every image learns independently of the batch.

    Args:
        codec, latent, source, edited, mask, progress: as in `tune_decoder`.
        settings: the published numbers by default.
    Returns: the learned latent and its image.
    Raises: as `tune_decoder`.
    """
    settings = settings or LatentSettings()
    loss = background_loss(codec, latent, source, edited, mask, settings.background_weight)
    with learning_mode():
        clone = codec.decoder_clone()
        try:
            return _learn_latent(clone, loss, settings, progress)
        finally:
            clone.release()


def latent_scale(denoiser: Denoiser) -> float:
    """Factor from a VAE's latent to the scaled latent of its model, averaged over the channels."""
    unit = torch.ones(1, denoiser.channels, 1, 1)
    return float((denoiser.scale_in(unit) - denoiser.scale_in(0 * unit)).mean())


def _learn_decoder(clone: DecoderClone, loss: BackgroundLoss, settings: DecoderSettings, progress: Progress) -> Tuning:
    """The last blocks learn; the blocks before them run once."""
    if settings.method == FAST:
        return _learn_fast(clone, loss, settings, progress)
    split = len(clone.blocks) - _learning_blocks(settings.blocks, len(clone.blocks))
    learning = list(clone.blocks[split:])
    weights = list(dict.fromkeys(weight for block in learning for weight in block.parameters()))
    with torch.no_grad():
        start = _run(clone.blocks[:split], clone.prepare(own(loss.latent)))
    return _learn(weights, learning, lambda: start, loss, settings, progress, what="tuning the decoder")


def _learn_fast(clone: DecoderClone, loss: BackgroundLoss, settings: DecoderSettings, progress: Progress) -> Tuning:
    """The middle of the decoder learns by orthogonal steps, and its last convolution is solved.

    The first block runs once. The blocks at full resolution pass gradients on: learning them takes time and gains nothing.
    """
    count = len(clone.blocks)
    split = 1 if settings.blocks == "all" and count > 1 else count - _learning_blocks(settings.blocks, count)
    chain = list(clone.blocks[split:])
    middle = chain[:-2] if settings.blocks == "all" and len(chain) > 2 else chain
    weights = [weight for block in middle for weight in block.parameters() if weight.ndim > 1]
    with torch.no_grad():
        start = _run(clone.blocks[:split], clone.prepare(own(loss.latent)))
    steps = math.ceil(settings.steps * FAST_STEPS / PUBLISHED_STEPS)
    how = _How(
        steps,
        cosine_rate(settings.lr / PUBLISHED_LR * FAST_RATE, steps),
        OrthogonalSteps,
        [unit for block in chain for unit in units(block)],
        solve=True,
    )
    what = "tuning the decoder"
    return _learn(list(dict.fromkeys(weights)), chain, lambda: start, loss, settings, progress, what=what, how=how)


def _learn_latent(
    clone: DecoderClone, loss: BackgroundLoss, settings: LatentSettings, progress: Progress
) -> LatentTuning:
    blocks = [block.requires_grad_(False) for block in clone.blocks]
    latent = own(loss.latent, next(weight.device for block in blocks for weight in block.parameters()))
    # the losses are means over the batch: times the batch, each latent learns as it would alone
    tuning = _learn(
        [latent],
        blocks,
        lambda: clone.prepare(latent),
        loss,
        replace(settings, lr=settings.lr / settings.latent_scale),
        progress,
        what="tuning the latent",
        scale=len(latent),
    )
    return LatentTuning(**vars(tuning), latent=latent)


@dataclass(frozen=True)
class _How:
    """The rule of an optimisation.

    Attributes:
        steps, lr, rule: as in `optimise`.
        recomputed: modules that keep no activations.
        solve: whether activations are stored compactly and the last convolution is solved at the end.
    """

    steps: int
    lr: float | Callable[[int], float]
    rule: Callable[[Sequence[Tensor], float], torch.optim.Optimizer] | None
    recomputed: Sequence[nn.Module]
    solve: bool


def _learn(
    parameters: Sequence[Tensor],
    blocks: Sequence[nn.Module],
    start: Callable[[], Tensor],
    loss: BackgroundLoss,
    settings: TuneSettings,
    progress: Progress,
    *,
    what: str,
    scale: int = 1,
    how: _How | None = None,
) -> Tuning:
    """Learn `parameters` until blocks(start()) meets the loss.

    Args:
        parameters: float32 leaves behind `blocks` or `start`.
        blocks: the decoder from `start` to the image.
        start: gives the input of the blocks.
        loss, settings, progress: as in `tune_decoder`.
        what: name of the task, for errors.
        scale: factor of the loss while learning; reported losses are without it.
        how: the rule; None is Adam at the settings' rate.
    Returns: the image after learning and the loss curves.
    Raises: EditError where one step does not fit into memory or the loss overflows.
    """
    how = how or _How(settings.steps, settings.lr, None, blocks if settings.low_memory else (), solve=False)
    with recomputing(how.recomputed):
        first = _first_decode(parameters, blocks, start, what)
        loss = loss.prepared(first)
        psnr_before = loss.psnr(loss.image(first))
        del first
        scaled_loss = _training_loss(blocks, start, loss, settings.compute_dtype, scale=scale, compact=how.solve)
        stop = Plateau(settings.patience, term=BACKGROUND) if settings.patience else None
        result = optimise(
            parameters, scaled_loss, steps=how.steps, lr=how.lr, rule=how.rule, stop=stop, progress=progress
        )
    with torch.no_grad():
        _solve_end(blocks, start, loss, how)
        image = loss.image(_run(blocks, start()))
    return Tuning(
        image=image,
        losses=[total / scale for total in result.losses],
        edit_losses=[terms[EDIT] / scale for terms in result.terms],
        background_losses=[terms[BACKGROUND] / scale for terms in result.terms],
        psnr_before=psnr_before,
        psnr_after=loss.psnr(image),
        steps=result.steps,
        stopped=result.stopped,
    )


def _training_loss(
    blocks: Sequence[nn.Module],
    start: Callable[[], Tensor],
    loss: BackgroundLoss,
    dtype: torch.dtype | None,
    *,
    scale: int,
    compact: bool,
) -> Callable[[int], Tensor]:
    """The loss terms of a step times `scale`, with activations in half the memory if `compact`."""
    weights = [weight for block in blocks for weight in block.parameters()]

    def scaled_loss(step: int) -> Tensor:
        value = start()
        with autocast(value.device, dtype), compact_activations(weights) if compact else nullcontext():
            return loss(_run(blocks, value)) * scale

    return scaled_loss


def _first_decode(
    parameters: Sequence[Tensor], blocks: Sequence[nn.Module], start: Callable[[], Tensor], what: str
) -> Tensor:
    """The image before learning. Raises EditError where one step would not fit into memory."""
    with measured(parameters) as need:
        first = _run(blocks, start()).detach()
    need.check(first.device, what)
    return first


def _solve_end(blocks: Sequence[nn.Module], start: Callable[[], Tensor], loss: BackgroundLoss, how: _How) -> None:
    """Solve the last convolution where the rule says so and where it makes the image."""
    if not (how.solve and how.steps):
        return
    layer = last_layer(blocks[-1], lambda: _run(blocks, start()))
    if layer is not None:
        solve_last_layer(layer, loss)


def _run(blocks: Sequence[nn.Module], value: Tensor) -> Tensor:
    for block in blocks:
        value = block(value)
    return value


def _learning_blocks(blocks: int | str, count: int) -> int:
    if blocks == "all":
        return count
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= count:
        raise ParameterError(
            f'blocks is {blocks!r}: give "all" or how many of the decoder\'s last {count} blocks learn (1 to {count})'
        )
    return blocks
