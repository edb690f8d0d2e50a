"""One optimiser for everything that learns at edit time: decoder weights, latents, embeddings, small networks.

What may learn is listed; everything else stays frozen, because gradients are asked for by name and never accumulated in
a module. The parameters are float32 masters that belong to the caller: the user's own weights are never among them.
Randomness comes from the losses alone, which draw by the number of the step (`noise.seeded_draw`).

What learning may need besides: `learning_mode` (out of the host's inference mode), `own` (copies that autograd may
save), `recomputing` (gradient checkpointing), `autocast`. Whether it fits into memory is `memory`'s question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import EditError, ParameterError
from ..core.progress import LossProgress, Progress, silent
from ..core.protocols import Context

OBSERVE_EVERY = 25  # iterations between two readings of the history from the device


class StopRule(Protocol):
    """Decides from the history whether further steps are worth their time."""

    @property
    def every(self) -> int:
        """Iterations between two questions; each costs one host synchronisation."""

    def __call__(self, history: Tensor) -> bool:
        """`history` is float32 [n, K] on the host: the K loss terms of the n steps so far."""


@dataclass(frozen=True)
class Plateau:
    """Stop when the best value of the last `every` steps is less than `gain` better than the best before them.

    Attributes:
        every: steps without progress that are tolerated (patience), >= 1.
        gain: least relative improvement that counts as progress.
        term: which loss term to watch; None watches their sum.
    """

    every: int
    gain: float = 0.01
    term: int | None = None

    def __call__(self, history: Tensor) -> bool:
        values = history.sum(1) if self.term is None else history[:, self.term]
        if len(values) <= self.every:
            return False
        recent, before = values[-self.every :].min(), values[: -self.every].min()
        return bool(recent >= before * (1 - self.gain))


@dataclass(frozen=True)
class Levelled:
    """Stop when the mean of the last `every` steps is less than `gain` below the mean of as many before them.

    For losses that draw a noise level at every step: single values say nothing, means do.
    """

    every: int
    gain: float = 0.01

    def __call__(self, history: Tensor) -> bool:
        values = history.sum(1)
        if len(values) < 2 * self.every:
            return False
        recent, before = values[-self.every :].mean(), values[-2 * self.every : -self.every].mean()
        return bool(recent >= before * (1 - self.gain))


@dataclass(frozen=True)
class OptimiseResult:
    """What happened.

    Attributes:
        losses: total loss before each step, oldest first.
        terms: its terms, one list of K per step.
        steps: steps taken.
        stopped: whether the stop rule ended it before the last step.
    """

    losses: list[float]
    terms: list[list[float]]
    steps: int
    stopped: bool


@contextmanager
def learning_mode() -> Iterator[None]:
    """Gradients on and inference mode off, whatever the host has chosen; convolutions deterministic meanwhile."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def own(value: Tensor, device: torch.device | None = None) -> Tensor:
    """A detached float32 copy that autograd may save: hosts hand out inference tensors. Call it in `learning_mode`."""
    return value.detach().to(device=device, dtype=torch.float32, copy=True)


def own_context(context: Context) -> Context:
    """The same for a prompt's embeddings; what the host attached stays."""
    pooled = None if context.pooled is None else own(context.pooled)
    return replace(context, tokens=own(context.tokens), pooled=pooled)


def optimise(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float | Callable[[int], float],
    betas: tuple[float, float] = (0.9, 0.999),
    stop: StopRule | None = None,
    progress: Progress = silent,
) -> OptimiseResult:
    """Minimise a loss with Adam over `parameters`, in place (methods.md, 3 and 17).

    Args:
        parameters: float32 leaves, made in `learning_mode`; they alone receive gradients, and end frozen again.
        loss: step (from 0) to the loss, a scalar or its terms [K] whose sum is minimised.
        steps: iterations, >= 0.
        lr: step size > 0, or a function of the step.
        stop: asked after every `stop.every` steps.
        progress: told after every step; raising there cancels. One that has `losses` is shown the loss curve as well.
    Returns: the history; it stays on the device until it is needed, so that a step waits for no copy to the host.
    Raises: ParameterError; EditError when the loss is no longer a number. Whatever is raised, gradients and optimiser
        state are released. The parameters then hold the last completed step.
    """
    _check(parameters, steps, lr)
    history: list[Tensor] = []
    stopped = False
    with learning_mode():
        for parameter in parameters:
            parameter.requires_grad_(True)
        adam = torch.optim.Adam(parameters, lr=_rate(lr, 0), betas=betas)
        try:
            for step in range(steps):
                history.append(_step(parameters, loss(step), adam, _rate(lr, step)))
                if (step + 1) % (stop.every if stop else OBSERVE_EVERY) == 0 or step + 1 == steps:
                    values = _read(history)
                    stopped = stop is not None and step + 1 < steps and stop(values)
                    show_losses(progress, values)
                progress(step + 1, steps)
                if stopped:
                    break
            return _result(history, stopped)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            adam.state.clear()
            history.clear()


def _check(parameters: Sequence[Tensor], steps: int, lr: float | Callable[[int], float]) -> None:
    if steps < 0:
        raise ParameterError(f"steps is {steps}: give 0 or more")
    if not parameters:
        raise ParameterError("there is nothing to learn: the part chosen has no weights")
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


def _step(parameters: Sequence[Tensor], terms: Tensor, adam: torch.optim.Adam, lr: float) -> Tensor:
    """One update; returns the loss terms [K] that it was made from, still on the device."""
    terms = terms.reshape(-1)
    if not terms.requires_grad:
        raise EditError("the loss does not depend on what should learn: the model detaches its input")
    gradients = torch.autograd.grad(terms.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    adam.param_groups[0]["lr"] = lr
    adam.step()
    adam.zero_grad(set_to_none=True)
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
    """Hand the history [n, K] to a `Progress` that shows curves (`progress.LossProgress`)."""
    if isinstance(progress, LossProgress):
        progress.losses(history.sum(1).tolist())


# --------------------------------------------------------------------------------------------- precision and memory
def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Half-precision arithmetic around float32 masters; None leaves everything in float32.

    Raises: ParameterError for float16, in which the gradients of an edit underflow to 0.
    """
    if dtype is None:
        return nullcontext()
    if dtype != torch.bfloat16:
        raise ParameterError(
            f"arithmetic in {dtype} cannot learn, small gradients become 0: choose bfloat16 or float32"
        )
    return torch.autocast(device.type, dtype)


@contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Gradient checkpointing: `blocks` keep nothing for the backward pass and run again then. Undone in every outcome.

    Slower by about a third; memory falls to about that of one block.
    """
    with ExitStack() as undo:
        for block in blocks:
            undo.callback(_restore, block, vars(block).get("forward"))
            again: Any = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    """Give back the class's own `forward`, or the one that somebody else had put there."""
    del block.forward
    if forward is not None:
        block.forward = forward
