"""Checks of the command line's arguments, all before a model is loaded: an edit that took minutes must not fail at its end."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from ..pipelines.core.errors import LoadError, ParameterError

if TYPE_CHECKING:
    import argparse

    import torch
    from torch import Tensor

    from ..pipelines.blended.pipeline import EditSettings

log = logging.getLogger("editkit")

MOST_CANDIDATES = 1000
BUNDLED_SIDE = 96  # pixels of the images that the bundled model was trained on
STRANGE = 0.3  # share of pixels in colours that no scene has; scenes have at most 0.02, photographs 0.6 and more
LARGEST_SEED = 2**64 - 1


def check_edit(options: argparse.Namespace) -> EditSettings:
    """The settings of `editkit edit`. Raises ParameterError for the first argument that cannot be used."""
    import torch

    from ..pipelines.blended.pipeline import EditSettings
    from ..pipelines.core.masks import dilation_schedule, downsample, parse_kernels
    from ..pipelines.core.sigmas import executed_steps

    check_text(options.prompt, "--prompt")
    if not options.prompt.strip():
        raise ParameterError("--prompt is empty: say what the image should show")
    check_text(options.negative, "--negative")
    check_text(options.rank_text or "", "--rank-text")
    if options.rank_text is not None and not options.rank_text.strip():
        raise ParameterError("--rank-text is empty: say what the masked region should show, or leave it out")
    if options.prompt.strip() == options.negative.strip():
        log.warning("--prompt and --negative are the same: guidance has no effect")
    check_range(options.candidates, "--candidates", 1, MOST_CANDIDATES)
    executed_steps(options.steps, options.strength)
    check_range(options.cfg, "--cfg", 1)
    check_range(options.seed, "--seed", 0, LARGEST_SEED)
    _check_finishing(options)
    kernels = parse_kernels(options.kernels)
    whole = torch.ones(1, 8, 8)
    downsample(whole, 1, 1, options.mask_mode, factor=8)
    dilation_schedule(whole, kernels, spacing=options.stages)
    return EditSettings(
        steps=options.steps,
        strength=options.strength,
        guidance_scale=options.cfg,
        candidates=options.candidates,
        seed=options.seed,
        mask_mode=options.mask_mode,
        kernels=kernels,
        stage_spacing=options.stages,
        tune_steps=options.tune_steps,
        tune_lr=options.tune_lr,
        tune_method=options.tune_method,
        window=options.window,
        context_px=options.context,
        keep=options.keep,
        keep_at=options.keep_at,
        feather_px=options.feather,
    )


def _check_finishing(options: argparse.Namespace) -> None:
    """The numbers of the fine-tune, the composite, the window and the elimination."""
    check_range(options.tune_steps, "--tune-steps", 0)
    check_range(options.feather, "--feather", 0)
    check_range(options.window, "--window", 0)
    check_range(options.context, "--context", 0)
    check_range(options.keep, "--keep", 0, options.candidates)
    if options.keep and not 0 < options.keep_at < 1:
        raise ParameterError(f"--keep-at is {options.keep_at}: give a fraction of the steps between 0 and 1")
    if options.tune_lr == 0:
        raise ParameterError("--tune-lr is 0: give a learning rate above 0, or --tune-steps 0")
    check_range(options.tune_lr, "--tune-lr", 0)


def check_text(text: str, name: str) -> None:
    """Refuse text that has no UTF-8 form: bytes of another encoding that the terminal handed over."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"{name} has a character at position {error.start} that cannot be decoded: give the text in UTF-8"
        ) from error


def check_range(value: float, name: str, lowest: float, highest: float = math.inf) -> None:
    """Refuse numbers outside a range, infinity and NaN.

    Args:
        value: the number.
        name: of the option, for the error.
        lowest, highest: the range, both included.
    Raises: ParameterError.
    """
    if not (math.isfinite(value) and lowest <= value <= highest):
        most = "or more" if highest == math.inf else f"to {highest}"
        raise ParameterError(f"{name} is {value}: give {lowest} {most}")


def warn_of_photograph(image: Tensor) -> None:
    """Warn where an IMAGE [1, H, W, 3] for the bundled model does not look like the scenes that it knows."""
    import torch.nn.functional as F

    from ..hosts.bundled.oracle import strange_share

    small = F.interpolate(image[:1].movedim(-1, 1), (BUNDLED_SIDE, BUNDLED_SIDE), mode="area")[0].movedim(0, -1)
    if strange_share(small.numpy()) > STRANGE:
        log.warning(
            "the bundled model knows only plain shapes on plain backgrounds, and --image looks different, perhaps a photograph: "
            "give your own model with --model"
        )


def check_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one. Raises ParameterError where nothing can be computed on it."""
    import torch

    from ..pipelines.blended.pipeline import best_device

    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        if device.type != "meta":
            torch.zeros(1, device=device).add_(1).item()
            return device
        reason = "it holds no numbers"
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ParameterError(f"--device is {name!r}, which cannot be used here ({reason}): give cpu, or leave it out")


def check_output(folder: Path) -> None:
    """Make the folder and try to write in it. Raises ParameterError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid4().hex}.part"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"--output is {str(folder)!r}, which cannot be written ({error}): give another folder"
        ) from error


def check_input(folder: Path | None) -> None:
    """Refuse a folder of images that does not exist."""
    if folder is not None and not folder.is_dir():
        raise LoadError(f"--input is {str(folder)!r}, which is no folder: give the folder of the images")
