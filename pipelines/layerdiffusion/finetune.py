"""LayerDiffusion, stage 2: fit a copy of the network to the object of one image and the background of another.

    L_obj = E | M_obj (eps - f(x_t, t, e_opt)) |^2        on the image                     (Li et al. 2023, equation 4)
    L_bg  = E | M_bg (eps' - f(x'_t', t', e_opt)) |^2     on the reference background      (equation 5)
    L     = lambda_1 L_obj + lambda_2 L_bg                                                 (equation 6)

The embedding e_opt is fixed and the network f learns. Both terms are evaluated in one batch (docs/methods.md, section 10).
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
from ..core.tune_plan import TunePlan
from ..learning.denoising_loss import NoiseError, masked_mean
from ..learning.optimise import OptimiseResult, autocast, learning_mode, own, own_context
from .fitting import check_patience, fit, on_grid, recompute

REFERENCE_SEED = 0x5851F42D4C957F2D  # added to the image's seed: the reference draws its own sigmas and noise
EVERYTHING = TunePlan()


@dataclass(frozen=True)
class TuneOptions:
    """How the network is fitted.

    Attributes:
        plan: all weights, as published, or low-rank additions. See `TunePlan`.
        steps, lr: Adam's steps and step size, as published for all weights; low-rank additions need about 1e-4.
        object_weight, background_weight: lambda_1 and lambda_2; 0 leaves that image out. The paper uses lambda_1 = 3 for
            small objects.
        normalise: divide each term by the area of its mask (ours). As published, the terms are means over the whole image,
            in which a small object counts little.
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
    """The result of stage 2.

    Attributes:
        changes: of the weights, on the CPU, in the layout of LoRA files (`learning.weight_deltas`).
        object_losses, background_losses: the weighted terms before each step.
        steps: steps taken.
        stopped: whether patience ended the optimisation early.
    """

    changes: dict[str, Tensor]
    object_losses: list[float]
    background_losses: list[float]
    steps: int
    stopped: bool

    @property
    def losses(self) -> list[float]:
        """The total loss before each step."""
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
    """Fit a copy of the network to the object of one image and the background of another (equations 4 to 6).

    Every step draws one sigma and noise for each of the two images. A batch shares the one copy: its loss is the mean.

    Args:
        denoiser: the model; its weights do not change.
        latent: the image's clean latent, unscaled, [B, C, h, w].
        reference: the new background's clean latent, [B or 1, C, h, w]; not needed if `background_weight` is 0.
        context: the fixed embedding e_opt, as `layered_embeddings` mixed it, [1 or B, T, D].
        mask: M_obj, the object on the latent grid, [B or 1, h, w] in [0, 1]; None = the whole image.
        background_mask: M_bg, where the reference counts; None = outside `mask`. A larger free area allows another pose.
        seeds: one per image.
        options: see `TuneOptions`.
        progress: called after every step; raising there cancels.
    Returns: the changes of the weights. The copy is released in every outcome.
    Raises: ShapeError; ParameterError; FamilyError for a network that cannot learn as planned; EditError where the loss
        overflows or a step does not fit into memory.
    Source: Li et al. 2023, "LayerDiffusion", section 3.2.2. Its equations were reconstructed from the text (docs/methods.md,
    section 10); low-rank additions and `normalise` are ours.
    """
    options = options or TuneOptions()
    terms = _terms(denoiser, latent, reference, mask, background_mask, options)
    with learning_mode():
        shape = (sum(len(term.latent) for term in terms), *latent.shape[1:])
        clone = denoiser.model_clone(options.plan, shape)
        try:
            with recompute(clone.blocks, options.low_memory):
                result = _learn(clone, terms, context, list(seeds), options, progress)
            changes = clone.changes()
        finally:
            clone.release()
    losses = dict(zip([term.name for term in terms], zip(*result.terms, strict=True), strict=False))
    zeros = [0.0] * result.steps
    object_losses, background_losses = (list(losses.get(name, zeros)) for name in ("object", "background"))
    return LayeredTuning(changes, object_losses, background_losses, result.steps, result.stopped)


@dataclass(frozen=True)
class _Term:
    """L_obj or L_bg.

    Attributes:
        name: "object" or "background".
        latent: clean latents, unscaled, [B, C, h, w].
        where: M, [B, 1, h, w].
        weight: lambda.
    """

    name: str
    latent: Tensor
    where: Tensor
    weight: float


def _terms(
    denoiser: Denoiser,
    latent: Tensor,
    reference: Tensor | None,
    mask: Tensor | None,
    background_mask: Tensor | None,
    options: TuneOptions,
) -> list[_Term]:
    """The terms of the loss whose weight is above 0."""
    latent = check_latent(latent, "latent", denoiser.channels)
    where = torch.ones_like(latent[:, :1]) if mask is None else on_grid(mask, latent, "mask")
    terms = []
    if options.object_weight > 0:
        terms.append(_Term("object", latent, where, options.object_weight))
    if options.background_weight > 0:
        fitted = _fitted_reference(denoiser, reference, latent, options.background_weight)
        outside = 1 - where if background_mask is None else on_grid(background_mask, latent, "background_mask")
        terms.append(_Term("background", fitted, outside, options.background_weight))
    return terms


def _fitted_reference(denoiser: Denoiser, reference: Tensor | None, latent: Tensor, weight: float) -> Tensor:
    """The reference as [B, C, h, w] for a latent of that shape. Raises ParameterError or ShapeError."""
    if reference is None:
        raise ParameterError(
            f"background_weight is {weight} but there is no reference: connect an image of the new background, or give 0"
        )
    reference = check_latent(reference, "reference", denoiser.channels)
    if reference.shape[-2:] != latent.shape[-2:]:
        raise ShapeError(
            f"reference has {reference.shape[-1]} x {reference.shape[-2]} latent pixels but the latent"
            f" {latent.shape[-1]} x {latent.shape[-2]}: scale both images to one size"
        )
    common_batch(latent=latent, reference=reference)
    return match_batch(reference, len(latent), "reference", "latent")


def _learn(
    clone: DenoiserClone,
    terms: Sequence[_Term],
    context: Context,
    seeds: list[int],
    options: TuneOptions,
    progress: Progress,
) -> OptimiseResult:
    """Minimise the sum of the terms over the copy's parameters."""
    denoiser = clone.denoiser
    clean = torch.cat([own(denoiser.scale_in(term.latent)) for term in terms])
    where = torch.cat([own(term.where, clean.device) for term in terms])
    offsets = {"object": 0, "background": REFERENCE_SEED}
    error = NoiseError(denoiser, clean, [(seed + offsets[term.name]) % 2**64 for term in terms for seed in seeds])
    contexts = [_tiled(own_context(context), len(terms))]
    weights = torch.tensor([term.weight for term in terms], device=clean.device)

    def loss(step: int) -> Tensor:
        with autocast(clean.device, options.plan.autocast):
            errors = error(step, contexts)[0]
        each = masked_mean(errors, where, normalise=options.normalise)
        return weights * each.view(len(terms), -1).mean(1)

    return fit(clone.parameters, loss, options, "tuning the model", denoiser, progress)


def _tiled(context: Context, times: int) -> Context:
    """A context for `times` copies of its batch; one with a single entry serves any batch."""
    if len(context.tokens) == 1:
        return context
    pooled = None if context.pooled is None else context.pooled.repeat(times, 1)
    return replace(context, tokens=context.tokens.repeat(times, 1, 1), pooled=pooled)
