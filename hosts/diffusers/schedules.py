"""The noise schedule of a diffusers folder: what `scheduler_config.json` says about sigmas, or a refusal by name."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...pipelines.core.errors import FamilyError
from ...pipelines.core.sigmas import SPACINGS, shifted_sigmas

ZERO_SNR_ABAR = 4.8973451890853435e-08  # instead of 0 at the last timestep, so that its sigma is finite; as in ComfyUI

OTHER_SIGMAS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "sigma_min",
    "sigma_max",
    "snr_shift_scale",
)


def sigma_table(scheduler: dict[str, Any]) -> torch.Tensor:
    """Sigma of every training timestep, ascending float32 [T], from a diffusers scheduler config.

    Raises: FamilyError for a schedule that EditKit does not have, by the name of the setting.
    """
    for name in OTHER_SIGMAS:
        if scheduler.get(name) not in (None, False):
            raise FamilyError(
                f"scheduler_config.json sets {name} to {scheduler[name]!r}: EditKit takes its sigmas from the training "
                f"timesteps; set {name} to null there"
            )
    if scheduler.get("shift") not in (None, 1):
        raise FamilyError(
            f"scheduler_config.json sets shift to {scheduler['shift']!r}, which is for flow transformers alone"
        )
    abar = torch.cumprod(1 - _betas(scheduler), 0)
    if scheduler.get("rescale_betas_zero_snr"):
        abar = _zero_terminal_snr(abar)
    return ((1 - abar) / abar).sqrt().float()


def flow_table(scheduler: dict[str, Any]) -> torch.Tensor:
    """The sigmas of a flow model's grids, ascending float32 [T], from a diffusers scheduler config.

    A shift that depends on the image size (`use_dynamic_shifting`, Flux) is taken at the largest training size, and the
    grid then has ten sigmas for each timestep, as in ComfyUI.
    Raises: FamilyError for a schedule that EditKit does not have, by the name of the setting.
    """
    for name in (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "shift_terminal",
        "stochastic_sampling",
        "invert_sigmas",
    ):
        if scheduler.get(name) not in (None, False):
            raise FamilyError(
                f"scheduler_config.json sets {name} to {scheduler[name]!r}, which EditKit does not support: set it to "
                "null there"
            )
    kind = scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise FamilyError(f"scheduler {kind!r} is not a flow schedule: FlowMatchEulerDiscreteScheduler is needed")
    steps = int(scheduler.get("num_train_timesteps", 1000))
    shift = float(scheduler.get("shift", 1.0))
    if scheduler.get("use_dynamic_shifting"):
        if scheduler.get("time_shift_type", "exponential") != "exponential":
            raise FamilyError("time_shift_type must be exponential: EditKit knows no other shift of a flow schedule")
        shift = math.exp(float(scheduler.get("max_shift", 1.15)))
        steps *= 10
    return shifted_sigmas(shift, steps)


def timestep_spacing(scheduler: dict[str, Any]) -> str:
    """How a grid of fewer steps is spaced, one of `SPACINGS`; "leading" where the config does not say."""
    spacing = scheduler.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise FamilyError(f"timestep_spacing {spacing!r} is not supported: {', '.join(SPACINGS)} are")
    return spacing


def _betas(scheduler: dict[str, Any]) -> torch.Tensor:
    """Variance of the noise that each training timestep adds, float64 [T]."""
    steps = int(scheduler.get("num_train_timesteps", 1000))
    if scheduler.get("trained_betas") is not None:
        return _trained_betas(scheduler["trained_betas"], steps)
    start, end = float(scheduler.get("beta_start", 0.00085)), float(scheduler.get("beta_end", 0.012))
    kind = scheduler.get("beta_schedule", "scaled_linear")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    raise FamilyError(f"noise schedule {kind!r} is not supported: Stable Diffusion models have scaled_linear or linear")


def _trained_betas(values: Any, steps: int) -> torch.Tensor:
    try:
        betas = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):
        betas = torch.empty(0, dtype=torch.float64)
    if betas.shape != (steps,) or not bool(((betas > 0) & (betas < 1)).all()):
        raise FamilyError(f"trained_betas must be {steps} numbers between 0 and 1, one per training timestep")
    return betas


def _zero_terminal_snr(abar: torch.Tensor) -> torch.Tensor:
    """Shift and stretch sqrt(abar) so that the last timestep is noise alone (Lin et al. 2024, algorithm 1)."""
    root = abar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = root * root
    rescaled[-1] = ZERO_SNR_ABAR
    return rescaled
