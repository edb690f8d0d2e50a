"""Edits on a StyleDiffusion inversion: words by P2Plus, other starts by SDEdit, and the style of another picture.

(Li et al. 2023, sections 3.4, 5.2.5 and 5.2.7; methods.md, 8 and 9.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..attention.p2p import P2PControl, P2POptions
from ..attention.pair_loop import PairPrompts, PairResult, pair_edit
from ..attention.plug_and_play import FeatureInjection, PlugAndPlayOptions
from ..attention.prompts.prompt_edit import PromptEdit
from ..core.errors import MismatchError, ShapeError
from ..core.guidance import Negative
from ..core.noise import seeded_noise, start_latent
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.sigmas import executed
from ..core.trajectory import Trajectory, context_digest
from .control import StyleControl
from .value_embeddings import ValueEmbeddings


@dataclass(frozen=True)
class StyleEditOptions:
    """Defaults as the official README recommends; parts of the run from 0 (never) to 1 (all of it).

    Attributes:
        value_until: tau_v, the part in which the target has the picture's values.
        attention: the gates of P2Plus on top: tau_c and tau_s 0.6, tau_u 0 (0.5 where the structure changes a lot).
    """

    value_until: float = 0.5
    attention: P2POptions = field(default_factory=lambda: P2POptions(cross_until=0.6, self_until=0.6))


@dataclass(frozen=True)
class NoisedStart:
    """SDEdit's start: the picture is noised part of the way up, not inverted (section 5.2.5).

    Attributes:
        strength: part of the grid that runs, above 0 and up to 1, which forgets the picture.
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
    """Edit the inverted picture by its words. Neither the image encoder nor the networks are needed.

    The source has its values at every step, the target its own text's, scaled and shifted, until tau_v.

    Args:
        edit: from the prompt that the embeddings were learned with.
        negative: the one that they were learned with, for the same reconstruction.
        guidance_scale: None = what they were learned for.
        start: where the target begins, and what its source rows are; None = the inversion. Parts of the run count on the
            whole grid in both cases.
    Raises: MismatchError, ShapeError, ParameterError, FamilyError.
    """
    options, path = options or StyleEditOptions(), embeddings.trajectory_for(denoiser)
    if context_digest(edit.source) != path.prompt:
        raise MismatchError(
            "the edit's source prompt is not the one that the values were learned with: align from the same text"
        )
    embeddings.check_text(edit.target, "prompt")
    path = path if start is None else _noised(denoiser, path, start)
    control = StyleControl(
        embeddings.to(denoiser.device), P2PControl(edit, embeddings.sigmas, options.attention),
        target_until=options.value_until,
    )  # fmt: skip
    scale = embeddings.guidance_scale if guidance_scale is None else guidance_scale
    return pair_edit(denoiser, PairPrompts(edit.source, edit.target, negative, scale), control, path, progress=progress)


def _noised(denoiser: Denoiser, path: Trajectory, start: NoisedStart) -> Trajectory:
    """The straight line from the source to its noise, as the trajectory that source and target follow."""
    first = path.steps - executed(path.steps, start.strength)
    if first < path.first:
        raise MismatchError(
            f"strength {start.strength} starts at step {first} but values were learned from step {path.first} on: lower the"
            " strength, or invert with a larger encoding ratio"
        )
    if len(start.seeds) != path.batch:
        raise ShapeError(f"there are {len(start.seeds)} seeds but {path.batch} images: give one seed per image")
    noise = seeded_noise(path.source.shape[1:], start.seeds, path.source.device)
    levels = path.sigmas[first:].tolist()
    latents = [denoiser.noise(path.source, noise, level) for level in levels[:-1]]
    latents[0] = start_latent(denoiser, path.source, levels[0], noise, from_source=start.strength < 1)
    return replace(path, latents=torch.stack([*latents, path.source]))


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
    """The content picture in the style of the one that `embeddings` were learned from (section 5.2.7).

    Sampling starts from the content's noisiest latent with the style's values, and takes the content's features in the
    decoder. The paper names neither layers nor steps: those of Plug-and-Play are the default.

    Args:
        source: the prompt of the content's inversion.    target: what the result shows; its keys stay the text's.
    Raises: MismatchError, ShapeError, ParameterError, FamilyError.
    """
    embeddings.check(denoiser, content.sigmas)
    embeddings.check_text(target, "prompt")
    if content.first < embeddings.first:
        raise MismatchError(
            f"the content's trajectory starts at step {content.first} but values were learned from step"
            f" {embeddings.first} on: invert both pictures with one encoding ratio"
        )
    inner = FeatureInjection(embeddings.sigmas, options)
    control = StyleControl(embeddings.to(denoiser.device), inner, source=False)
    scale = embeddings.guidance_scale if guidance_scale is None else guidance_scale
    return pair_edit(denoiser, PairPrompts(source, target, negative, scale), control, content, progress=progress)


__all__ = ["NoisedStart", "StyleEditOptions", "style_edit", "style_transfer"]
