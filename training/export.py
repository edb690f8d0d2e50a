"""Stage `export`: the work folder's networks as the files that ship, in float16, measured, and only when better.

The files are first laid out in the work folder, measured there, and copied over `pipelines/bundled` if their figures
beat those of the files that are there.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hosts.bundled import FOLDER, RANKER_FILES
from .card import card
from .evaluate import Show, evaluate, write_metrics
from .loop import write_json
from .text import CONFIG, grammar_ids

log = logging.getLogger("editkit.training")

LIMIT = 15_900_000  # bytes of the weights and their configs; card and metrics fit into the rest of 16 MB
PARTS = {"unet": "tiny/unet", "vae": "tiny/vae", "text_encoder": "tiny/text_encoder", "ranker": "ranker"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class ExportError(RuntimeError):
    """The files are not fit to ship, or not better than those that are there."""


def export(
    work: Path,
    target: Path = FOLDER,
    *,
    force: bool = False,
    quick: bool = False,
    show: Show | None = None,
) -> dict[str, Any]:
    """Lay out, measure and install; returns the metrics.

    Raises: ExportError if a part is missing, does not fit half precision or the size limit, or (without `force`) is
    not better than what is installed.
    """
    stage = work / "export"
    shutil.rmtree(stage, ignore_errors=True)
    lay_out(work, stage)
    if _size(stage) > LIMIT:
        raise ExportError(f"the files take {_size(stage) / 1e6:.2f} MB: at most {LIMIT / 1e6:.0f} MB ship")
    metrics = evaluate(stage, quick=quick, show=show)
    write_metrics(stage, metrics)
    previous = _read_metrics(target)
    if not force and previous is not None and not better(metrics, previous):
        raise ExportError(f"the new files are not better than those in {target.name!r}; --force installs them anyway")
    sizes = {name: _size(stage / folder) for name, folder in PARTS.items()}
    text = card(metrics, sizes=sizes, steps=steps_taken(work), rows=len(grammar_ids()))
    (stage / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    install(stage, target)
    return metrics


def lay_out(work: Path, stage: Path) -> None:
    """Write stage/tiny and stage/ranker from the work folder's networks."""
    tiny = stage / "tiny"
    for part in ("unet", "vae"):
        _half_file(work / part / WEIGHTS, tiny / part / WEIGHTS)
        config = json.loads((work / part / "config.json").read_text(encoding="utf-8"))
        write_json(tiny / part / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
    _half_file(work / "text_encoder.safetensors", tiny / "text_encoder" / "model.safetensors", prefix="text_model.")
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **CONFIG}
    write_json(tiny / "text_encoder" / "config.json", config)
    write_json(tiny / "text_encoder" / "token_ids.json", grammar_ids())
    (tiny / "scheduler").mkdir()
    write_json(tiny / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(tiny / "model_index.json", INDEX)
    (stage / "ranker").mkdir()
    for name in RANKER_FILES:
        _need(work / "ranker" / name)
        shutil.copy2(work / "ranker" / name, stage / "ranker" / name)


def _half_file(source: Path, target: Path, *, prefix: str = "") -> None:
    """`source` in float16, every key under `prefix`."""
    _need(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {f"{prefix}{name.removeprefix(prefix)}": _half(name, value) for name, value in load_file(source).items()}
    save_file(state, target, metadata={"format": "pt"})


def _half(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.contiguous()
    half = value.half()
    if not torch.isfinite(half).all():
        raise ExportError(f"{name} does not fit float16: its largest value is {value.abs().max():.3g}")
    return half.contiguous()


def _need(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"{path} is missing: run its training stage first")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def steps_taken(work: Path) -> dict[str, int]:
    """Optimiser steps of each stage, from its checkpoint."""
    steps = {}
    for stage in ("vae", "unet", "ranker"):
        path = work / f"{stage}_train.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                steps[stage] = int(file.metadata()["step"])
    return steps


def _read_metrics(folder: Path) -> dict[str, Any] | None:
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def better(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """No limit that the old files kept is missed, and the measures, each relative to its limit, rise on average.

    Figures of different commands (a quick run and a full one) do not compare: then the new files are not better.
    """
    limits = [{row["name"]: row for row in metrics["rows"] if row["floor"] is not None} for metrics in (new, old)]
    if new["command"] != old["command"] or limits[0].keys() != limits[1].keys():
        return False
    pairs = [(limits[0][name], limits[1][name]) for name in limits[0]]
    if any(before["passed"] and not after["passed"] for after, before in pairs):
        return False
    return sum((after["value"] - before["value"]) / after["floor"] for after, before in pairs) > 0


def install(stage: Path, target: Path) -> None:
    """Replace the shipped folders and their metrics and card."""
    for part in ("tiny", "ranker"):
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(stage / part, target / part)
    for name in ("metrics.json", "MODEL_CARD.md"):
        shutil.copy2(stage / name, target / name)
    log.info("installed %.2f MB in %s", _size(stage) / 1e6, target)
