"""The thumbnail of a workflow, a square with its result and, in the corner, its source, and the strip that README shows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..hosts.bundled.example_images import load_example, load_image
from ..pipelines.evaluation.drawing import sheet, to_pil
from .catalogue import WORKFLOWS, title
from .elements import Output
from .graph import Graph

if TYPE_CHECKING:
    from ..headless.run import Run

SIDE, CORNER = 384, 150  # pixels of the result and of the source
FRAME = 6  # of the white frame around the source
QUALITY = 88  # on the scale of JPEG
LARGEST = 40_000  # bytes
TILE = 152
COLUMNS = {4: 4}  # by the number of images of a strip; otherwise three


def write_thumbnail(name: str, folder: Path) -> Path:
    """Run a workflow and draw `folder`/TITLE.jpg. Raises EditError where the bundled model is missing."""
    tiles = tiles_of(name)
    before = next((image for label, image in tiles if label == "source"), None)
    after = [image for label, image in tiles if label != "source"][-1]
    path = folder / f"{title(name)}.jpg"
    square(before, after).save(path, quality=QUALITY, optimize=True)
    return path


def square(before: Tensor | None, after: Tensor) -> Any:
    """A PIL image: the result, with the source in its lower left corner."""
    from PIL import Image

    page = to_pil(after).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    if before is not None:
        frame = Image.new("RGB", (CORNER + 2 * FRAME, CORNER + 2 * FRAME), "white")
        frame.paste(to_pil(before).convert("RGB").resize((CORNER, CORNER), Image.Resampling.LANCZOS), (FRAME, FRAME))
        page.paste(frame, (0, SIDE - frame.height))
    return page


def strip(tiles: list[tuple[str, Tensor]]) -> Any:
    """A PIL image of all tiles with their labels."""
    return to_pil(sheet(tiles, columns=COLUMNS.get(len(tiles), 3), tile=TILE)[0])


def tiles_of(name: str) -> list[tuple[str, Tensor]]:
    """The source image, the mask, and what the Save Image nodes wrote."""
    from ..headless.run import Run
    from ..headless.runner import run_workflow

    graph = WORKFLOWS[name]()
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
        (f"{name} found", run.results[_id(graph, output)][output.slot][0])
        for name, output in made
        if _used(graph, output)
    ]


def _id(graph: Graph, output: Output) -> str:
    """The server's id of a node, which has the id of its subgraph before it."""
    return next(
        (f"{fold.id}:{output.node.id}" for fold in graph.folds if output.node in fold.nodes), str(output.node.id)
    )


def _results(graph: Graph, run: Run) -> list[tuple[str, Tensor]]:
    """The saved images, labelled by the part of the file name that differs."""
    labels = [path.stem.rpartition("_")[0].removeprefix(graph.name).strip("_") for path in run.saved]
    names = [f"edit {label}" if label.isdigit() else label or "result" for label in labels]
    return [(name, load_image(path)[0]) for name, path in zip(names, run.saved, strict=True)]
