"""Inputs and outputs of the model patches that work on pairs of latents (source, target)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ...hosts.host import paired_model
from ...hosts.sockets import conditioning_of
from ...hosts.trajectory import trajectory_in
from ...pipelines.attention.pair_control import PairControl
from ...pipelines.attention.pair_sampling import PairPlan, paired_context
from ...pipelines.attention.prompts.prompt_edit import PromptEdit
from ...pipelines.core.errors import EditError
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_tokens, refuse_nan
from ...pipelines.core.sigmas import check_sigmas
from .._api import io
from .._inputs import prompt_pair_inputs, sigmas_input, trajectory_input


def edit_in(value: Any, socket: str = "edit") -> PromptEdit:
    """The prompt edit of a socket. Raises EditError for something else, and for NaN or infinity in its prompts."""
    if not isinstance(value, PromptEdit):
        raise EditError(
            f"{socket} is a {type(value).__name__}: connect the prompt edit of 'Align Prompts (P2P, Word Swap)'"
        )
    for prompt in (value.source, value.target):
        check_tokens(prompt.tokens, socket)
    for tensor in (value.source.pooled, value.target.pooled, value.mapper, value.alphas, value.equalizer):
        if tensor is not None:
            refuse_nan(tensor, socket)
    return value


def pair_prompt_inputs() -> list:
    return prompt_pair_inputs(
        "The source prompt: what the source image shows. It may be empty.",
        "The target prompt: what the edited image should show.",
    )


def pair_inputs() -> list:
    """Optional inputs of every model patch that works on pairs."""
    return [
        sigmas_input(
            "The sigmas on which fractions of the steps are counted, if the sampler runs only some of them. Without it: the "
            "sampler's own sigmas.",
            optional=True,
        ),
        trajectory_input(
            "Inversion of a real image as source. Start the sampler from its noised latent, repeated to pairs, on the same "
            "sigmas and without added noise.",
            optional=True,
        ),
        io.Boolean.Input(
            "share_noise",
            default=True,
            optional=True,
            tooltip="Source and target get the same noise, at the start and at every step of an ancestral sampler.",
        ),
    ]


def pair_outputs() -> list:
    return [
        io.Model.Output(
            "paired_model",
            display_name="model",
            tooltip="For any sampler, on a latent batch of pairs: source, target, source, target, ... (batch_size 2).",
        ),
        io.Conditioning.Output(
            "pair",
            display_name="conditioning",
            tooltip="The positive conditioning for the sampler: source and target prompt.",
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
    """Patch a model for pairs of source and target.

    Args:
        model: a MODEL.
        source, target: the prompts, each one row of tokens.
        make: makes the attention control from the sigmas of the sampler.
        tokens: the number of tokens both prompts must have; None = any.
        sigmas: falling sigmas on which fractions of the steps are counted; None = the sampler's own.
        trajectory: the inversion of a real image that the source follows; None = the source is generated.
        share_noise: whether source and target get the same noise.

    Returns: the patched MODEL and the CONDITIONING of both prompts.
    Raises: EditError if `trajectory` is not a trajectory.
    """
    read_trajectory = None
    if trajectory is not None:
        trajectory_in(trajectory)  # refuse a wrong value now, not in the sampler
        read_trajectory = partial(trajectory_in, trajectory)
    sigma_grid = None if sigmas is None else check_sigmas(sigmas)
    plan = PairPlan(make, sigma_grid, tokens, share_noise, read_trajectory)
    return paired_model(model, plan), conditioning_of(paired_context(source, target))
