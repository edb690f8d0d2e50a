"""The thumbnail NAME.jpg of a workflow: its source and its results on the bundled model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..hosts.bundled.example_images import load_example, load_image
from ..pipelines.evaluation.drawing import sheet, to_pil
from .catalogue import WORKFLOWS
from .elements import Output
from .graph import Graph

if TYPE_CHECKING:
    from ..headless.run import Run

WIDTH = 512  # pixels
QUALITY = 85  # on the scale of JPEG
LARGEST = 40_000  # bytes
TILE = 152
COLUMNS = {4: 4}  # by the number of images; otherwise three


def write_thumbnail(name: str, folder: Path) -> Path:
    """Run a workflow and draw `folder`/NAME.jpg. Raises EditError where the bundled model is missing."""
    from PIL import Image

    graph = WORKFLOWS[name]()
    tiles = _tiles(graph)
    page = to_pil(sheet(tiles, columns=COLUMNS.get(len(tiles), 3), tile=TILE)[0])
    page = page.resize((WIDTH, round(page.height * WIDTH / page.width)), Image.Resampling.LANCZOS)
    path = folder / f"{name}.jpg"
    quality = QUALITY
    page.save(path, quality=quality, optimize=True)
    while path.stat().st_size > LARGEST:
        quality -= 10
        page.save(path, quality=quality, optimize=True)
    return path


def _tiles(graph: Graph) -> list[tuple[str, Tensor]]:
    """The source image, the mask, and what the Save Image nodes wrote."""
    from ..headless.runner import Run, run_workflow

    with tempfile.TemporaryDirectory() as scratch:
        run = run_workflow(graph.to_api(), Run(Path(scratch), Path(scratch)))
        return [*_source(graph), *_found(graph, run), *_results(graph, run)]


def _used(graph: Graph, output: Output) -> bool:
    return any(output == value for node in graph.nodes for value in node.inputs.values())


def _source(graph: Graph) -> list[tuple[str, Tensor]]:
    loader = next((node for node in graph.nodes if node.type == "EditKit_LoadExample"), None)
    if loader is None:  # the source is generated and saved
        return []
    example = load_example(loader.inputs["name"])
    mask = [("mask", example.mask[0])] if _used(graph, loader["mask"]) else []
    return [("source", example.image[0]), *mask]


def _found(graph: Graph, run: Run) -> list[tuple[str, Tensor]]:
    """The result of the mask node, if the workflow uses it."""
    finders = [node for node in graph.nodes if node.type == "EditKit_DiffEditMask"]
    made = [(name, node[name]) for node in finders for name in ("mask", "soft map")]
    return [
        (f"{name} found", run.results[str(output.node.id)][output.slot][0])
        for name, output in made
        if _used(graph, output)
    ]


def _results(graph: Graph, run: Run) -> list[tuple[str, Tensor]]:
    """The saved images, labelled by the part of the file name that differs."""
    labels = [path.stem.rpartition("_")[0].removeprefix(graph.name).strip("_") for path in run.saved]
    names = [f"edit {label}" if label.isdigit() else label or "result" for label in labels]
    return [(name, load_image(path)[0]) for name, path in zip(names, run.saved, strict=True)]
