"""LayerDiffusion: one picture's subject and its background change together (Li et al. 2023; methods.md, section 10).

Two stages learn from the picture. `layered_embeddings` fits two text embeddings, one of the subject and one of the
background, with the network fixed; `layered_tune` (`layered_tune.py`) fits a copy of the network to the subject of the
picture and to the background of a reference, with the embeddings fixed. Sampling then starts from noise and alternates
between conditions (`IterativeGuidance`). There is no official code. Imagic (`imagic.py`) is the same with one embedding
and without masks.

The loss is the squared error of the predicted noise, in sigma space (D - z_0) / sigma: for eps and v models the error of
eps, for flow models that of the velocity (methods.md, 0.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import FamilyError, ParameterError, ShapeError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import check_latent, check_mask, match_batch
from ..core.sigmas import step_of_sigma
from ..core.trajectory import SIGMA_TOLERANCE, check_grid
from ..learning.denoising_loss import NoiseError, masked_mean
from ..learning.memory import measured
from ..learning.optimise import (
    Levelled,
    OptimiseResult,
    autocast,
    learning_mode,
    optimise,
    own,
    own_context,
    recomputing,
)

JOINS = ("concatenate", "average")
REGIONS = ("background", "object", "none")


@dataclass(frozen=True)
class EmbeddingOptions:
    """How embeddings are fitted.

    Attributes:
        steps, lr: Adam steps and step size, as published.
        alpha: share of the subject's embedding in the mix of both, 0 to 1.
        join: how the network sees both (the paper leaves it open): "concatenate" them along the tokens, or "average" the
            losses of each alone, for networks with a fixed count of tokens.
        region: where the error counts: "background" keeps the subject out of it (the paper's prose), "object" the
            opposite, "none" counts everything.
        patience: stop when the mean loss of this many steps is less than 1 % below that of as many before; 0 = never.
        low_memory: blocks compute again instead of keeping their activations.
        half: arithmetic, None = the network's own; torch.bfloat16.
    """

    steps: int = 500
    lr: float = 1e-3
    alpha: float = 0.7
    join: str = "concatenate"
    region: str = "background"
    patience: int = 0
    low_memory: bool = False
    half: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.join not in JOINS:
            raise ParameterError(f"join is {self.join!r}: choose one of {', '.join(JOINS)}")
        if self.region not in REGIONS:
            raise ParameterError(f"region is {self.region!r}: choose one of {', '.join(REGIONS)}")
        check_share(self.alpha, "alpha")
        check_patience(self.patience)


@dataclass(frozen=True)
class LayeredEmbeddings:
    """What `layered_embeddings` found.

    Attributes:
        subject, background: the learned embeddings, each as long as its prompt; background is None where there was none.
        mixed: alpha of the first and the rest of the second (equation 3).
        losses: before every step, mean over the batch.    steps: taken.    stopped: whether patience ended it.
    """

    subject: Context
    background: Context | None
    mixed: Context
    losses: list[float]
    steps: int
    stopped: bool


# ------------------------------------------------------------------------------------------------- stage 1: embeddings
def layered_embeddings(
    denoiser: Denoiser,
    latent: Tensor,
    subject: Context,
    background: Context | None,
    mask: Tensor | None,
    *,
    seeds: Sequence[int],
    options: EmbeddingOptions | None = None,
    progress: Progress = silent,
) -> LayeredEmbeddings:
    """Fit two embeddings to a picture, the network fixed (equations 2 and 3).

    Every step and image draws a level and noise of its own; images do not influence each other. One row per image and
    step (two where losses are averaged); no weight receives a gradient.

    Args:
        latent: clean, unscaled, [B, C, h, w].
        subject, background: where the embeddings start. Without a background the first is fitted alone.
        mask: the subject on the latent grid, [B or 1, h, w] in [0, 1]; None only where `options.region` is "none".
        seeds: one for each image.
        progress: called after every step; raising there cancels.
    Raises: ShapeError, ParameterError; EditError where the loss overflows or a step does not fit into memory.
    """
    options = options or EmbeddingOptions()
    latent = check_latent(latent, "latent", denoiser.channels)
    where = _region(mask, latent, options.region)
    if background is not None:
        check_same_length(subject, background)
    with learning_mode(), recompute(getattr(denoiser, "blocks", ()), options.low_memory):
        clean = own(denoiser.scale_in(latent))
        where, error = own(where, clean.device), NoiseError(denoiser, clean, seeds)
        pair = _Pair(own_context(subject), None if background is None else own_context(background), clean)

        def loss(step: int) -> Tensor:
            with autocast(clean.device, options.half):
                errors = error(step, pair.views(options.join))
            return masked_mean(errors, where).mean(0)  # one term per image: each learns as it would alone

        result = fit(pair.learning, loss, options, "fitting the embeddings", denoiser, progress)
    learned = [subject.with_tokens(pair.learning[0])]
    if background is not None:
        learned.append(background.with_tokens(pair.learning[1]))
    mixed = learned[0] if background is None else mix_embeddings(learned[0], learned[1], options.alpha)
    losses = [value / len(clean) for value in result.losses]
    return LayeredEmbeddings(learned[0], (*learned, None)[1], mixed, losses, result.steps, result.stopped)


class _Pair:
    """The embeddings that learn: a leaf [B, T, D] for each, and how the network is shown them."""

    def __init__(self, subject: Context, background: Context | None, like: Tensor) -> None:
        self.contexts = [context for context in (subject, background) if context is not None]
        self.learning = [
            own(match_batch(context.tokens, len(like), name, "latent").contiguous(), like.device)
            for context, name in zip(self.contexts, ("object", "background"), strict=False)
        ]

    def views(self, join: str) -> list[Context]:
        """The contexts of one evaluation, made anew for every step."""
        if join == "concatenate" and len(self.learning) == 2:
            return [self.contexts[0].with_tokens(torch.cat(self.learning, dim=1))]
        return [context.with_tokens(tokens) for context, tokens in zip(self.contexts, self.learning, strict=True)]


def mix_embeddings(first: Context, second: Context, share: float) -> Context:
    """`share` of the first embedding and the rest of the second (equation 3); everything else is the first's.

    Raises: ShapeError for embeddings of different length; ParameterError for a share outside 0 to 1.
    """
    check_share(share, "alpha")
    check_same_length(first, second)
    a, b = first.tokens, second.tokens.to(first.tokens)
    # either end exactly, whatever the other holds
    return first.with_tokens(a if share == 1 else b if share == 0 else share * a + (1 - share) * b)


def check_same_length(first: Context, second: Context) -> None:
    """Raises ShapeError unless two embeddings [R, T, D] can be mixed."""
    if first.tokens.shape[1:] != second.tokens.shape[1:]:
        raise ShapeError(
            f"object and background have {list(first.tokens.shape[1:])} and {list(second.tokens.shape[1:])} tokens and"
            " channels: encode both with one CLIP, each in at most 75 words, so that they can be mixed"
        )


def check_share(share: float, name: str) -> None:
    """Raises ParameterError unless `share` lies in 0 to 1."""
    if not 0 <= share <= 1:
        raise ParameterError(f"{name} is {share}: give 0 to 1")


def _region(mask: Tensor | None, latent: Tensor, region: str) -> Tensor:
    """Where the error counts, [B, 1, h, w]."""
    if region == "none":
        return torch.ones_like(latent[:, :1])
    if mask is None:
        raise ParameterError(
            f"there is no mask, but the error is to count in the {region}: connect one, or choose none"
        )
    mask = on_grid(mask, latent, "mask")
    return 1 - mask if region == "background" else mask


def on_grid(mask: Tensor, latent: Tensor, socket: str) -> Tensor:
    """A latent mask [B or 1, h, w] as [B, 1, h, w]. Raises ShapeError if it belongs to another grid or batch."""
    mask = check_mask(mask, socket)
    if mask.shape[-2:] != latent.shape[-2:]:
        raise ShapeError(
            f"{socket} has {mask.shape[-1]} x {mask.shape[-2]} cells but the latent {latent.shape[-1]} x"
            f" {latent.shape[-2]}: make the latent mask from this LATENT"
        )
    return match_batch(mask, len(latent), socket, "latent")[:, None]


# ------------------------------------------------------------------------------------------------------------ sampling
def takes_object(step: int, steps: int, phase: int = 0) -> bool:
    """Whether `step` (from 0) of a run of `steps` follows the subject's embedding alone (equation 8).

    t counts down from `steps` to 1, and even t do; so a run of 50 begins with it and ends with the mix. `phase` 1 swaps.
    """
    return (steps - step + phase) % 2 == 0


@dataclass(frozen=True)
class IterativeGuidance:
    """Conditions that alternate from step to step (a `guidance.Positive`): the subject's alone, then the mix.

    Attributes:
        sigmas: the grid on which steps are counted, [N + 1]; the last part of it counts the same, from its end.
        phase: 0 as published; 1 swaps the two.
    """

    subject: Context
    mixed: Context
    sigmas: Tensor
    phase: int = 0

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """See `guidance.Positive`; the prompts suit any model of their text encoder."""
        self.check_sigmas(sigmas)

    def check_sigmas(self, sigmas: Tensor) -> None:
        """Raises MismatchError unless `sigmas` is the grid, or neighbouring levels of it."""
        if len(sigmas) > 1:
            to_there = self.sigmas >= float(sigmas[-1]) * (1 - SIGMA_TOLERANCE)
            check_grid(self.sigmas[to_there], sigmas, "the alternating guider")

    def at_sigma(self, sigma: float) -> Context:
        """The condition of the step that moves through `sigma`, whatever else the sampler evaluates there."""
        step = step_of_sigma(float(sigma), self.sigmas)
        return self.subject if takes_object(step, len(self.sigmas) - 1, self.phase) else self.mixed


# ------------------------------------------------------------------------------------------------------------- learning
def recompute(blocks: Sequence[torch.nn.Module], wanted: bool) -> AbstractContextManager[None]:
    """`recomputing` where it is `wanted`. Raises FamilyError for a network whose blocks are not known."""
    if wanted and not blocks:
        raise FamilyError("this model's blocks are not known, so low_memory cannot work: switch it off")
    return recomputing(blocks if wanted else ())


class LearningOptions(Protocol):
    """What both stages ask of an optimisation."""

    @property
    def steps(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def patience(self) -> int: ...


def fit(
    learning: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    options: LearningOptions,
    what: str,
    denoiser: Denoiser,
    progress: Progress,
) -> OptimiseResult:
    """Minimise `loss` over `learning`. Raises EditError before the first step if a step does not fit into memory."""
    with measured(learning) as need:
        loss(0)
    need.check(denoiser.device, what, getattr(denoiser, "make_room", None))
    stop = Levelled(options.patience) if options.patience else None
    return optimise(learning, loss, steps=options.steps, lr=options.lr, stop=stop, progress=progress)


def check_patience(patience: int) -> None:
    """Raises ParameterError for a negative count of steps."""
    if patience < 0:
        raise ParameterError(f"patience is {patience}: give a number of steps, or 0 for all of them")
