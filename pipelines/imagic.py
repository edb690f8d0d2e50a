"""Imagic: a picture, described by the text of what it should become (Kawar et al. 2023; methods.md, 11.8).

LayerDiffusion's two stages with one embedding and no masks: the target's embedding is fitted to the picture, the network
is fitted at that embedding, and one samples somewhere between both embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from .core.progress import Legs, Progress, silent
from .core.protocols import Context, Denoiser, TunableDenoiser
from .layerdiffusion.embeddings import (
    EmbeddingOptions,
    LayeredEmbeddings,
    check_share,
    layered_embeddings,
    mix_embeddings,
)
from .layerdiffusion.finetune import LayeredTuning, TuneOptions, layered_tune
from .learning.weight_deltas import TunePlan

EMBEDDINGS = EmbeddingOptions(steps=1000, lr=2e-3, region="none")
PUBLISHED = TuneOptions(steps=1500, lr=5e-7, object_weight=1.0, background_weight=0.0)
LIGHT = TuneOptions(plan=TunePlan("lora"), steps=500, lr=1e-4, object_weight=1.0, background_weight=0.0)


@dataclass(frozen=True)
class Imagic:
    """What Imagic found.

    Attributes:
        context: to sample with: `eta` of the target's embedding and the rest of the fitted one.
        embeddings: of stage 1; its `subject` is the fitted embedding.
        tuning: of stage 2.
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
    """Fit embedding and network to a picture. Raises as `layered_embeddings` and `layered_tune` do.

    Args:
        opened: the model while it predicts; it is closed before its copy learns, so that both need not fit at once.
        tunable: the same model.
        latent: the picture, clean, unscaled, [B, C, h, w].
        target: what the picture should become.
        eta: 0 = the fitted embedding, which gives the picture back; 1 = the target's; 0.6 to 0.8 is usual.
        seeds: one for each image.
    """
    check_share(eta, "eta")
    legs = Legs(progress, (embeddings.steps, tuning.steps))
    with opened as model:
        fitted = layered_embeddings(
            model, latent, target, None, None, seeds=seeds, options=embeddings, progress=legs(0)
        )
    tuned = layered_tune(tunable, latent, None, fitted.subject, None, seeds=seeds, options=tuning, progress=legs(1))
    return Imagic(mix_embeddings(target, fitted.subject, eta), fitted, tuned)
