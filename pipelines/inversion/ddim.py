"""DDIM inversion: the way up from a clean latent to noise, and back (methods.md, section 5; Song et al. 2021, section 4.3).

A step of the sampler from level `high` to `low` is z_low = z_high - (high - low) d(z_high, high), with the derivative
d = (z - clean prediction) / sigma. Going up, z_high is not known yet; the modes differ in where they evaluate d:

    next      at the noise level `high` with the latent of `low` (the family of null-text inversion and diffusers)
    current   at `low` (the paper's equation)
    implicit  at z_high itself, by fixed-point iteration: the exact inverse of the sampler
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import FamilyError, ParameterError
from ..core.guidance import EditPrompts, Negative
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser, LatentCodec
from ..core.samplers import Predict, predictor, sample
from ..core.shapes import check_image, check_latent, crop_to
from ..core.sigmas import check_sigmas, executed
from ..core.trajectory import Trajectory, made_trajectory
from ..evaluation.metrics import psnr

log = logging.getLogger("editkit")

MODES = ("next", "current", "implicit")


@dataclass(frozen=True)
class InversionOptions:
    """How to go up.

    Attributes:
        mode: "next", "current" or "implicit" (module text). Flow models have no "next": their latent at one level is no
            rescaled latent of another.
        iterations: implicit: most evaluations per step, >= 1. One is about as good as the explicit modes.
        damping: implicit: share of the way to the next iterate that is taken, (0, 1]; it is halved, image by image, where
            an iterate is worse than the one before.
        tolerance: implicit: an image is done when its iterate moves less than this, relative to its norm.
    """

    mode: str = "next"
    iterations: int = 5
    damping: float = 1.0
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ParameterError(f"mode is {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.iterations < 1:
            raise ParameterError(f"iterations is {self.iterations}: at least 1 evaluation per step is needed")
        if not 0 < self.damping <= 1:
            raise ParameterError(f"damping is {self.damping}: give a number above 0 and up to 1 (1 = no damping)")
        if not self.tolerance > 0:
            raise ParameterError(f"tolerance is {self.tolerance}: give a small number above 0, for example 1e-5")


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    latent: Tensor,
    context: Context,
    sigmas: Tensor,
    *,
    options: InversionOptions | None = None,
    ratio: float = 1.0,
    negative: Context | None = None,
    guidance_scale: float = 1.0,
    progress: Progress = silent,
) -> Trajectory:
    """The path of a clean latent up the grid. One model row per step and image, up to `iterations` where implicit.

    Args:
        latent: clean, unscaled (as the VAE gives it), [B, C, h, w].
        sigmas: the whole grid, falling. If it ends above 0, the latent is taken to sit there already, as official code
            does with the lowest training level; a grid that ends with 0 starts right from 0.
        ratio: encoding ratio in (0, 1]: climb only this last part of the grid.
        guidance_scale: 1 as published; above it inversion drifts off (methods.md, section 16, row 13).
    Returns: the trajectory, source included.
    Raises: ShapeError, ParameterError, FamilyError for mode "next" with a flow model.
    """
    options, sigmas = options or InversionOptions(), check_sigmas(sigmas)
    if denoiser.flow and options.mode == "next":
        raise FamilyError(
            f"mode 'next' is not defined for flow models ({denoiser.family!r}): choose 'implicit' or 'current'"
        )
    z = denoiser.scale_in(check_latent(latent, "latent", denoiser.channels))
    predict = predictor(denoiser, EditPrompts(context, negative, guidance_scale))
    count = executed(len(sigmas) - 1, ratio)
    levels = sigmas.flip(0).tolist()[: count + 1]
    path, worst = [z], 0.0
    for i, (low, high) in enumerate(zip(levels, levels[1:], strict=False)):
        if options.mode == "implicit":
            guess = _first_guess(path, levels[: i + 2], denoiser.flow)
            z, clean, gap = _implicit_step(predict, path[-1], guess, low, high, options)
            worst = max(worst, gap)
        else:
            z, clean = _explicit_step(predict, path[-1], low, high, options.mode, denoiser.flow)
        path.append(z)
        progress(i + 1, count, clean)
    if worst > options.tolerance:
        log.info(
            "implicit inversion: the largest step left a relative gap of %.2g (tolerance %.2g)",
            worst,
            options.tolerance,
        )
    return made_trajectory(denoiser, latent, path, sigmas, context)


def _carried(z: Tensor, low: float, high: float, flow: bool) -> Tensor:
    """The latent of level `low` as the network sees it, at the scale of `high` (methods.md, 5: the pitfall of `next`).

    The network divides by sqrt(1 + sigma^2) for the sigma it is given. Flow networks take the latent as it is.
    """
    return z if flow else z * ((1 + high * high) / (1 + low * low)) ** 0.5


def _explicit_step(
    predict: Predict, z: Tensor, low: float, high: float, mode: str, flow: bool
) -> tuple[Tensor, Tensor]:
    """The latent at `high` and the clean prediction behind it. At level 0 the derivative is 0 / 0: evaluate at `high`."""
    at_next = mode == "next" or low == 0
    x, sigma = (_carried(z, low, high, flow), high) if at_next else (z, low)
    clean = predict(x, sigma)
    return z + (high - low) * ((x - clean) / sigma), clean


def _first_guess(path: list[Tensor], levels: list[float], flow: bool) -> Tensor:
    """Where the iteration starts: straight on along the last step, which costs nothing."""
    if len(path) == 1:
        return _carried(path[0], levels[0], levels[1], flow)
    before, low, high = levels[-3:]
    return path[-1] + (path[-1] - path[-2]) * ((high - low) / (low - before))


def _implicit_step(
    predict: Predict, z: Tensor, guess: Tensor, low: float, high: float, options: InversionOptions
) -> tuple[Tensor, Tensor, float]:
    """Solve x = z + (high - low) d(x, high) by damped fixed-point iteration, each image by itself.

    An iterate with a larger gap than the best so far is dropped and the damping halved. An image that is done stays as
    it is while others go on, so that no image depends on its batch.
    Returns: x, the last clean prediction, and the largest relative gap left.
    """
    share = (high - low) / high
    shape = (-1, *[1] * (z.ndim - 1))
    x = best = guess
    step = torch.zeros_like(z)
    gap = z.new_full((len(z),), torch.inf)
    damping = torch.full_like(gap, options.damping)
    for _ in range(options.iterations):
        clean = predict(x, high)
        move = z + share * (x - clean) - x
        moved = (move.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-12)).to(gap)
        active = gap > options.tolerance
        better = active & (moved < gap)
        best = torch.where(better.view(shape), x, best)
        step = torch.where(better.view(shape), move, step)
        damping = torch.where(active & ~better, damping / 2, damping)
        gap = torch.where(better, moved, gap)
        x = best + damping.view(shape) * step
        if bool((gap <= options.tolerance).all()):
            break
    return x, clean, float(gap.max())


@torch.no_grad()
def reconstruct(
    denoiser: Denoiser,
    trajectory: Trajectory,
    positive: Context,
    *,
    negative: Negative | None = None,
    guidance_scale: float = 1.0,
    sampler: str = "euler",
    progress: Progress = silent,
) -> Tensor:
    """Sample from the trajectory's noisiest latent to the end of its grid, [B, C, h, w] in model scale.

    With the prompt of the inversion at guidance 1 this is the reconstruction; with another prompt it is DDIM with word
    swap (methods.md, 11.2); with learned or borrowed negatives, guided reconstruction (11.3 to 11.5).
    Raises: MismatchError, ParameterError.
    """
    trajectory.check(denoiser)
    sigmas = trajectory.sigmas[trajectory.first :]
    prompts = EditPrompts(positive, negative, guidance_scale)
    prompts.check(denoiser, sigmas)
    return sample(sampler, predictor(denoiser, prompts), trajectory.latents[0], sigmas, progress)


@dataclass(frozen=True)
class ReconstructionQuality:
    """How close a reconstruction comes, in dB per image, float32 [B].

    Attributes:
        without_vae: against the decoded source latent: what the inversion lost.
        picture: the reconstruction decoded, IMAGE [B, H, W, 3].
        with_vae: against the picture: what the inversion and the VAE lost together; None without a picture.
        vae_only: the decoded source latent against the picture: the best that any inversion can reach.
    """

    without_vae: Tensor
    image: Tensor
    with_vae: Tensor | None = None
    vae_only: Tensor | None = None


def reconstruction_quality(
    codec: LatentCodec, rebuilt: Tensor, clean: Tensor, image: Tensor | None = None
) -> ReconstructionQuality:
    """PSNR of a reconstruction with and without the VAE's own loss.

    Args:
        rebuilt: reconstructed latent, unscaled, [B, C, h, w].    clean: the source latent it should equal.
        image: the picture IMAGE [B, H, W, 3] behind it; padding that the latent has beyond it is not counted.
    Raises: ShapeError.
    """
    result, source = codec.decode(rebuilt), codec.decode(clean)
    if image is None:
        return ReconstructionQuality(psnr(result, source), result)
    image = check_image(image, "image").to(source.device)
    result, source = crop_to(result, *image.shape[1:3]), crop_to(source, *image.shape[1:3])
    return ReconstructionQuality(psnr(result, source), result, psnr(result, image), psnr(source, image))
