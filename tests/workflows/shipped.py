"""The workflow files that ship, and a version of each that runs in seconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "workflows"
NAMES = tuple(sorted(path.stem for path in (FOLDER / "api").glob("*.json")))
FEW = {
    ("EditKit_EditSigmas", "steps"): 3,
    ("KSampler", "steps"): 3,
    ("EditKit_TuneDecoder", "steps"): 2,
    ("EditKit_NoiseLatent", "copies"): 3,
    ("EditKit_DiffEditMask", "maps"): 2,
    ("EditKit_SDEdit", "steps"): 3,
    ("EditKit_NullText", "inner_steps"): 2,
    ("EditKit_StyleInvert", "inner_steps"): 2,
    ("EditKit_LayeredReference", "steps"): 3,
    ("EditKit_LayeredEmbeddings", "steps"): 3,
    ("EditKit_LayeredTune", "steps"): 3,
    ("EditKit_Imagic", "steps"): 3,
    ("EditKit_Imagic", "embedding_steps"): 3,
    ("EmptyLatentImage", "batch_size"): 2,
}

Workflow = dict[str, Any]


def ui(name: str) -> Workflow:
    """A workflow in the page's format."""
    from editkit.workflows.catalogue import title

    return json.loads((FOLDER / f"{title(name)}.json").read_text(encoding="utf-8"))


def api(name: str) -> Workflow:
    """A workflow in the server's format."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def shortened(workflow: Workflow) -> Workflow:
    """The same workflow with few steps and candidates."""
    short = copy.deepcopy(workflow)
    for node in short.values():
        for key in node["inputs"]:
            few = FEW.get((node["class_type"], key))
            if few is not None:
                node["inputs"][key] = min(few, node["inputs"][key])
    return short
