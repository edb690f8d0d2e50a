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
    ("EditKit_BlendedEdit", "steps"): 3,
    ("KSampler", "steps"): 3,
    ("EditKit_TuneDecoder", "steps"): 2,
    ("EditKit_NoiseLatent", "copies"): 3,
    ("EditKit_DiffEditMask", "maps"): 2,
    ("EditKit_SDEdit", "steps"): 3,
    ("EditKit_DiffEdit", "steps"): 3,
    ("EditKit_DiffEdit", "maps"): 1,
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


def graphs(page: Workflow) -> dict[str, Workflow]:
    """The workflow's own graph under "", and every subgraph under the id of the node that stands for it, with links alike."""
    kinds = {graph["id"]: graph for graph in page.get("definitions", {}).get("subgraphs", [])}
    found = {"": {**page, "links": {link[0]: link[1:] for link in page["links"]}}}
    for node in page["nodes"]:
        if node["type"] in kinds:
            inner = kinds[node["type"]]
            keys = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
            found[f"{node['id']}:"] = {**inner, "links": {k["id"]: [k[key] for key in keys] for k in inner["links"]}}
    return found


def origin(page: Workflow, inside: str, number: int | None) -> list | None:
    """The node and slot at the beginning of a link, by the server's ids; None where nothing is connected."""
    found = graphs(page)
    if number is None:
        return None
    node, slot = found[inside]["links"][number][:2]
    if node == -10:  # the subgraph's own input
        outer = next(entry for entry in page["nodes"] if f"{entry['id']}:" == inside)
        return origin(page, "", outer["inputs"][slot]["link"])
    if f"{node}:" in found:  # out of a subgraph
        inner = f"{node}:"
        ends = [key for key, link in found[inner]["links"].items() if link[2:4] == [-20, slot]]
        return origin(page, inner, ends[0])
    return [f"{inside}{node}", slot]
