"""Imagic: edit an image by a target text alone (Kawar et al. 2023; docs/methods.md, section 11.8).

    1. fit the embedding of the target text to the image, the network fixed:       e_tgt -> e_opt
    2. fit the network to the image, the embedding e_opt fixed
    3. sample with eta e_tgt + (1 - eta) e_opt

Steps 1 and 2 are the two stages of LayerDiffusion with one embedding and without masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from .core.progress import Progress, StagedProgress, silent
from .core.protocols import Context, Denoiser, TunableDenoiser
from .core.tune_plan import TunePlan
from .layerdiffusion.embeddings import (
    EmbeddingOptions,
    LayeredEmbeddings,
    check_share,
    layered_embeddings,
    mix_embeddings,
)
from .layerdiffusion.finetune import LayeredTuning, TuneOptions, layered_tune

EMBEDDINGS = EmbeddingOptions(steps=1000, lr=2e-3, region="none")
PUBLISHED = TuneOptions(steps=1500, lr=5e-7, object_weight=1.0, background_weight=0.0)
LIGHT = TuneOptions(plan=TunePlan("lora"), steps=500, lr=1e-4, object_weight=1.0, background_weight=0.0)


@dataclass(frozen=True)
class Imagic:
    """The result of Imagic.

    Attributes:
        context: the prompt of step 3: eta e_tgt + (1 - eta) e_opt.
        embeddings: the result of step 1; its `object` is e_opt.
        tuning: the result of step 2.
    """

    context: Context
    embeddings: LayeredEmbeddings
    tuning: LayeredTuning


def imagic(
    opened: AbstractContextManager[Denoiser],
    tunable: TunableDenoiser,
    latent: Tensor,
    target: Context,
    *,
    eta: float = 0.7,
    seeds: Sequence[int],
    embeddings: EmbeddingOptions = EMBEDDINGS,
    tuning: TuneOptions = PUBLISHED,
    progress: Progress = silent,
) -> Imagic:
    """Fit an embedding and a copy of the network to an image.

    Args:
        opened: context manager of the model while it predicts. It is closed before step 2, so that the model and the copy
            that learns need not fit into memory together.
        tunable: the same model.
        latent: the image's clean latent, unscaled, [B, C, h, w].
        target: the target text's embedding e_tgt, [1 or B, T, D].
        eta: 0 = e_opt, which reconstructs the image; 1 = e_tgt. The paper uses 0.6 to 0.8.
        seeds: one per image.
        embeddings: options of step 1.
        tuning: options of step 2.
        progress: called after every step of both; raising there cancels.
    Returns: the prompt to sample with, and the results of both steps.
    Raises: ParameterError for an eta outside 0 to 1; else as `layered_embeddings` and `layered_tune`.
    Source: Kawar et al. 2023, "Imagic", section 3. The object's weight 1 and the background's 0 leave the plain loss.
    """
    check_share(eta, "eta")
    legs = StagedProgress(progress, (embeddings.steps, tuning.steps))
    with opened as model:
        fitted = layered_embeddings(
            model, latent, target, None, None, seeds=seeds, options=embeddings, progress=legs(0)
        )
    tuned = layered_tune(tunable, latent, None, fitted.object, None, seeds=seeds, options=tuning, progress=legs(1))
    return Imagic(mix_embeddings(target, fitted.object, eta), fitted, tuned)
