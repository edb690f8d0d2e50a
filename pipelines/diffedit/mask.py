"""DiffEdit's mask: where two prompts give different predictions of the same noised image (docs/methods.md, section 6)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.guidance import mix
from ..core.masks import remove_islands
from ..core.noise import seeded_noise
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import check_latent, crop_to

log = logging.getLogger("editkit")

MASK_STEPS = 50  # steps of the grid on which a mask's strength counts, as in diffusers: 0.5 is timestep 481 of SD
ROUNDING = 1e-5  # relative differences below this are rounding errors


@dataclass(frozen=True)
class MaskRule:
    """How differences of predictions become a mask.

    Attributes:
        clip_ratio: differences are clipped at this multiple of the image's mean difference, > 0 (3 as published).
        threshold: fraction of the clipping value above which a latent pixel is edited, (0, 1).
        smooth: odd side, in latent pixels, of the square over which differences are averaged first; 1 = as published.
        smallest_island: connected regions of the mask with fewer latent pixels are dropped; 0 keeps all.
        batch_mean: take the mean over the whole batch, as the published code does: images then change each other's mask.
    """

    clip_ratio: float = 3.0
    threshold: float = 0.5
    smooth: int = 1
    smallest_island: int = 0
    batch_mean: bool = False

    def __post_init__(self) -> None:
        if not self.clip_ratio > 0:
            raise ParameterError(f"clip_ratio is {self.clip_ratio}: give a number above 0 (3 as published)")
        if not 0 < self.threshold < 1:
            raise ParameterError(f"threshold is {self.threshold}: give a number between 0 and 1 (0.5 as published)")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ParameterError(f"smooth is {self.smooth}: give an odd number of latent pixels (1 = no smoothing)")

    def __call__(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and heat, float32 [B, h, w], of mean absolute differences [B, h, w].

        Heat is the clipped difference in [0, 1]; the published rule min(g, 3 mean) / (3 mean) > 0.5 means
        g > 1.5 mean. An image without any difference gets an empty mask.
        """
        if self.smooth > 1:
            pad = self.smooth // 2
            difference = F.avg_pool2d(difference[:, None], self.smooth, 1, pad, count_include_pad=False)[:, 0]
        mean = difference.mean() if self.batch_mean else difference.mean(dim=(1, 2), keepdim=True)
        ceiling = (mean * self.clip_ratio).expand(len(difference), 1, 1)
        heat = torch.where(ceiling > 0, difference / ceiling, torch.zeros_like(difference)).clamp(max=1)
        return remove_islands((heat > self.threshold).float(), self.smallest_island), heat


@dataclass(frozen=True)
class MaskNegatives:
    """Guidance of the mask's predictions, each by a negative prompt of its own, as diffusers offers.

    Equal negatives scale all differences alike and leave the mask as it is without them.

    Attributes:
        source, target: negative prompt of the source and of the target prompt.
        guidance_scale: of both predictions, above 0.
    """

    source: Context
    target: Context
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        if not self.guidance_scale > 0:
            raise ParameterError(f"guidance_scale of the mask is {self.guidance_scale}: give a number above 0 (7.5)")


@dataclass(frozen=True)
class DiffEditMask:
    """The mask of two prompts.

    Attributes:
        mask: latent mask, float32 [B, h, w], 1 = edit.
        heat: clipped differences in [0, 1], [B, h, w].
        empty: indices of the images with an empty mask.
    """

    mask: Tensor
    heat: Tensor
    empty: list[int]


def strength_sigma(denoiser: Denoiser, strength: float, steps: int = MASK_STEPS) -> float:
    """The sigma at `strength` in (0, 1]: 1 is pure noise; lower strengths are nearer to the image."""
    return float(denoiser.schedule(steps, strength)[0])


@torch.no_grad()
def diffedit_mask(
    denoiser: Denoiser,
    latent: Tensor,
    source: Context,
    target: Context,
    *,
    seeds: list[int],
    maps: int = 10,
    sigma: float | None = None,
    rule: MaskRule | None = None,
    negatives: MaskNegatives | None = None,
    max_batch: int | None = None,
    progress: Progress = silent,
) -> DiffEditMask:
    """The mask of what must change for `source` to become `target`; 2 x maps forward passes per image.

    No guidance by default: one negative for both prompts would scale all differences alike. Two negatives need 4 x maps.
    The parameterisation does not matter: differences of denoised, eps and v predictions are proportional.

    Args:
        denoiser: the model.
        latent: clean latent, unscaled, [B, C, h, w].
        source: prompt of what the image shows (or an empty prompt).
        target: prompt of what it should show.
        seeds: one per image; each map of an image draws other noise from it.
        maps: number of noised copies of each image to compare, >= 1 (10 as published).
        sigma: noise to compare at; None takes strength 0.5.
        rule: from differences to the mask; the published rule by default.
        negatives: a negative prompt for each of the two.
        max_batch: most latents in one model call, each for all prompts; None tries all, and halves when memory runs out.
        progress: called after every map.
    Returns: mask and heat. A warning names the images with an empty mask.
    Raises: ShapeError, ParameterError.
    """
    if maps < 1:
        raise ParameterError(f"maps is {maps}: at least 1 is needed (10 as published)")
    z = denoiser.scale_in(check_latent(latent, "latent", denoiser.channels))
    if len(seeds) != len(z):
        raise ShapeError(f"there are {len(seeds)} seeds but {len(z)} images: give one seed per image")
    sigma = strength_sigma(denoiser, 0.5) if sigma is None else sigma
    total = torch.zeros_like(z[:, 0])
    magnitudes = z.new_zeros(len(z))
    calls = _differences(denoiser, z, sigma, _Prompts(source, target, negatives), seeds, maps, max_batch)
    for done, (difference, magnitude) in enumerate(calls, 1):
        total = total + difference
        magnitudes = magnitudes + magnitude
        progress(done, maps)
    differs = total.mean(dim=(1, 2), keepdim=True) > ROUNDING * magnitudes.view(-1, 1, 1)
    mask, heat = (rule or MaskRule())((total / maps).where(differs, 0.0))
    return DiffEditMask(mask, heat, _empty_masks(mask))


def _empty_masks(mask: Tensor) -> list[int]:
    """Indices of the images with an empty mask; a warning names them."""
    empty = [i for i, area in enumerate(mask.sum(dim=(1, 2)).tolist()) if area == 0]
    if empty:
        log.warning(
            "DiffEdit found nothing to change in image %s: do the prompts differ? Try a lower threshold or another strength",
            ", ".join(map(str, empty)),
        )
    return empty


@dataclass(frozen=True)
class _Prompts:
    """The two prompts of a mask, and how their predictions are guided."""

    source: Context
    target: Context
    negatives: MaskNegatives | None

    @property
    def contexts(self) -> Sequence[Context]:
        plain = (self.source, self.target)
        return plain if self.negatives is None else (*plain, self.negatives.source, self.negatives.target)

    def predict(self, denoiser: Denoiser, z: Tensor, sigma: float, count: int) -> tuple[Tensor, Tensor]:
        """The denoised latents of `count` copies of the batch under the source and the target prompt."""
        denoised = denoiser.denoise(z, sigma, [_repeated(context, count) for context in self.contexts])
        if self.negatives is None:
            return denoised[0], denoised[1]
        source, target, source_negative, target_negative = denoised
        scale = self.negatives.guidance_scale
        return mix(source, source_negative, scale), mix(target, target_negative, scale)


def _differences(
    denoiser: Denoiser,
    z: Tensor,
    sigma: float,
    prompts: _Prompts,
    seeds: list[int],
    maps: int,
    max_batch: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per map: the absolute difference averaged over channels [B, h, w], and the mean magnitude of a prediction [B]."""
    together = min(maps, max(1, max_batch // len(z)) if max_batch else maps)
    done = 0
    while done < maps:
        count = min(together, maps - done)
        try:
            noised = [_noised(denoiser, z, sigma, seeds, j) for j in range(done, done + count)]
            predicted = prompts.predict(denoiser, torch.cat(noised), sigma, count)
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise
            together = count // 2
            log.warning("out of memory with %d maps in one model call: trying %d", count, together)
            continue
        source, target = (denoised.view(count, *z.shape) for denoised in predicted)
        for j in range(count):
            yield (target[j] - source[j]).abs().mean(1), source[j].abs().mean(dim=(1, 2, 3))
        done += count


def _noised(denoiser: Denoiser, z: Tensor, sigma: float, seeds: list[int], draw: int) -> Tensor:
    return denoiser.noise(z, seeded_noise(z.shape[1:], seeds, z.device, draw=draw), sigma)


def _repeated(context: Context, count: int) -> Context:
    """A context for `count` copies of the batch; a context of one image serves any batch."""
    if count == 1 or context.tokens.shape[0] == 1:
        return context
    pooled = None if context.pooled is None else context.pooled.repeat(count, 1)
    return replace(context, tokens=context.tokens.repeat(count, 1, 1), pooled=pooled)


def mask_in_pixels(mask: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Enlarge a latent mask to pixels.

    Args:
        mask: mask or heat [B, h, w].
        factor: pixels per latent pixel.
        height, width: size of the image in pixels; padding beyond it is cut off.
    Returns: [B, height, width].
    """
    return crop_to(mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2), height, width)


def heat_image(heat: Tensor, factor: int, height: int, width: int) -> Tensor:
    """Draw a heat map in black, red, yellow and white.

    Args:
        heat: [B, h, w] in [0, 1].
        factor: pixels per latent pixel.
        height, width: size of the image in pixels.
    Returns: IMAGE [B, height, width, 3].
    """
    value = mask_in_pixels(heat, factor, height, width)[..., None] * 3
    return (value - torch.arange(3, device=value.device)).clamp(0, 1)
