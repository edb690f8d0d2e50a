"""What DiffEdit, inversion and null-text inversion can do on the bundled model: their claims as one table.

`editkit claims diffedit` prints it. All 64 trials are scenes with one object, which becomes one of another colour and shape;
no mask is drawn. The source prompt is the scene's caption, and the oracle reads the results.

The true mask at latent resolution marks every latent pixel that the object touches (`downsample`'s mode "max", the default
of the latent mask node): an edit that omits one of them leaves a piece of the old object behind. All settings are the
published ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...pipelines.blended.composite import composite_source
from ...pipelines.core.masks import downsample
from ...pipelines.core.protocols import Context
from ...pipelines.diffedit.edit import DiffEditSettings, diffedit
from ...pipelines.diffedit.mask import diffedit_mask, mask_in_pixels, strength_sigma
from ...pipelines.evaluation.metrics import psnr
from ...pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from ...pipelines.inversion.null_text import NullTextOptions, null_text
from . import trials as t
from .claim import Claim, print_claims, share

SETTINGS = DiffEditSettings()
IMPLICIT = InversionOptions("implicit")
NULL_TEXT = NullTextOptions()  # guidance 7.5


@dataclass(frozen=True)
class Scenes:
    """Trials as the methods take them: clean latents [B, C, h, w], images [B, H, W, 3] and both captions."""

    trials: Sequence[t.Trial]
    images: Tensor
    latent: Tensor
    source: Context
    target: Context
    null: Context

    @property
    def seeds(self) -> list[int]:
        return list(range(len(self.trials)))


def scenes(model: Any, trials: Sequence[t.Trial]) -> Scenes:
    images, _ = t.images_of(trials)
    encode = model.text.encode
    source = t.stacked([encode(trial.before.caption) for trial in trials])
    target = t.stacked([encode(trial.target.caption) for trial in trials])
    return Scenes(trials, images, model.codec.encode(images), source, target, encode(""))


# ------------------------------------------------------------------------------------------------------------- masks
def true_latent_mask(model: Any, work: Scenes) -> Tensor:
    """Latent pixels that the object touches, [B, h, w]."""
    _, masks = t.images_of(work.trials)
    height, width = work.latent.shape[-2:]
    return downsample(masks, height, width, "max", factor=model.codec.factor).mask.to(work.latent.device)


def overlap(found: Tensor, true: Tensor) -> Tensor:
    """Intersection over union of binary masks [B, h, w], per image."""
    both, either = found * true, torch.maximum(found, true)
    return both.sum(dim=(1, 2)) / either.sum(dim=(1, 2)).clamp(min=1)


def overlaps(model: Any, work: Scenes, maps: int) -> Tensor:
    found = diffedit_mask(
        model.denoiser,
        work.latent,
        work.source,
        work.target,
        seeds=work.seeds,
        maps=maps,
        sigma=strength_sigma(model.denoiser, SETTINGS.strength),
        rule=SETTINGS.rule,
    )
    return overlap(found.mask, true_latent_mask(model, work)).cpu()


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean and its 95 % interval (normal)."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def mask_claims(model: Any, work: Scenes) -> list[Claim]:
    many, one = (overlaps(model, work, maps) for maps in (SETTINGS.maps, 1))
    mean, low, high = interval(many)
    text = f"{mean:.3f} (95 % interval {low:.3f} to {high:.3f}), wanted 0.72"
    claims = [Claim("mask IoU, 10 maps", mean, text, mean >= 0.72)]
    mean, low, high = interval(many - one)
    text = f"{mean:+.3f} over {float(one.mean()):.3f} (95 % interval {low:+.3f} to {high:+.3f}), wanted above 0"
    return [*claims, Claim("10 maps over 1, paired", mean, text, low > 0)]


# ------------------------------------------------------------------------------------------------------------- edits
def edit(model: Any, work: Scenes, settings: DiffEditSettings = SETTINGS) -> tuple[Tensor, float, float]:
    """Composited edits [B, H, W, 3]; largest change outside the masks of the latents, and of the images."""
    result = diffedit(
        model.denoiser, work.latent, work.source, work.target, work.null, seeds=work.seeds, settings=settings
    )
    outside = (result.mask.mask == 0)[:, None]
    change = float(((result.latent - work.latent).abs() * outside).max())
    pixels = mask_in_pixels(result.mask.mask, model.codec.factor, *work.images.shape[1:3])
    edited, change_px = composite_source(model.codec.decode(result.latent), work.images, pixels)
    return edited.cpu(), change, change_px


def edit_claims(model: Any, work: Scenes) -> list[Claim]:
    edited, change, change_px = edit(model, work)
    pairs = list(zip(edited, work.trials, strict=True))
    return [
        share("edits, new colour", [t.new_colour_right(*pair) for pair in pairs], 0.95),
        share("edits, new colour and shape", [t.new_object_right(*pair) for pair in pairs], 0.75),
        Claim("latent outside the mask", change, f"changed by {change:g} at most, wanted 0", change == 0),
        Claim("image outside the mask", change_px, f"changed by {change_px:g} at most, wanted 0", change_px == 0),
    ]


# --------------------------------------------------------------------------------------------------- reconstructions
@dataclass(frozen=True)
class Rebuilt:
    """PSNR against the image in dB, per trial.

    Attributes:
        vae: of the decoded source latent: what no inversion can exceed.
        implicit: inverted and sampled at guidance 1.
        plain, null_text: sampled at guidance 7.5 with the empty prompt, and with the learned ones.
    """

    vae: Tensor
    implicit: Tensor
    plain: Tensor
    null_text: Tensor


def rebuild(model: Any, work: Scenes, steps: int = 50, options: NullTextOptions = NULL_TEXT) -> Rebuilt:
    """Invert every scene and reconstruct it in four ways.

    Args:
        model: the bundled model.
        work: the scenes.
        steps: of inversion and sampling.
        options: of null-text inversion; its guidance scale also serves the plain reconstruction.

    Returns: the quality of each reconstruction.
    """
    denoiser, codec = model.denoiser, model.codec
    scale, sigmas = options.guidance_scale, denoiser.schedule(steps)

    def quality(z: Tensor) -> Tensor:
        return psnr(codec.decode(denoiser.scale_out(z)), work.images).cpu()

    exact = invert(denoiser, work.latent, work.source, sigmas, options=IMPLICIT)
    trajectory = invert(denoiser, work.latent, work.source, sigmas)
    learned = null_text(denoiser, trajectory, work.source, work.null, options=options)
    return Rebuilt(
        quality(trajectory.source),
        quality(reconstruct(denoiser, exact, work.source)),
        quality(reconstruct(denoiser, trajectory, work.source, negative=work.null, guidance_scale=scale)),
        quality(learned.rebuilt),
    )


def rebuilt_claims(found: Rebuilt) -> list[Claim]:
    implicit, plain, learned = (found.vae - value for value in (found.implicit, found.plain, found.null_text))
    loss, gain = interval(learned), interval(plain - learned)

    def line(name: str, values: tuple[float, float, float], wanted: str, passed: bool) -> Claim:
        mean, low, high = values
        text = f"{mean:.2f} dB (95 % interval {low:.2f} to {high:.2f}), wanted {wanted}"
        return Claim(name, mean, text, passed)

    exact = interval(implicit)
    return [
        line("implicit, guidance 1, under the VAE", exact, "at most 0.5", exact[0] <= 0.5),
        line("null-text, guidance 7.5, under the VAE", loss, "at most 1.5", loss[0] <= 1.5),
        line("null-text over plain, guidance 7.5", gain, "at least 3", gain[0] >= 3),
    ]


def print_quality(found: Rebuilt, seconds: float) -> None:
    values = " ".join(f"{name} {float(getattr(found, name).mean()):.2f}" for name in Rebuilt.__dataclass_fields__)
    print(f"     PSNR in dB: {values} ({seconds:.0f} s)")


def joined(parts: Sequence[Rebuilt]) -> Rebuilt:
    return Rebuilt(*(torch.cat([getattr(p, name) for p in parts]) for name in Rebuilt.__dataclass_fields__))


def main(count: int = 64, batch: int = 16) -> bool:
    """Everything, printed; True if every claim holds."""
    from ...hosts.diffusers.loading import load_bundled
    from ...pipelines.blended.pipeline import best_device

    model = load_bundled(best_device())
    trials = [t.swap(i) for i in range(count)]
    work, begun = scenes(model, trials), time.monotonic()
    good = print_claims(mask_claims(model, work) + edit_claims(model, work))
    print(f"     ({time.monotonic() - begun:.0f} s)")
    begun = time.monotonic()
    found = joined([rebuild(model, scenes(model, trials[i : i + batch])) for i in range(0, count, batch)])
    print_quality(found, time.monotonic() - begun)
    return good & print_claims(rebuilt_claims(found))
