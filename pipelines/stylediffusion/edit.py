"""Edits from a StyleDiffusion inversion: P2Plus, SDEdit starts, and style transfer.

(Li et al. 2023, sections 3.4, 5.2.5 and 5.2.7; docs/methods.md, sections 8 and 9.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..attention.p2p import P2PControl, P2POptions
from ..attention.pair_loop import PairPrompts, PairResult, pair_edit
from ..attention.plug_and_play import PlugAndPlay, PlugAndPlayOptions
from ..attention.prompts.prompt_edit import PromptEdit
from ..core.errors import MismatchError, ShapeError
from ..core.guidance import Negative
from ..core.noise import seeded_noise, start_latent
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.sigmas import executed_steps
from ..core.trajectory import Trajectory, context_digest
from .control import StyleControl
from .value_embeddings import ValueEmbeddings


@dataclass(frozen=True)
class StyleEditOptions:
    """How long the target uses what the source has, in fractions of the steps; defaults of the official README.

    Attributes:
        value_until: tau_v, the fraction of the steps in which the target uses value embeddings, 0 to 1.
        attention: P2Plus: tau_c and tau_s 0.6, tau_u 0 (0.5 for large changes of structure).
    """

    value_until: float = 0.5
    attention: P2POptions = field(default_factory=lambda: P2POptions(cross_until=0.6, self_until=0.6))


@dataclass(frozen=True)
class NoisedStart:
    """SDEdit's start: the source with noise added, instead of its inversion (section 5.2.5).

    Attributes:
        strength: fraction of the steps that run, above 0 and up to 1 (pure noise).
        seeds: one per image, for the noise.
    """

    strength: float
    seeds: Sequence[int]


@torch.no_grad()
def style_edit(
    denoiser: Denoiser,
    embeddings: ValueEmbeddings,
    edit: PromptEdit,
    negative: Negative | None,
    *,
    guidance_scale: float | None = None,
    options: StyleEditOptions | None = None,
    start: NoisedStart | None = None,
    progress: Progress = silent,
) -> PairResult:
    """Edit an inverted image by its prompt with value embeddings and P2Plus.

    The source uses value embeddings in every step, the target until tau_v.

    Args:
        denoiser: the model that made the inversion.
        embeddings: of the inversion.
        edit: source and target prompt, aligned; the source prompt is that of the inversion.
        negative: the negative prompt; the one of the inversion gives its reconstruction. None at scale 1.
        guidance_scale: None = the scale of the inversion.
        options: tau_v and P2Plus.
        start: SDEdit's start; None = the inversion. Fractions of the steps refer to the whole grid in both cases.
        progress: called after every step; raising there cancels.
    Returns: source and target at the end of the grid, [B, C, h, w] each, model scale.
    Raises: MismatchError for another model, source prompt or grid, or a start before the first learned step; ShapeError
        for prompts of another length, or seeds that are not one per image; ParameterError for a scale other than 1
        without a negative; FamilyError for attention that cannot be controlled.
    Source: Li et al. 2023, section 3.4; docs/methods.md, sections 8 and 9.
    """
    options = options or StyleEditOptions()
    trajectory = embeddings.trajectory_for(denoiser)
    if context_digest(edit.source) != trajectory.prompt:
        raise MismatchError(
            "the edit's source prompt is not the one that the value embeddings were learned with: align from the same text"
        )
    embeddings.check_text(edit.target, "prompt")
    trajectory = trajectory if start is None else _noised(denoiser, trajectory, start)
    control = StyleControl(
        embeddings.to(denoiser.device),
        P2PControl(edit, embeddings.sigmas, options.attention),
        target_until=options.value_until,
    )
    scale = embeddings.guidance_scale if guidance_scale is None else guidance_scale
    return pair_edit(
        denoiser, PairPrompts(edit.source, edit.target, negative, scale), control, trajectory, progress=progress
    )


def _noised(denoiser: Denoiser, trajectory: Trajectory, start: NoisedStart) -> Trajectory:
    """SDEdit's source at every step: the source image with one noise, scaled to each sigma, as a trajectory."""
    first = trajectory.steps - executed_steps(trajectory.steps, start.strength)
    if first < trajectory.first:
        raise MismatchError(
            f"strength {start.strength} starts at step {first} but value embeddings were learned from step"
            f" {trajectory.first} on: lower the strength, or invert with a larger encoding ratio"
        )
    if len(start.seeds) != trajectory.batch:
        raise ShapeError(f"there are {len(start.seeds)} seeds but {trajectory.batch} images: give one seed per image")
    noise = seeded_noise(trajectory.source.shape[1:], start.seeds, trajectory.source.device)
    sigmas = trajectory.sigmas[first:].tolist()
    latents = [denoiser.noise(trajectory.source, noise, sigma) for sigma in sigmas[:-1]]
    latents[0] = start_latent(denoiser, trajectory.source, sigmas[0], noise, from_source=start.strength < 1)
    return replace(trajectory, latents=torch.stack([*latents, trajectory.source]))


def style_transfer(
    denoiser: Denoiser,
    embeddings: ValueEmbeddings,
    content: Trajectory,
    source: Context,
    target: Context,
    negative: Negative | None,
    *,
    guidance_scale: float | None = None,
    options: PlugAndPlayOptions | None = None,
    progress: Progress = silent,
) -> PairResult:
    """Give the content image the style of the image that `embeddings` were learned from.

    Sampling starts from the noisiest latent of the content's inversion. It uses the value embeddings of the style and injects
    the decoder features of the content. The paper names neither layers nor steps; ours default to those of Plug-and-Play.

    Args:
        denoiser: the model that made both inversions.
        embeddings: of the style image's inversion.
        content: inversion of the content image on the same grid.
        source: the prompt of the content's inversion.
        target: a prompt for the result; its keys stay those of the text.
        negative: the negative prompt; None at scale 1.
        guidance_scale: None = the scale of the style's inversion.
        options: layers and fractions of the steps of the injection.
        progress: called after every step; raising there cancels.
    Returns: the content's own latents and the result at the end of the grid, [B, C, h, w] each, model scale.
    Raises: MismatchError for another model or grid, or a content trajectory that starts before the first learned step;
        ShapeError for a prompt of another length; ParameterError for a scale other than 1 without a negative;
        FamilyError for attention that cannot be controlled.
    Source: Li et al. 2023, section 5.2.7 and figure 20; no code was published.
    """
    embeddings.check(denoiser, content.sigmas)
    embeddings.check_text(target, "prompt")
    if content.first < embeddings.first:
        raise MismatchError(
            f"the content's trajectory starts at step {content.first} but value embeddings were learned from step"
            f" {embeddings.first} on: invert both images with one encoding ratio"
        )
    inner = PlugAndPlay(embeddings.sigmas, options)
    control = StyleControl(embeddings.to(denoiser.device), inner, source=False)
    scale = embeddings.guidance_scale if guidance_scale is None else guidance_scale
    return pair_edit(denoiser, PairPrompts(source, target, negative, scale), control, content, progress=progress)


__all__ = ["NoisedStart", "StyleEditOptions", "style_edit", "style_transfer"]
