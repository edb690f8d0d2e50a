"""The masked decode of an inverted image, and the whole of DiffEdit (Couairon et al. 2022; docs/methods.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..blended.blending import BlendOptions, blended_denoise, unscale_over_source
from ..core.guidance import EditPrompts, Negative
from ..core.masks import MaskSchedule, constant_schedule
from ..core.progress import Progress, StagedProgress, silent
from ..core.protocols import Context, Denoiser
from ..core.sigmas import executed_steps
from ..core.trajectory import Trajectory
from ..inversion.ddim import InversionOptions, invert
from .mask import DiffEditMask, MaskNegatives, MaskRule, diffedit_mask, strength_sigma


def masked_decode(
    denoiser: Denoiser,
    trajectory: Trajectory,
    schedule: MaskSchedule,
    prompts: EditPrompts,
    *,
    ratio: float = 0.8,
    legacy_offset: bool = False,
    progress: Progress = silent,
) -> Tensor:
    """Denoise an inverted image with the prompts inside the mask and along its trajectory outside; 2 r N forward passes.

    Args:
        denoiser: the model.
        trajectory: inversion of the image with this model.
        schedule: mask on the latent grid (`constant_schedule` of DiffEdit's mask, or any other).
        prompts: positive, negative and guidance scale.
        ratio: encoding ratio r in (0, 1]: fraction of the steps to decode. A larger ratio changes more.
        legacy_offset: put back the trajectory one step too late, as diffusers does (docs/methods.md, section 16,
            row 12): the outside then ends with the variance-preserving latent one step before the source.
        progress: called after every step.
    Returns: clean latent [B, C, h, w], unscaled; outside the mask the bits of the trajectory's source latent.
    Raises: MismatchError, ShapeError, ParameterError.
    """
    start = trajectory.steps - executed_steps(trajectory.steps, ratio)
    batch = max(trajectory.batch, schedule.batch)
    z = blended_denoise(
        denoiser,
        trajectory.expanded(batch).latent(start),
        trajectory,
        trajectory.sigmas,
        schedule,
        prompts,
        seeds=[0] * batch,
        start=start,
        options=BlendOptions(background_level="previous (DDIM)" if legacy_offset else "aligned"),
        progress=progress,
    )
    if legacy_offset:
        return denoiser.scale_out(z)
    return unscale_over_source(denoiser, z, trajectory.source_latent, schedule, trajectory.sigmas)


@dataclass(frozen=True)
class DiffEditSettings:
    """Settings of the whole method; defaults as published (docs/methods.md, section 6).

    Attributes:
        steps: steps of the whole grid.
        ratio: encoding ratio, fraction of the steps that are inverted and decoded, (0, 1].
        maps: number of noised copies compared for the mask.
        strength: how noisy they are, (0, 1].
        guidance_scale: of the decode; the mask and the inversion use no guidance.
        legacy_offset: see `masked_decode`.
        rule: from differences to the mask.
        inversion: how to invert.
    """

    steps: int = 50
    ratio: float = 0.8
    maps: int = 10
    strength: float = 0.5
    guidance_scale: float = 7.5
    legacy_offset: bool = False
    rule: MaskRule = field(default_factory=MaskRule)
    inversion: InversionOptions = field(default_factory=InversionOptions)


@dataclass(frozen=True)
class DiffEditResult:
    """An edit.

    Attributes:
        latent: clean edited latents, unscaled, [B, C, h, w].
        mask: the mask of the edit.
        trajectory: the inversion; None where every mask was empty.
    """

    latent: Tensor
    mask: DiffEditMask
    trajectory: Trajectory | None


def diffedit(
    denoiser: Denoiser,
    latent: Tensor,
    source: Context,
    target: Context,
    negative: Negative | None,
    *,
    seeds: list[int],
    settings: DiffEditSettings | None = None,
    inversion: Context | None = None,
    mask_negatives: MaskNegatives | None = None,
    max_batch: int | None = None,
    progress: Progress = silent,
) -> DiffEditResult:
    """Mask, inversion and masked decode: 2 n + r N + 2 r N forward passes per image (140 for n = 10, N = 50, r = 0.8).

    Args:
        denoiser: the model.
        latent: clean latent, unscaled, [B, C, h, w].
        source: prompt of what the image shows.
        target: prompt of what it should show.
        negative: negative prompt of the decode; not needed at guidance scale 1.
        seeds: one per image, for the noise behind the mask.
        settings: the published numbers by default.
        inversion: inversion prompt; None takes `source`. The paper inverts with an empty prompt.
        mask_negatives: a negative prompt for each of the two prompts of the mask; 2 n more forward passes per image.
        max_batch: most latents in one model call while the mask is computed; see `diffedit_mask`.
        progress: called after every map and step.
    Returns: outside the mask the latent has the bits of `latent`; images with an empty mask come back unchanged.
    Raises: ShapeError, ParameterError, FamilyError.
    """
    settings = settings or DiffEditSettings()
    legs = StagedProgress(progress, (settings.maps, *[executed_steps(settings.steps, settings.ratio)] * 2))
    found = diffedit_mask(
        denoiser,
        latent,
        source,
        target,
        seeds=seeds,
        maps=settings.maps,
        sigma=strength_sigma(denoiser, settings.strength),
        rule=settings.rule,
        negatives=mask_negatives,
        max_batch=max_batch,
        progress=legs(0),
    )
    if len(found.empty) == len(latent):
        return DiffEditResult(latent, found, None)
    prompts = EditPrompts(target, negative, settings.guidance_scale)
    return _edit_masked(denoiser, latent, source if inversion is None else inversion, found, prompts, settings, legs)


def _edit_masked(
    denoiser: Denoiser,
    latent: Tensor,
    inversion: Context,
    found: DiffEditMask,
    prompts: EditPrompts,
    settings: DiffEditSettings,
    legs: StagedProgress,
) -> DiffEditResult:
    """Invert with the prompt `inversion` and decode with `prompts` under the mask."""
    trajectory = invert(
        denoiser,
        latent,
        inversion,
        denoiser.schedule(settings.steps),
        options=settings.inversion,
        ratio=settings.ratio,
        progress=legs(1),
    )
    edited = masked_decode(
        denoiser,
        trajectory,
        constant_schedule(found.mask),
        prompts,
        ratio=settings.ratio,
        legacy_offset=settings.legacy_offset,
        progress=legs(2),
    )
    return DiffEditResult(edited, found, trajectory)
