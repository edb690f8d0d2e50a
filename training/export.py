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
from .flow import SHIFT
from .loop import write_json
from .text import CONFIG, grammar_ids

log = logging.getLogger("editkit.training")

LIMIT = 27_900_000  # bytes of the weights and their configs; card and metrics fit into the rest of 28 MB
FLOW_LIMIT = 12_000_000
FOLDERS = ("tiny", "flow", "ranker")
PARTS = {
    "unet": "tiny/unet",
    "transformer": "flow/transformer",
    "vae": "tiny/vae",
    "text_encoder": "tiny/text_encoder",
    "ranker": "ranker",
}
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


FLOW_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
}
FLOW_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": SHIFT,
    "use_dynamic_shifting": False,
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
    lay_out(work, stage, target)
    for folder, limit in ((stage, LIMIT), (stage / "flow", FLOW_LIMIT)):
        if _size(folder) > limit:
            raise ExportError(f"the files take {_size(folder) / 1e6:.2f} MB: at most {limit / 1e6:.0f} MB ship")
    previous = _read_metrics(target)
    steps = (previous or {}).get("steps", {}) | steps_taken(work)
    metrics = {**evaluate(stage, quick=quick, show=show), "steps": steps}
    write_metrics(stage, metrics)
    if not force and previous is not None and not better(metrics, previous):
        raise ExportError(f"the new files are not better than those in {target.name!r}; --force installs them anyway")
    sizes = {name: _size(stage / folder) for name, folder in PARTS.items()}
    text = card(metrics, sizes=sizes, steps=steps, rows=len(grammar_ids()))
    (stage / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    install(stage, target)
    return metrics


def lay_out(work: Path, stage: Path, installed: Path = FOLDER) -> None:
    """Write the folders of `stage` from the work folder's networks; a folder of which it has none is taken as installed."""
    own = {"tiny": work / "unet", "flow": work / "transformer", "ranker": work / "ranker"}
    if not any(path.exists() for path in own.values()):
        raise ExportError(f"{work} holds no trained unet, transformer or ranker: run their training stages first")
    writers = {"tiny": _lay_out_tiny, "flow": _lay_out_flow, "ranker": _lay_out_ranker}
    for name, path in own.items():
        if path.exists():
            writers[name](work, stage / name)
        elif (installed / name).exists():
            shutil.copytree(installed / name, stage / name)


def _lay_out_tiny(work: Path, tiny: Path) -> None:
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


def _lay_out_flow(work: Path, flow: Path) -> None:
    _half_file(work / "transformer" / WEIGHTS, flow / "transformer" / WEIGHTS)
    config = json.loads((work / "transformer" / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    write_json(flow / "transformer" / "config.json", config)
    (flow / "scheduler").mkdir()
    write_json(flow / "scheduler" / "scheduler_config.json", FLOW_SCHEDULER)
    write_json(flow / "model_index.json", FLOW_INDEX)


def _lay_out_ranker(work: Path, ranker: Path) -> None:
    ranker.mkdir(parents=True)
    for name in RANKER_FILES:
        _need(work / "ranker" / name)
        shutil.copy2(work / "ranker" / name, ranker / name)


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
    for stage in ("vae", "unet", "flow", "ranker"):
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

    Measures that the old files do not have (of a part that is new) must pass. Figures of different commands (a quick run
    and a full one) do not compare: then the new files are not better.
    """
    limits = [{row["name"]: row for row in metrics["rows"] if row["floor"] is not None} for metrics in (new, old)]
    if new["command"] != old["command"] or not limits[0].keys() >= limits[1].keys():
        return False
    pairs = [(limits[0][name], limits[1][name]) for name in limits[1]]
    added = [row for name, row in limits[0].items() if name not in limits[1]]
    if any(before["passed"] and not after["passed"] for after, before in pairs) or not all(
        row["passed"] for row in added
    ):
        return False
    if added:
        return True
    return sum((after["value"] - before["value"]) / abs(after["floor"]) for after, before in pairs) > 0


def install(stage: Path, target: Path) -> None:
    """Replace the shipped folders and their metrics and card."""
    for part in FOLDERS:
        shutil.rmtree(target / part, ignore_errors=True)
        if (stage / part).exists():
            shutil.copytree(stage / part, target / part)
    for name in ("metrics.json", "MODEL_CARD.md"):
        shutil.copy2(stage / name, target / name)
    log.info("installed %.2f MB in %s", _size(stage) / 1e6, target)
