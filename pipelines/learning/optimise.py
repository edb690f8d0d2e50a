"""The one optimiser loop of everything that learns at edit time: decoder weights, latents, embeddings, mapping networks.

Only the listed parameters learn. Everything else stays frozen, because gradients are requested for these parameters by
`torch.autograd.grad` and never accumulate in a module. The parameters are float32 copies (master weights), never the
user's own weights. Randomness comes from the losses alone, which draw by the number of the step (`noise.seeded_draw`).

Beside the loop: `learning_mode` (out of the host's inference mode), `own` (copies that autograd may save), `recomputing`
(gradient checkpointing), `autocast`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import EditError, ParameterError
from ..core.progress import LossProgress, Progress, refresh_seconds, silent, stop_requested
from ..core.protocols import Context
from .early_stopping import StopRule
from .in_use import deterministic_convolutions, in_use

OBSERVE_EVERY = 25  # iterations between two copies of the loss history from the device


@dataclass(frozen=True)
class OptimiseResult:
    """The course of an optimisation.

    Attributes:
        losses: total loss before each step, oldest first.
        terms: the terms of the loss, one list of K per step.
        steps: steps taken.
        stopped: whether the stop rule ended the optimisation before the last step.
    """

    losses: list[float]
    terms: list[list[float]]
    steps: int
    stopped: bool


@contextmanager
def learning_mode() -> Iterator[None]:
    """Gradients on, inference mode off and convolutions deterministic; the host's settings return afterwards."""
    with deterministic_convolutions(), torch.inference_mode(False), torch.enable_grad():
        yield


def own(value: Tensor, device: torch.device | None = None) -> Tensor:
    """A detached float32 copy that autograd may save. Call it in `learning_mode`: hosts pass inference tensors."""
    return value.detach().to(device=device, dtype=torch.float32, copy=True)


def own_context(context: Context) -> Context:
    """`own` for the embeddings of a prompt; what the host attached to it stays."""
    pooled = None if context.pooled is None else own(context.pooled)
    return replace(context, tokens=own(context.tokens), pooled=pooled)


def optimise(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float | Callable[[int], float],
    betas: tuple[float, float] = (0.9, 0.999),
    rule: Callable[[Sequence[Tensor], float], torch.optim.Optimizer] | None = None,
    stop: StopRule | None = None,
    progress: Progress = silent,
) -> OptimiseResult:
    """Minimise a loss over `parameters` with Adam or another rule, in place (docs/methods.md, sections 3 and 17).

    Args:
        parameters: float32 leaves, made in `learning_mode`. Only they receive gradients; they are frozen again at the end.
        loss: function of the step (from 0) that returns a scalar, or terms [K] whose sum is minimised.
        steps: iterations, >= 0.
        lr: step size > 0, or a function of the step.
        betas: Adam's decay rates.
        rule: makes the optimiser of parameters and learning rate; None is Adam.
        stop: called after every `stop.every` steps; True ends the loop.
        progress: called after every step; raising there cancels. A `LossProgress` also receives the loss curve, and a
            `StoppableProgress` may end the loop.
    Returns: the loss history. It stays on the device until it is needed, so that no step waits for a copy to the CPU.
    Raises: ParameterError; EditError when the loss is no longer a number. Gradients and optimiser state are released in
        every outcome. After an error the parameters hold the last completed step.
    """
    _check(parameters, steps, lr)
    history: list[Tensor] = []
    stopped, observer = False, _Observer(steps, stop, progress)
    with learning_mode():
        for parameter in parameters:
            parameter.requires_grad_(True)
        make = rule or partial(torch.optim.Adam, betas=betas)
        optimiser = make(parameters, _rate(lr, 0))
        try:
            for step in range(steps):
                history.append(_step(parameters, loss(step), optimiser, _rate(lr, step)))
                stopped = observer(step + 1, history)
                if stopped:
                    break
            return _result(history, stopped)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            optimiser.state.clear()
            history.clear()


class _Observer:
    """Reports every step and says whether the optimisation ends with it."""

    def __init__(self, steps: int, stop: StopRule | None, progress: Progress) -> None:
        self.steps, self.stop = steps, stop
        self.progress = progress
        self.every = stop.every if stop else OBSERVE_EVERY
        self.refresh = refresh_seconds(progress)
        self.shown = time.monotonic()

    def __call__(self, done: int, history: list[Tensor]) -> bool:
        stopped, last = False, done == self.steps
        if done % self.every == 0 or last:
            values = _read(history)
            stopped = self.stop is not None and not last and self.stop(values)
            show_losses(self.progress, values)
        elif time.monotonic() - self.shown >= self.refresh:
            self.shown = time.monotonic()
            show_losses(self.progress, torch.stack(history).cpu())
        self.progress(done, self.steps)
        return stopped or (not last and stop_requested(self.progress))


def _check(parameters: Sequence[Tensor], steps: int, lr: float | Callable[[int], float]) -> None:
    if steps < 0:
        raise ParameterError(f"steps is {steps}: give 0 or more")
    if not parameters:
        raise ParameterError("there is nothing to learn: the chosen blocks have no weights")
    if not _rate(lr, 0) > 0:
        raise ParameterError(f"lr is {_rate(lr, 0)}: give a learning rate above 0")
    for parameter in parameters:
        if parameter.dtype != torch.float32 or not parameter.is_leaf or parameter.is_inference():
            raise ParameterError(
                f"a parameter {list(parameter.shape)} of type {parameter.dtype} cannot learn: "
                "pass float32 leaves made outside inference mode"
            )


def _rate(lr: float | Callable[[int], float], step: int) -> float:
    return float(lr(step)) if callable(lr) else float(lr)


def _step(parameters: Sequence[Tensor], terms: Tensor, optimiser: torch.optim.Optimizer, lr: float) -> Tensor:
    """Make one update. Returns the loss terms [K] before it, on the device."""
    terms = terms.reshape(-1)
    if not terms.requires_grad:
        raise EditError("the loss does not depend on what should learn: the model detaches its input")
    gradients = torch.autograd.grad(terms.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.param_groups[0]["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return terms.detach().float()


def _read(history: list[Tensor]) -> Tensor:
    values = torch.stack(history).cpu()
    finite = torch.isfinite(values).all(1)
    if not finite.all():
        raise EditError(
            f"the loss stopped being a number at step {int(finite.int().argmin())} of the optimisation: lower the"
            " learning rate or run it in float32"
        )
    return values


def _result(history: list[Tensor], stopped: bool) -> OptimiseResult:
    values = _read(history) if history else torch.zeros(0, 1)
    return OptimiseResult(values.sum(1).tolist(), values.tolist(), len(values), stopped)


def show_losses(progress: Progress, history: Tensor) -> None:
    """Pass the history [n, K] to a `Progress` that shows loss curves (`LossProgress`)."""
    if isinstance(progress, LossProgress):
        progress.losses(history.sum(1).tolist())


# --------------------------------------------------------------------------------------------- precision and memory
def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Mixed precision: compute in `dtype` with float32 master weights; None computes everything in float32.

    Raises: ParameterError for float16, in which the gradients of an edit underflow to 0.
    """
    if dtype is None:
        return nullcontext()
    if dtype != torch.bfloat16:
        raise ParameterError(
            f"precision is {dtype}, in which small gradients underflow to 0: choose bfloat16 or float32"
        )
    return torch.autocast(device.type, dtype)


@contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Gradient checkpointing: `blocks` keep no activations and run again in the backward pass. Undone in every outcome.

    It takes about a third longer. Memory falls to the activations of about one block. Other threads wait for the blocks.
    """
    blocks = list(blocks)
    with in_use(blocks), ExitStack() as undo:
        for block in blocks:
            undo.callback(_restore, block, vars(block).get("forward"))
            again: Any = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    """Restore the class's `forward`, or the `forward` that was set on the instance before."""
    del block.forward
    if forward is not None:
        block.forward = forward
