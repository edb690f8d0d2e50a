"""DDIM inversion from a clean latent to noise, and back (Song et al. 2021, section 4.3; docs/methods.md, section 5).

A sampler step from sigma `high` to `low` is z_low = z_high - (high - low) d(z_high, high), with the derivative
d = (z - denoised) / sigma. Inversion does not know z_high yet; the modes differ in where they evaluate d:

    next      at sigma `high` with the latent of `low` (null-text inversion, diffusers)
    current   at sigma `low` with the latent of `low` (the paper's equation)
    implicit  at z_high itself, by fixed-point iteration: the exact inverse of the sampler
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.errors import FamilyError, ParameterError
from ..core.guidance import EditPrompts, Negative
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser, LatentCodec
from ..core.samplers import Predict, predictor, sample
from ..core.shapes import check_image, check_latent, crop_to
from ..core.sigmas import check_sigmas, executed_steps
from ..core.trajectory import Trajectory, made_trajectory
from ..evaluation.metrics import psnr
from .regularisation import Regularisation

log = logging.getLogger("editkit")

MODES = ("next", "current", "implicit")


@dataclass(frozen=True)
class InversionOptions:
    """How to invert.

    Attributes:
        mode: "next", "current" or "implicit" (see the module). Flow models have no "next": their latent at one sigma
            is not a rescaled latent of another.
        iterations: implicit: most model calls per step, >= 1. One is about as good as the explicit modes.
        damping: implicit: relaxation factor of the fixed-point iteration, (0, 1]; halved, image by image, where an
            iterate is worse than the one before.
        tolerance: implicit: an image has converged when its iterate moves less than this, relative to its norm.
        regularisation: of the predicted noise before each step (pix2pix-zero). Not for "implicit", whose exact inverse
            it would leave, nor for flow models, which predict no noise.
    """

    mode: str = "next"
    iterations: int = 5
    damping: float = 1.0
    tolerance: float = 1e-5
    regularisation: Regularisation | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ParameterError(f"mode is {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.iterations < 1:
            raise ParameterError(f"iterations is {self.iterations}: at least 1 model call per step is needed")
        if not 0 < self.damping <= 1:
            raise ParameterError(f"damping is {self.damping}: give a number above 0 and up to 1 (1 = no damping)")
        if not self.tolerance > 0:
            raise ParameterError(f"tolerance is {self.tolerance}: give a small number above 0, for example 1e-5")
        if self.regularisation is not None and self.mode == "implicit":
            raise ParameterError(
                "mode is 'implicit', the exact inverse of the sampler, which regularised noise is not: choose 'next' or "
                "'current', or switch the regularisation off"
            )


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
    """Invert a clean latent; one forward pass per step and image, up to `iterations` in mode "implicit".

    Args:
        denoiser: the model.
        latent: clean latent, unscaled, [B, C, h, w].
        context: inversion prompt.
        sigmas: the whole grid [N + 1], falling. If it ends above 0, the latent is taken to be at that sigma already,
            as official code does with the lowest training sigma; a grid that ends with 0 starts from 0.
        options: how to invert.
        ratio: encoding ratio in (0, 1]: fraction of the steps to invert, counted from the clean end.
        negative: negative prompt; needed only where `guidance_scale` is not 1.
        guidance_scale: 1 as published; above it inversion diverges (docs/methods.md, section 16, row 13).
        progress: called after every step with the denoised prediction.
    Returns: the trajectory from the end of the grid to its start, source included.
    Raises: ShapeError, ParameterError, FamilyError for mode "next" with a flow model.
    """
    options = options or InversionOptions()
    sigmas = check_sigmas(sigmas)
    _check_mode(denoiser, options)
    z = denoiser.scale_in(check_latent(latent, "latent", denoiser.channels))
    predict = predictor(denoiser, EditPrompts(context, negative, guidance_scale))
    count = executed_steps(len(sigmas) - 1, ratio)
    rising = sigmas.flip(0).tolist()[: count + 1]
    latents = [z]
    worst = 0.0
    for i, (low, high) in enumerate(pairwise(rising)):
        if options.mode == "implicit":
            guess = _first_guess(latents, rising[: i + 2], denoiser.flow)
            z, denoised, gap = _implicit_step(predict, latents[-1], guess, low, high, options)
            worst = max(worst, gap)
        else:
            z, denoised = _explicit_step(predict, latents[-1], low, high, denoiser.flow, i, options)
        latents.append(z)
        progress(i + 1, count, denoised)
    if worst > options.tolerance:
        log.info("implicit inversion: largest relative gap %.2g (tolerance %.2g)", worst, options.tolerance)
    return made_trajectory(denoiser, latent, latents, sigmas, context)


def _check_mode(denoiser: Denoiser, options: InversionOptions) -> None:
    if denoiser.flow and options.mode == "next":
        raise FamilyError(
            f"mode 'next' is not defined for flow models ({denoiser.family!r}): choose 'implicit' or 'current'"
        )
    if denoiser.flow and options.regularisation is not None:
        raise FamilyError(
            f"flow models ({denoiser.family!r}) predict no noise that could be regularised: switch the regularisation off"
        )


def _rescaled(z: Tensor, low: float, high: float, flow: bool) -> Tensor:
    """The latent of sigma `low` at the scale of `high` (docs/methods.md, section 5: the pitfall of `next`).

    The network divides its input by sqrt(1 + sigma^2). Flow networks use the latent unscaled.
    """
    return z if flow else z * ((1 + high * high) / (1 + low * low)) ** 0.5


def _explicit_step(
    predict: Predict, z: Tensor, low: float, high: float, flow: bool, step: int, options: InversionOptions
) -> tuple[Tensor, Tensor]:
    """One step by a derivative that is evaluated once. At sigma 0 it is 0 / 0: evaluate at `high`.

    Args:
        predict: gives the denoised prediction of a latent and its sigma.
        z: latent [B, C, h, w] at sigma `low`.
        low, high: sigmas of the step.
        flow: whether the model is a flow model.
        step: number of the step, from 0, for the random shifts of the regularisation.
        options: mode and regularisation.
    Returns: the latent at `high` and its denoised prediction.
    """
    if options.mode == "next" or low == 0:
        x = _rescaled(z, low, high, flow)
        sigma = high
    else:
        x = z
        sigma = low
    denoised = predict(x, sigma)
    if options.regularisation is None:
        return z + (high - low) * ((x - denoised) / sigma), denoised
    eps = options.regularisation((x - denoised) / sigma, step)
    return z + (high - low) * eps, x - sigma * eps


def _first_guess(latents: list[Tensor], sigmas: list[float], flow: bool) -> Tensor:
    """The start of the iteration: the line through the last two latents, which needs no model call."""
    if len(latents) == 1:
        return _rescaled(latents[0], sigmas[0], sigmas[1], flow)
    before, low, high = sigmas[-3:]
    return latents[-1] + (latents[-1] - latents[-2]) * ((high - low) / (low - before))


def _implicit_step(
    predict: Predict, z: Tensor, guess: Tensor, low: float, high: float, options: InversionOptions
) -> tuple[Tensor, Tensor, float]:
    """Solve x = z + (high - low) d(x, high) by damped fixed-point iteration, each image by itself.

    An iterate with a larger gap than the best so far is rejected and the damping halved. An image that has converged is
    frozen while the rest of the batch continues, so that no image depends on its batch.

    Args:
        predict: gives the denoised prediction of a latent and its sigma.
        z: latent [B, C, h, w] at sigma `low`.
        guess: start of the iteration, [B, C, h, w].
        low, high: sigmas of the step.
        options: iterations, damping and tolerance.
    Returns: x, the last denoised prediction, and the largest relative gap left.
    """
    fraction = (high - low) / high
    shape = (-1, *[1] * (z.ndim - 1))
    x = best = guess
    step = torch.zeros_like(z)
    gap = z.new_full((len(z),), torch.inf)
    damping = torch.full_like(gap, options.damping)
    for _ in range(options.iterations):
        denoised = predict(x, high)
        move = z + fraction * (x - denoised) - x
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
    return x, denoised, float(gap.max())


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
    """Sample from the noisiest latent of a trajectory to the end of its grid.

    With the inversion prompt at guidance 1 this is the reconstruction; with another prompt it is DDIM with word swap
    (docs/methods.md, section 11.2); with the embeddings of null-text or negative-prompt inversion it is guided
    reconstruction (sections 11.3 to 11.5).

    Args:
        denoiser: the model.
        trajectory: inversion of the image with this model.
        positive: prompt.
        negative: negative prompt, or embeddings per step.
        guidance_scale: classifier-free guidance.
        sampler: name of a sampler (`samplers.sample`).
        progress: called after every step.
    Returns: latent [B, C, h, w], model scale.
    Raises: MismatchError, ParameterError.
    """
    trajectory.check(denoiser)
    sigmas = trajectory.sigmas[trajectory.first :]
    prompts = EditPrompts(positive, negative, guidance_scale)
    prompts.check(denoiser, sigmas)
    return sample(sampler, predictor(denoiser, prompts), trajectory.latents[0], sigmas, progress)


@dataclass(frozen=True)
class ReconstructionQuality:
    """PSNR of a reconstruction in dB per image, float32 [B].

    Attributes:
        without_vae: against the decoded source latent: the error of the inversion.
        image: the decoded reconstruction, IMAGE [B, H, W, 3].
        with_vae: against the image: the error of the inversion and the VAE together; None without an image.
        vae_only: the decoded source latent against the image: the best that any inversion can reach.
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
        codec: the VAE.
        rebuilt: reconstructed latent, unscaled, [B, C, h, w].
        clean: the source latent it should equal.
        image: the image that was encoded, IMAGE [B, H, W, 3]; padding of the latent beyond it does not count.
    Returns: PSNR per image, and the decoded reconstruction.
    Raises: ShapeError.
    """
    result, source = codec.decode(rebuilt), codec.decode(clean)
    if image is None:
        return ReconstructionQuality(psnr(result, source), result)
    image = check_image(image, "image").to(source.device)
    result, source = crop_to(result, *image.shape[1:3]), crop_to(source, *image.shape[1:3])
    return ReconstructionQuality(psnr(result, source), result, psnr(result, image), psnr(source, image))
