"""What both stages of LayerDiffusion share: the memory check, early stopping and gradient checkpointing around a fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import FamilyError, ParameterError, ShapeError
from ..core.progress import Progress
from ..core.protocols import Denoiser
from ..core.shapes import check_mask, match_batch
from ..learning.early_stopping import MeanPlateau
from ..learning.memory import check_step_memory
from ..learning.optimise import OptimiseResult, optimise, recomputing


class LearningOptions(Protocol):
    """The options of an optimisation that both stages have."""

    @property
    def steps(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def patience(self) -> int: ...


def fit(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    options: LearningOptions,
    what: str,
    denoiser: Denoiser,
    progress: Progress,
) -> OptimiseResult:
    """Minimise a loss over `parameters`. Evaluates it once more at the start, to estimate the memory of a step.

    Args:
        parameters: float32 leaves.
        loss: function of the step (from 0), see `optimise`.
        options: steps, step size and patience.
        what: the optimisation's name, for errors.
        denoiser: the model that the loss evaluates.
        progress: called after every step; raising there cancels.
    Returns: the losses, and how many steps were taken. The parameters have learned in place.
    Raises: EditError before the first step if a step does not fit into memory, and where the loss overflows.
    """
    check_step_memory(parameters, lambda: loss(0), denoiser, what)
    stop = MeanPlateau(options.patience) if options.patience else None
    return optimise(parameters, loss, steps=options.steps, lr=options.lr, stop=stop, progress=progress)


def recompute(blocks: Sequence[torch.nn.Module], wanted: bool) -> AbstractContextManager[None]:
    """Gradient checkpointing if it is wanted. Raises FamilyError for a network whose blocks are not known."""
    if wanted and not blocks:
        raise FamilyError("this model's blocks are not known, so low_memory cannot work: switch it off")
    return recomputing(blocks if wanted else ())


def check_patience(patience: int) -> None:
    """Raises ParameterError for a negative number of steps."""
    if patience < 0:
        raise ParameterError(f"patience is {patience}: give a number of steps, or 0 for all of them")


def on_grid(mask: Tensor, latent: Tensor, socket: str) -> Tensor:
    """A latent mask [B or 1, h, w] as [B, 1, h, w]. Raises ShapeError for a mask of another grid or batch."""
    mask = check_mask(mask, socket)
    if mask.shape[-2:] != latent.shape[-2:]:
        raise ShapeError(
            f"{socket} has {mask.shape[-1]} x {mask.shape[-2]} latent pixels but the latent {latent.shape[-1]} x"
            f" {latent.shape[-2]}: make the latent mask from this LATENT"
        )
    return match_batch(mask, len(latent), socket, "latent")[:, None]
