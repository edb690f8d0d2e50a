"""LayerDiffusion, stage 1: embeddings of object and background that reconstruct an image (Li et al. 2023, equations 2, 3).

    [e_a, e_b] = argmin E | M (eps - f(x_t, t, [e_a, e_b])) |^2     the network f fixed
    e_opt      = alpha e_a + (1 - alpha) e_b

The error of eps is (D - z_0) / sigma in sigma space, and the error of the velocity for flow models (docs/methods.md, sections
0.2 and 10). The equations leave two points open: M is where the error counts (`EmbeddingOptions.region`), and [e_a, e_b] is
how the network receives both embeddings (`EmbeddingOptions.join`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import check_latent, match_batch
from ..learning.denoising_loss import NoiseError, masked_mean
from ..learning.optimise import OptimiseResult, autocast, learning_mode, own, own_context
from .fitting import check_patience, fit, on_grid, recompute

JOINS = ("concatenate", "average")
REGIONS = ("background", "object", "none")


@dataclass(frozen=True)
class EmbeddingOptions:
    """How embeddings are fitted.

    Attributes:
        steps, lr: Adam's steps and step size, as published.
        alpha: fraction of the object's embedding in the mix of both, 0 to 1.
        join: how the network receives both (the paper leaves it open): "concatenate" them along the tokens, or "average"
            the losses of each embedding alone, for networks with a fixed number of tokens.
        region: where the error counts: "background" excludes the object (the paper's prose), "object" includes nothing
            else, "none" counts everything.
        patience: stop when the mean loss of this many steps is less than 1 % below that of as many before; 0 = never.
        low_memory: gradient checkpointing.
        compute_dtype: of the arithmetic: None = the network's own type; torch.bfloat16.
    """

    steps: int = 500
    lr: float = 1e-3
    alpha: float = 0.7
    join: str = "concatenate"
    region: str = "background"
    patience: int = 0
    low_memory: bool = False
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.join not in JOINS:
            raise ParameterError(f"join is {self.join!r}: choose one of {', '.join(JOINS)}")
        if self.region not in REGIONS:
            raise ParameterError(f"region is {self.region!r}: choose one of {', '.join(REGIONS)}")
        check_share(self.alpha, "alpha")
        check_patience(self.patience)


@dataclass(frozen=True)
class LayeredEmbeddings:
    """The embeddings of stage 1.

    Attributes:
        object: the learned embedding of the object, as long as its prompt.
        background: that of the background; None if there was no background prompt.
        mixed: alpha of the object's and 1 - alpha of the background's (equation 3).
        losses: before each step, mean over the batch.
        steps: steps taken.
        stopped: whether patience ended the optimisation early.
    """

    object: Context
    background: Context | None
    mixed: Context
    losses: list[float]
    steps: int
    stopped: bool


def layered_embeddings(
    denoiser: Denoiser,
    latent: Tensor,
    object_context: Context,
    background_context: Context | None,
    mask: Tensor | None,
    *,
    seeds: Sequence[int],
    options: EmbeddingOptions | None = None,
    progress: Progress = silent,
) -> LayeredEmbeddings:
    """Fit the embeddings of object and background to an image, with the network fixed (equations 2 and 3).

    Every step and image draws its own sigma and noise, and images do not influence each other. One forward pass per image
    and step (two where losses are averaged); no weight receives a gradient.

    Args:
        denoiser: the model.
        latent: the image's clean latent, unscaled, [B, C, h, w].
        object_context, background_context: the prompts, from which the embeddings start, [1 or B, T, D]. Without a
            background the object's embedding is fitted alone.
        mask: the object on the latent grid, [B or 1, h, w] in [0, 1]; None only if `options.region` is "none".
        seeds: one per image.
        options: see `EmbeddingOptions`.
        progress: called after every step; raising there cancels.
    Returns: the learned embeddings, as long as their prompts, their mix, and the losses.
    Raises: ShapeError for latent, mask, prompts or seeds that do not fit together; ParameterError for a region without a
        mask; FamilyError for low_memory with an unknown network; EditError where the loss overflows or memory is short.
    Source: Li et al. 2023, "LayerDiffusion", section 3.2.1. The paper does not say how both embeddings enter the network.
    """
    options = options or EmbeddingOptions()
    latent = check_latent(latent, "latent", denoiser.channels)
    where = _region(mask, latent, options.region)
    if background_context is not None:
        check_same_length(object_context, background_context)
    prompts = [context for context in (object_context, background_context) if context is not None]
    with learning_mode(), recompute(getattr(denoiser, "blocks", ()), options.low_memory):
        clean = own(denoiser.scale_in(latent))
        where, error = own(where, clean.device), NoiseError(denoiser, clean, seeds)
        embeddings = _Embeddings([own_context(prompt) for prompt in prompts], clean)

        def loss(step: int) -> Tensor:
            with autocast(clean.device, options.compute_dtype):
                errors = error(step, embeddings.contexts(options.join))
            return masked_mean(errors, where).mean(0)  # one term per image: each learns as it would alone

        result = fit(embeddings.parameters, loss, options, "fitting the embeddings", denoiser, progress)
    learned = [prompt.with_tokens(tokens) for prompt, tokens in zip(prompts, embeddings.parameters, strict=True)]
    return _result(learned, options.alpha, result, len(clean))


class _Embeddings:
    """The embeddings that learn, one or two.

    Attributes:
        parameters: float32 leaves [B, T, D].
    """

    def __init__(self, prompts: list[Context], like: Tensor) -> None:
        self.prompts = prompts
        self.parameters = [
            own(match_batch(prompt.tokens, len(like), name, "latent").contiguous(), like.device)
            for prompt, name in zip(prompts, ("object", "background"), strict=False)
        ]

    def contexts(self, join: str) -> list[Context]:
        """[e_a, e_b] as the network receives it in one step: one context if concatenated, otherwise one for each."""
        if join == "concatenate" and len(self.parameters) == 2:
            return [self.prompts[0].with_tokens(torch.cat(self.parameters, dim=1))]
        return [prompt.with_tokens(tokens) for prompt, tokens in zip(self.prompts, self.parameters, strict=True)]


def _result(learned: list[Context], alpha: float, result: OptimiseResult, images: int) -> LayeredEmbeddings:
    if len(learned) == 1:
        background, mixed = None, learned[0]
    else:
        background, mixed = learned[1], mix_embeddings(learned[0], learned[1], alpha)
    losses = [loss / images for loss in result.losses]
    return LayeredEmbeddings(learned[0], background, mixed, losses, result.steps, result.stopped)


def mix_embeddings(first: Context, second: Context, share: float) -> Context:
    """e_opt = share e_1 + (1 - share) e_2 (equation 3); everything besides the tokens comes from the first.

    Raises: ShapeError for embeddings of different length; ParameterError for a share outside 0 to 1.
    """
    check_share(share, "alpha")
    check_same_length(first, second)
    a, b = first.tokens, second.tokens.to(first.tokens)
    # share 0 and 1 return one embedding exactly, even if the other is not finite
    return first.with_tokens(a if share == 1 else b if share == 0 else share * a + (1 - share) * b)


def check_same_length(first: Context, second: Context) -> None:
    """Raises ShapeError unless two embeddings [R, T, D] can be mixed."""
    if first.tokens.shape[1:] != second.tokens.shape[1:]:
        raise ShapeError(
            f"object and background have {list(first.tokens.shape[1:])} and {list(second.tokens.shape[1:])} tokens and"
            " channels: encode both with one CLIP, each in at most 75 words, so that they can be mixed"
        )


def check_share(share: float, name: str) -> None:
    """Raises ParameterError unless `share` is in 0 to 1."""
    if not 0 <= share <= 1:
        raise ParameterError(f"{name} is {share}: give 0 to 1")


def _region(mask: Tensor | None, latent: Tensor, region: str) -> Tensor:
    """M of equation 2: where the error counts, [B, 1, h, w]."""
    if region == "none":
        return torch.ones_like(latent[:, :1])
    if mask is None:
        raise ParameterError(f"there is no mask, but the error counts in the {region}: connect a mask, or choose none")
    mask = on_grid(mask, latent, "mask")
    return 1 - mask if region == "background" else mask
