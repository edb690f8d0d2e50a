"""LayerDiffusion, stage 2: a copy of the network learns one picture's subject and another's background.

Li et al. 2023, equations 4 to 6 (methods.md, section 10); the sides of the pair are drawn at levels of their own and
evaluated in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser, DenoiserClone, TunableDenoiser
from ..core.shapes import check_latent, common_batch, match_batch
from ..learning.denoising_loss import NoiseError, masked_mean
from ..learning.optimise import OptimiseResult, autocast, learning_mode, own, own_context
from ..learning.weight_deltas import TunePlan
from .embeddings import check_patience, fit, on_grid, recompute

REFERENCE_SEED = 0x5851F42D4C957F2D  # what separates the draws of the reference from those of the picture
EVERYTHING = TunePlan()


@dataclass(frozen=True)
class TuneOptions:
    """How the network is fitted.

    Attributes:
        plan: all weights, as published, or low-rank additions. See `TunePlan`.
        steps, lr: Adam steps and step size, as published for all weights; low-rank additions want about 1e-4.
        object_weight, background_weight: lambda 1 and 2; 0 leaves that picture out altogether. The paper uses 3 for small
            subjects.
        normalise: divide each error by the share of the picture that its mask covers; published is the plain mean, under
            which a small subject weighs little.
        patience, low_memory: as in `EmbeddingOptions`.
    """

    plan: TunePlan = EVERYTHING
    steps: int = 250
    lr: float = 2e-6
    object_weight: float = 2.0
    background_weight: float = 1.0
    normalise: bool = False
    patience: int = 0
    low_memory: bool = False

    def __post_init__(self) -> None:
        for name in ("object_weight", "background_weight"):
            if not getattr(self, name) >= 0:
                raise ParameterError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.object_weight == self.background_weight == 0:
            raise ParameterError("object_weight and background_weight are both 0: there is nothing to learn from")
        check_patience(self.patience)


PUBLISHED = TuneOptions()
LIGHT = TuneOptions(plan=TunePlan("lora"), lr=1e-4)


@dataclass(frozen=True)
class LayeredTuning:
    """What `layered_tune` found.

    Attributes:
        changes: of the weights, on the CPU, in the layout of LoRA files (`weights.py`).
        object_losses, background_losses: before every step, with their weights.
        steps: taken.    stopped: whether patience ended it.
    """

    changes: dict[str, Tensor]
    object_losses: list[float]
    background_losses: list[float]
    steps: int
    stopped: bool

    @property
    def losses(self) -> list[float]:
        """Their sums."""
        return [a + b for a, b in zip(self.object_losses, self.background_losses, strict=True)]


def layered_tune(
    denoiser: TunableDenoiser,
    latent: Tensor,
    reference: Tensor | None,
    context: Context,
    mask: Tensor | None,
    *,
    background_mask: Tensor | None = None,
    seeds: Sequence[int],
    options: TuneOptions | None = None,
    progress: Progress = silent,
) -> LayeredTuning:
    """Fit a copy of the network to the subject of one picture and the background of another (equations 4 to 6).

    lambda_1 |M (eps - f(x_t, t, e))|^2 on the picture + lambda_2 |M_bg (eps' - f(x'_t', t', e))|^2 on the reference, e
    fixed. Every step draws one level and noise for each. All images of a batch share the one copy (mean of their losses).

    Args:
        latent: the picture, clean, unscaled, [B, C, h, w].
        reference: of the same size, [B or 1, C, h, w]; not needed with `background_weight` 0.
        context: the fixed embedding, as `layered_embeddings` mixed it.
        mask: the subject on the latent grid, [B or 1, h, w]; None = the whole picture.
        background_mask: where the reference counts; None = outside `mask`. Another one makes room for another pose.
        seeds: one for each image.
    Returns: the changes of the weights. The denoiser's own weights are not touched, whatever happens.
    Raises: ShapeError, ParameterError, FamilyError; EditError where it overflows or does not fit into memory.
    """
    options = options or TuneOptions()
    parts = _parts(denoiser, latent, reference, mask, background_mask, options)
    with learning_mode():
        shape = (sum(len(part.latent) for part in parts), *latent.shape[1:])
        clone = denoiser.model_clone(options.plan, shape)
        try:
            with recompute(clone.blocks, options.low_memory):
                result = _learn(clone, parts, context, list(seeds), options, progress)
            changes = clone.changes()
        finally:
            clone.release()
    terms = dict(zip([part.name for part in parts], zip(*result.terms, strict=True), strict=False))
    losses = [list(terms.get(name, [0.0] * result.steps)) for name in ("object", "background")]
    return LayeredTuning(changes, losses[0], losses[1], result.steps, result.stopped)


@dataclass(frozen=True)
class _Part:
    """One of the two losses: latents [B, C, h, w] unscaled, where they count [B, 1, h, w], and its weight."""

    name: str
    latent: Tensor
    where: Tensor
    weight: float


def _parts(
    denoiser: Denoiser,
    latent: Tensor,
    reference: Tensor | None,
    mask: Tensor | None,
    background_mask: Tensor | None,
    options: TuneOptions,
) -> list[_Part]:
    latent = check_latent(latent, "latent", denoiser.channels)
    where = torch.ones_like(latent[:, :1]) if mask is None else on_grid(mask, latent, "mask")
    parts = []
    if options.object_weight > 0:
        parts.append(_Part("object", latent, where, options.object_weight))
    if options.background_weight > 0:
        if reference is None:
            raise ParameterError(
                f"background_weight is {options.background_weight} but there is no reference: connect a picture of the"
                " new background, or give 0"
            )
        reference = check_latent(reference, "reference", denoiser.channels)
        if reference.shape[-2:] != latent.shape[-2:]:
            raise ShapeError(
                f"reference has {reference.shape[-1]} x {reference.shape[-2]} cells but the latent {latent.shape[-1]} x"
                f" {latent.shape[-2]}: scale both pictures to one size"
            )
        common_batch(latent=latent, reference=reference)
        reference = match_batch(reference, len(latent), "reference", "latent")
        outside = 1 - where if background_mask is None else on_grid(background_mask, latent, "background_mask")
        parts.append(_Part("background", reference, outside, options.background_weight))
    return parts


def _learn(
    clone: DenoiserClone,
    parts: Sequence[_Part],
    context: Context,
    seeds: list[int],
    options: TuneOptions,
    progress: Progress,
) -> OptimiseResult:
    denoiser = clone.denoiser
    clean = torch.cat([own(denoiser.scale_in(part.latent)) for part in parts])
    where = torch.cat([own(part.where, clean.device) for part in parts])
    offsets = {"object": 0, "background": REFERENCE_SEED}
    error = NoiseError(denoiser, clean, [(seed + offsets[part.name]) % 2**64 for part in parts for seed in seeds])
    contexts = [_tiled(own_context(context), len(parts))]
    weights = torch.tensor([part.weight for part in parts], device=clean.device)

    def loss(step: int) -> Tensor:
        with autocast(clean.device, options.plan.autocast):
            errors = error(step, contexts)[0]
        each = masked_mean(errors, where, normalise=options.normalise)
        return weights * each.view(len(parts), -1).mean(1)

    return fit(clone.parameters, loss, options, "tuning the model", denoiser, progress)


def _tiled(context: Context, times: int) -> Context:
    """A context with a row per image, for a batch of `times` as many."""
    if len(context.tokens) == 1:
        return context
    pooled = None if context.pooled is None else context.pooled.repeat(times, 1)
    return replace(context, tokens=context.tokens.repeat(times, 1, 1), pooled=pooled)
