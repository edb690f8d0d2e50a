"""Stage `evaluate`: the acceptance table of the shipped files, with numbers of trials and 95 % intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..hosts.bundled import FOLDER
from ..hosts.diffusers.loading import flow_over, load_folder
from ..hosts.diffusers.open_clip_ranker import load_ranker
from .loop import write_json
from .measures import Row, measures

SIZE = 96  # pixels: the size that the model was trained at
QUICK_NOTE = "quick: an eighth of the scenes, so a row passes unless its interval lies wholly below the floor"


Show = Callable[[str], None]


def evaluate(folder: Path = FOLDER, *, quick: bool = False, show: Show | None = None) -> dict[str, Any]:
    """Measure `folder`/tiny, `folder`/ranker and, if it is there, `folder`/flow, and return what `metrics.json` holds.

    Args:
        show: called with each line of the table as soon as it is known.
    """
    show = show or (lambda line: None)
    model, ranker = load_folder(folder / "tiny", "cpu", torch.float32), load_ranker(folder / "ranker")
    flow = flow_over(folder / "flow", model) if (folder / "flow").is_dir() else None
    show(HEADER)
    rows = []
    for row in measures(model, ranker, flow, size=SIZE, quick=quick):
        rows.append(row)
        show(line(row, quick=quick))
    if quick:
        show(QUICK_NOTE)
    return {
        "command": "python -m editkit.training evaluate" + (" --quick" if quick else ""),
        "size": SIZE,
        "weights": digests(folder),
        "passed": all(good(row, quick=quick) for row in rows),
        "rows": [row.as_dict() for row in rows],
    }


HEADER = f"{'measure':<44}{'value':>9}  {'95 % interval':<18}{'n':>5}  {'floor':>7}  verdict  seconds"


def line(row: Row, *, quick: bool = False) -> str:
    """One line of the table; shares as percentages."""
    factor, unit = (100, "%") if row.unit == "share" else (1, row.unit)
    interval = f"{row.low * factor:.1f} to {row.high * factor:.1f}"
    floor = "" if row.floor is None else f"{row.floor * factor:.3g} {unit}"
    verdict = "" if row.floor is None else "pass" if good(row, quick=quick) else "FAIL"
    value = f"{row.value * factor:.1f} {unit}"
    return f"{row.name:<44}{value:>9}  {interval:<18}{row.n:>5}  {floor:>7}  {verdict:<7}  {row.seconds:.0f}"


def good(row: Row, *, quick: bool = False) -> bool:
    """Whether the row passes, has no floor, or (`quick`) is not refuted by so few trials."""
    return row.floor is None or (row.high if quick else row.value) >= row.floor


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file, so that figures cannot be taken for those of other weights."""
    files = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    write_json(folder / "metrics.json", metrics)
