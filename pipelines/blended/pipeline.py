"""Blended Latent Diffusion from an image, a mask and a text to ranked results with an exact background, without ComfyUI.

The same chain as the workflow `blended_edit`: encode, latent mask, mask schedule, blended loop, rank, fine-tune the
decoder for the best result, composite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..core.errors import ParameterError
from ..core.guidance import EditPrompts
from ..core.masks import MaskSchedule, dilation_schedule, downsample
from ..core.noise import image_seeds, seeded_noise, start_latent
from ..core.progress import Progress, silent
from ..core.protocols import Denoiser, LatentCodec, Ranker, TextEncoder
from ..core.shapes import (
    check_edit_mask,
    check_image,
    check_mask,
    check_mask_of_image,
    crop_to,
    match_batch,
    pad_to_factor,
)
from ..evaluation.clip_ranking import rank_by_text
from ..evaluation.metrics import largest_change_outside, psnr_outside
from .blending import BlendOptions, blended_denoise, unscale_over_source
from .composite import composite_source
from .decoder_tuning import PUBLISHED, DecoderSettings, tune_decoder
from .elimination import Elimination, sample_eliminating
from .window import edit_window

log = logging.getLogger("editkit")

LOST_STROKE = (
    "the stroke of mask %d is gone on the latent grid: use mask mode 'max', a lower mask threshold or a thicker stroke"
)


@dataclass(frozen=True)
class EditSettings:
    """Settings of a blended edit; the defaults are those of the workflow.

    Attributes:
        steps: steps of the whole grid.
        strength: fraction of the steps that run, (0, 1]; 1 starts from pure noise.
        guidance_scale: w; 1 skips the unconditional predictions.
        candidates: results to draw and rank.
        seed: of the first candidate; the others have seeds mixed from it (`image_seeds`).
        mask_mode, mask_threshold: how the mask is brought to the latent grid (`masks.downsample`).
        kernels: dilation kernels in latent pixels, largest first; (1,) is the plain loop, `masks.PAPER_KERNELS` the
            paper's choice for thin masks.
        scale_kernels: whether the kernels scale with the size of the latent.
        stage_spacing: how the kernels share the steps: "steps", "log-sigma" or "published" (`MaskSchedule`).
        tune_steps: decoder fine-tuning steps for the best candidate; 0 leaves the decoder alone.
        tune_lr: Adam's learning rate for them.
        window: edit only a window around the mask, with sides of at least this many pixels (`edit_window`); 0 edits the
            whole image.
        keep: candidates that run to the end; the others stop after `keep_at` of the steps, scored by the ranker on their
            denoised predictions (`Elimination`). 0 = all, and no scoring.
        keep_at: fraction of the steps, between 0 and 1.
        context_px: pixels around the mask that the window contains at least.
        tune_method: "published" or "fast" (`DecoderSettings.method`).
        feather_px: width in pixels of the soft edge of the composite, inside the mask.
        options: see `BlendOptions`.
    """

    steps: int = 50
    strength: float = 1.0
    guidance_scale: float = 5.0
    candidates: int = 4
    seed: int = 0
    mask_mode: str = "max"
    mask_threshold: float = 0.5
    kernels: tuple[int, ...] = (1,)
    scale_kernels: bool = False
    stage_spacing: str = "steps"
    tune_steps: int = 75
    tune_lr: float = 1e-4
    feather_px: int = 0
    options: BlendOptions = field(default_factory=BlendOptions)
    tune_method: str = PUBLISHED
    window: int = 0
    context_px: int = 64
    keep: int = 0
    keep_at: float = 0.3


@dataclass(frozen=True)
class EditResult:
    """The result of an edit, best candidate first.

    Attributes:
        candidates: decoded candidates, IMAGE [n, H, W, 3].
        latents: their latents, unscaled, [n, C, h, w].
        scores: their CLIP scores (cosine) [n]; None without a ranker.
        tuned: the best candidate from the fine-tuned decoder, [1, H, W, 3]; its plain decode if tune_steps is 0.
        image: the best candidate composited over the source, [1, H, W, 3]; nothing outside the mask differs.
        losses: of the decoder fine-tuning, one per step.
        psnr_plain, psnr_tuned: dB outside the mask against the source, before and after fine-tuning.
        change_outside: largest difference outside the mask in `image`.
    """

    candidates: Tensor
    latents: Tensor
    scores: Tensor | None
    tuned: Tensor
    image: Tensor
    losses: list[float]
    psnr_plain: float
    psnr_tuned: float
    change_outside: float


def edit_latents(
    denoiser: Denoiser,
    codec: LatentCodec,
    text: TextEncoder,
    image: Tensor,
    mask: Tensor,
    prompt: str,
    *,
    negative: str = "",
    settings: EditSettings | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Blended edits of one image as latents.

    Args:
        denoiser, codec, text: the network, the VAE and the text encoder.
        image: IMAGE [1, H, W, 3] of any size.
        mask: MASK [1, H, W] of the same size, 1 = edit.
        prompt: what the masked region should show.
        negative: negative prompt.
        settings: everything else; `tune_steps`, `tune_lr` and `feather_px` have no effect here.
        score: rates denoised latents where `settings.keep` is set (`Elimination.score`).
        progress: called after every step.
    Returns: clean latents [candidates or keep, C, h, w], unscaled, with the bits of the source outside the mask.
    Raises: EditError.
    """
    settings = settings or EditSettings()
    image, mask = check_image(image, "image"), check_edit_mask(mask)
    check_mask_of_image(mask, (image.shape[1], image.shape[2]))
    source = codec.encode(pad_to_factor(image, codec.factor))
    schedule = latent_schedule(mask, source, codec.factor, settings)
    prompts = EditPrompts(
        text.encode(prompt),
        text.encode_negative(negative) if settings.guidance_scale != 1 else None,
        settings.guidance_scale,
    )
    sigmas = denoiser.schedule(settings.steps, settings.strength)
    seeds = image_seeds(settings.seed, settings.candidates)
    run: Callable[..., Tensor] = sample_blended
    if settings.keep:
        if score is None:
            raise ParameterError("keep needs a ranker, which scores the candidates: give one, or keep 0 for all")
        run = partial(sample_eliminating, elimination=Elimination(settings.keep, settings.keep_at, score))
    else:
        source = match_batch(source, settings.candidates, "image", "the candidates")
    return run(denoiser, source, sigmas, schedule, prompts, seeds=seeds, options=settings.options, progress=progress)


def latent_schedule(mask: Tensor, latent: Tensor, factor: int, settings: EditSettings) -> MaskSchedule:
    """The mask schedule of an edit: the mask on the latent grid, dilated by the kernels.

    Args:
        mask: MASK [B, H, W], 1 = edit.
        latent: source latent [B, C, h, w], for its size.
        factor: image pixels per latent pixel along a side.
        settings: its mask, kernel and stage settings are used.
    Returns: the schedule. A stroke that is lost on the grid gives a warning.
    Raises: ShapeError, ParameterError.
    """
    height, width = latent.shape[-2:]
    latent_pixels = downsample(mask, height, width, settings.mask_mode, settings.mask_threshold, factor=factor)
    for index in latent_pixels.lost:
        log.warning(LOST_STROKE, index)
    return dilation_schedule(
        latent_pixels.mask, settings.kernels, scale_with_size=settings.scale_kernels, spacing=settings.stage_spacing
    )


def sample_blended(
    denoiser: Denoiser,
    source: Tensor,
    sigmas: Tensor,
    schedule: MaskSchedule,
    prompts: EditPrompts,
    *,
    seeds: list[int],
    options: BlendOptions | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Noise a latent and run the whole blended loop over `sigmas` (BLD, algorithm 1).

    Args:
        denoiser: the model.
        source: clean source latent, unscaled, [B, C, h, w].
        sigmas: grid [N + 1] that ends with 0.
        schedule: mask schedule on the latent grid, batch B or 1.
        prompts: positive, negative and guidance scale.
        seeds: one per image.
        options, progress: see `blended_denoise`.
    Returns: clean latents [B, C, h, w], unscaled, with the bits of `source` outside the mask.
    Raises: ShapeError, ParameterError, MismatchError.
    """
    scaled = denoiser.scale_in(source)
    noise = seeded_noise(scaled.shape[1:], seeds, scaled.device)
    z = start_latent(denoiser, scaled, float(sigmas[0]), noise)
    z = blended_denoise(denoiser, z, scaled, sigmas, schedule, prompts, seeds=seeds, options=options, progress=progress)
    return unscale_over_source(denoiser, z, source, schedule, sigmas)


def blended_edit(
    denoiser: Denoiser,
    codec: LatentCodec,
    text: TextEncoder,
    image: Tensor,
    mask: Tensor,
    prompt: str,
    *,
    ranker: Ranker | None = None,
    rank_text: str | None = None,
    negative: str = "",
    settings: EditSettings | None = None,
    stage: Callable[[str], Progress] | None = None,
) -> EditResult:
    """The whole method for one image.

    Args:
        denoiser, codec, text: the network, the VAE and the text encoder.
        image: IMAGE [1, H, W, 3] of any size.
        mask: MASK [1, H, W] of the same size, 1 = edit.
        prompt: what the masked region should show.
        ranker: orders the candidates by `rank_text`; None keeps the order of the seeds.
        rank_text: text to rank by; None = the prompt.
        negative: negative prompt.
        settings: everything else.
        stage: gives a progress for a named stage ("denoise", "decoder"); silent by default.
    Returns: the candidates, best first, and the finished best one.
    Raises: EditError.
    """
    settings = settings or EditSettings()
    report = stage or (lambda name: silent)
    if rank_text is not None and not rank_text.strip():
        raise ParameterError("rank_text is empty: say what the masked region should show, or leave it out")
    image, mask = check_image(image, "image"), check_mask(mask, "mask")
    if settings.window:
        within = replace(settings, window=0)
        chain = partial(
            blended_edit, denoiser, codec, text, ranker=ranker, rank_text=rank_text, settings=within, stage=stage
        )
        return _edit_in_window(codec, image, mask, settings, partial(chain, prompt=prompt, negative=negative))
    run = partial(edit_latents, denoiser, codec, text, image, mask, prompt, negative=negative, settings=settings)
    latents = run(score=_score(codec, ranker, rank_text or prompt, image, mask), progress=report("denoise"))
    decoded = crop_to(codec.decode(latents), *image.shape[1:3]).cpu()
    latents, decoded, scores = _ranked(latents, decoded, ranker, rank_text or prompt, mask)
    return _finish(codec, latents, decoded, scores, image=image, mask=mask, settings=settings, report=report)


def _score(
    codec: LatentCodec, ranker: Ranker | None, text: str, image: Tensor, mask: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """The CLIP scores of latents, as the finished candidates get them; None without a ranker."""
    if ranker is None:
        return None

    def score(latents: Tensor) -> Tensor:
        decoded = crop_to(codec.decode(latents), *image.shape[1:3]).cpu()
        return rank_by_text(decoded, text, ranker, mask=mask).all_scores

    return score


def _ranked(
    latents: Tensor, decoded: Tensor, ranker: Ranker | None, text: str, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents and images in the order of their scores, and the scores; as they are without a ranker."""
    if ranker is None:
        return latents, decoded, None
    ranking = rank_by_text(decoded, text, ranker, mask=mask)
    return latents[ranking.order.to(latents.device)], decoded[ranking.order.cpu()], ranking.scores.cpu()


def _edit_in_window(
    codec: LatentCodec, image: Tensor, mask: Tensor, settings: EditSettings, edit: Callable[..., EditResult]
) -> EditResult:
    """Edit the window around the mask and paste its images back; latents and figures stay those of the window."""
    check_mask_of_image(mask, (image.shape[1], image.shape[2]))
    window = edit_window(mask, size=settings.window, context=settings.context_px, multiple=codec.factor)
    result = edit(image=window.crop(image), mask=window.crop(mask))
    whole = window.paste(result.image, image)
    return replace(
        result,
        candidates=window.paste(result.candidates, image),
        tuned=window.paste(result.tuned, image),
        image=whole,
        change_outside=largest_change_outside(whole, image, mask),
    )


def _finish(
    codec: LatentCodec,
    latents: Tensor,
    decoded: Tensor,
    scores: Tensor | None,
    *,
    image: Tensor,
    mask: Tensor,
    settings: EditSettings,
    report: Callable[[str], Progress],
) -> EditResult:
    """Fine-tune the decoder for the best candidate only, because that is the costly step, and composite the result."""
    psnr_plain = float(psnr_outside(decoded[:1], image, mask).nanmean())
    tuned = decoded[:1]
    psnr_tuned = psnr_plain
    losses: list[float] = []
    if settings.tune_steps:
        tuning = tune_decoder(
            codec,
            latents[:1],
            image,
            None,
            mask,
            settings=DecoderSettings(steps=settings.tune_steps, lr=settings.tune_lr, method=settings.tune_method),
            progress=report("decoder"),
        )
        tuned = tuning.image.cpu()
        psnr_tuned = tuning.psnr_after
        losses = tuning.losses
    result, change = composite_source(tuned, image, mask, feather_px=settings.feather_px)
    return EditResult(decoded, latents, scores, tuned, result, losses, psnr_plain, psnr_tuned, change)


def best_device() -> torch.device:
    """The GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
