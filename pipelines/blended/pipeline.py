"""Blended Latent Diffusion from a picture, a mask and a text to ranked, background-exact results, without a host.

The chain that the workflow `blended_edit` wires from single nodes: encode, latent mask, shrinking schedule, blended
loop, rank, fine-tune the decoder for the winner, composite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.guidance import EditPrompts
from ..core.masks import dilation_schedule, downsample
from ..core.noise import image_seeds, seeded_noise, start_latent
from ..core.progress import Progress, silent
from ..core.protocols import Denoiser, LatentCodec, Ranker, TextEncoder
from ..core.shapes import check_image, check_mask, crop_to, match_batch, pad_to_factor, same_size
from ..evaluation.clip_ranking import rank_by_text
from ..evaluation.metrics import psnr_outside
from .blending import BlendOptions, blended_denoise, finished_latent
from .composite import composite_source
from .decoder_tuning import DecoderSettings, tune_decoder

log = logging.getLogger("editkit")


@dataclass(frozen=True)
class EditSettings:
    """Everything a blended edit can be told; defaults are the workflow's.

    Attributes:
        steps, strength: the grid, and the part of it that runs (1 = from pure noise).
        guidance_scale: w; 1 evaluates no unconditional rows.
        candidates: results to draw and rank.    seed: candidate b uses seed + b.
        mask_mode, mask_threshold: how the mask comes onto the latent grid.
        kernels: shrinking schedule in latent cells; (1,) is the plain loop, masks.PAPER_KERNELS the paper's for thin masks.
        stage_spacing: how the kernels share the steps: "steps", "log-sigma" or "published" (`MaskSchedule`).
        tune_steps, tune_lr: decoder iterations for the winner (0 leaves the decoder alone) and Adam's learning rate.
        feather_px: soft edge of the composite, inside the mask.
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


@dataclass(frozen=True)
class EditResult:
    """What an edit gave, best candidate first.

    Attributes:
        candidates: decoded candidates [n, H, W, 3].    latents: their latents [n, C, h, w].    scores: cosine [n] or None.
        tuned: the winner from the tuned decoder [1, H, W, 3] (its plain decode if tune_steps is 0).
        image: the winner over the source, [1, H, W, 3]: nothing outside the mask differs.
        losses: of the decoder fine-tune.    psnr_plain, psnr_tuned: dB outside the mask against the source.
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
    progress: Progress = silent,
) -> Tensor:
    """Clean latents [candidates, C, h, w], unscaled, of blended edits of one picture; the source's bits outside the mask.

    Args:
        image: IMAGE [1, H, W, 3] of any size.    mask: MASK [1, H, W], 1 = edit, of the same size.
    Raises: EditError.
    """
    settings = settings or EditSettings()
    image, mask = check_image(image, "image"), check_mask(mask, "mask")
    same_size(image, mask, "image", "mask")
    source = codec.encode(pad_to_factor(image, codec.factor))
    height, width = source.shape[-2:]
    latent_pixels = downsample(mask, height, width, settings.mask_mode, settings.mask_threshold, factor=codec.factor)
    for index in latent_pixels.lost:
        log.warning("the stroke of mask %d is gone on the latent grid: use mask mode 'max' or a thicker stroke", index)
    schedule = dilation_schedule(
        latent_pixels.mask, settings.kernels, scale_with_size=settings.scale_kernels, spacing=settings.stage_spacing
    )
    positive = text.encode(prompt)
    prompts = EditPrompts(
        positive, text.encode(negative) if settings.guidance_scale != 1 else None, settings.guidance_scale
    )
    sigmas = denoiser.schedule(settings.steps, settings.strength)
    seeds = image_seeds(settings.seed, settings.candidates)
    source = match_batch(source, settings.candidates, "image", "the candidates")
    scaled = denoiser.scale_in(source)
    z = start_latent(denoiser, scaled, float(sigmas[0]), seeded_noise(scaled.shape[1:], seeds, scaled.device))
    z = blended_denoise(
        denoiser, z, scaled, sigmas, schedule, prompts, seeds=seeds, options=settings.options, progress=progress
    )  # fmt: skip
    return finished_latent(denoiser.scale_out(z), source, schedule, sigmas)


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
    """The whole method for one picture.

    Args:
        ranker: orders the candidates by `rank_text` (default: the prompt); None keeps the order of the seeds.
        stage: gives a progress for a named stage ("denoise", "decoder"); silent by default.
    Raises: EditError.
    """
    settings = settings or EditSettings()
    report = stage or (lambda name: silent)
    image, mask = check_image(image, "image"), check_mask(mask, "mask")
    latents = edit_latents(
        denoiser, codec, text, image, mask, prompt, negative=negative, settings=settings, progress=report("denoise")
    )  # fmt: skip
    decoded = crop_to(codec.decode(latents), *image.shape[1:3]).cpu()
    scores = None
    if ranker is not None:
        ranking = rank_by_text(decoded, rank_text or prompt, ranker, mask=mask)
        order = ranking.order.to(latents.device)
        latents, decoded, scores = latents[order], decoded[ranking.order.cpu()], ranking.scores.cpu()
    return _finish(codec, latents, decoded, scores, image=image, mask=mask, settings=settings, report=report)


def _finish(
    codec: LatentCodec, latents: Tensor, decoded: Tensor, scores: Tensor | None, *, image: Tensor, mask: Tensor,
    settings: EditSettings, report: Callable[[str], Progress],
) -> EditResult:  # fmt: skip
    """Tune the decoder for the winner alone (the paper's point: it is the costly part) and composite it."""
    plain = float(psnr_outside(decoded[:1], image, mask).nanmean())
    tuned, losses, after = decoded[:1], [], plain
    if settings.tune_steps:
        tuning = tune_decoder(
            codec, latents[:1], image, None, mask,
            settings=DecoderSettings(steps=settings.tune_steps, lr=settings.tune_lr), progress=report("decoder"),
        )  # fmt: skip
        tuned, losses, after = tuning.image.cpu(), tuning.losses, tuning.psnr_after
    result, change = composite_source(tuned, image, mask, feather_px=settings.feather_px)
    return EditResult(decoded, latents, scores, tuned, result, losses, plain, after, change)


def best_device() -> torch.device:
    """The GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
