"""What the nodes share that patch a MODEL for pairs of latents: their inputs, outputs and the plan for the sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...hosts import host as _host
from ...pipelines.attention.pair_control import PairControl
from ...pipelines.attention.pair_sampling import PairPlan, paired_context
from ...pipelines.attention.prompts.prompt_edit import PromptEdit
from ...pipelines.core.errors import EditError
from ...pipelines.core.protocols import Context
from ...pipelines.core.sigmas import check_sigmas
from .._api import PromptEditSocket, TrajectorySocket, io

MAX_SEED = 0xFFFFFFFFFFFFFFFF
PARTS = (
    "Parts of the run count on the sampler's own sigmas; connect the whole grid here where it runs only a piece of it."
)


def edit_in(value: Any, socket: str = "edit") -> PromptEdit:
    """The prompt edit of a socket. Raises EditError for something else."""
    if not isinstance(value, PromptEdit):
        raise EditError(f"{socket} is a {type(value).__name__}: connect the prompt edit of 'Align prompts'")
    return value


def model_input(*, patched: bool = True) -> io.Model.Input:
    which = "An SD 1.x, SD 2.x or SDXL model; LoRAs and other patches stay in force"
    return io.Model.Input(
        "model", tooltip=f"{which}. The result is a patched clone, yours is not changed." if patched else f"{which}."
    )


def edit_input() -> Any:
    return PromptEditSocket.Input("edit", tooltip="Source and target prompt, aligned word by word by 'Align prompts'.")


def prompt_inputs() -> list:
    return [
        io.Conditioning.Input("source", tooltip="What the source picture shows; 1 row. May be an empty prompt."),
        io.Conditioning.Input("target", tooltip="What the edited picture should show; 1 row."),
    ]


def fraction_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A part of the run, 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, tooltip=tooltip)


def pair_inputs() -> list:
    """What every patch for native samplers may be told besides."""
    return [
        io.Sigmas.Input("sigmas", optional=True, tooltip=PARTS),
        TrajectorySocket.Input(
            "trajectory",
            optional=True,
            tooltip="A real picture's inversion: the source rows are held to it. Start the sampler from its noised latent, "
            "repeated to pairs, on the same sigmas and without noise of its own.",
        ),
        io.Boolean.Input(
            "share_noise",
            default=True,
            optional=True,
            tooltip="The target gets its source's noise, at the start and at every step of an ancestral sampler.",
        ),
    ]


def pair_outputs() -> list:
    return [
        io.Model.Output(
            "paired_model",
            display_name="model",
            tooltip="For any native sampler, on a latent batch of pairs: source, target, source, target, ... (batch_size 2).",
        ),
        io.Conditioning.Output(
            "pair",
            display_name="conditioning",
            tooltip="The sampler's positive prompt: a row for source and for target.",
        ),
    ]


def patched(
    model: Any,
    source: Context,
    target: Context,
    make: Callable[[Tensor], PairControl],
    *,
    tokens: int | None = None,
    sigmas: Tensor | None = None,
    trajectory: Any = None,
    share_noise: bool = True,
) -> tuple[Any, list]:
    """The patched MODEL and the CONDITIONING of both prompts."""
    path = None
    if trajectory is not None:
        _host.trajectory_in(trajectory)  # refuse now what is none

        def path() -> Any:
            return _host.trajectory_in(trajectory)

    grid = None if sigmas is None else check_sigmas(sigmas)
    plan = PairPlan(make, grid, tokens, share_noise, path)
    return _host.paired_model(model, plan), _host.conditioning(paired_context(source, target))
