"""NAME.jpg beside a workflow: what it begins with and what it saves, drawn by running it here on the bundled model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from ..pipelines.examples import load_example, load_picture
from ..pipelines.pictures import sheet, to_pil
from .catalogue import WORKFLOWS
from .graph import Graph

WIDTH, QUALITY, LARGEST = 512, 85, 40_000  # pixels, JPEG's own scale, bytes
TILE = 152
COLUMNS = {4: 4}  # by the number of pictures; otherwise three


def write_thumbnail(name: str, folder: Path) -> Path:
    """Run a workflow and draw `folder`/NAME.jpg. Raises EditError where the bundled model is missing."""
    from PIL import Image

    graph = WORKFLOWS[name]()
    tiles = [*_source(graph), *_results(graph)]
    page = to_pil(sheet(tiles, columns=COLUMNS.get(len(tiles), 3), tile=TILE)[0])
    page = page.resize((WIDTH, round(page.height * WIDTH / page.width)), Image.Resampling.LANCZOS)
    path = folder / f"{name}.jpg"
    quality = QUALITY
    page.save(path, quality=quality, optimize=True)
    while path.stat().st_size > LARGEST:
        quality -= 10
        page.save(path, quality=quality, optimize=True)
    return path


def _source(graph: Graph) -> list[tuple[str, Tensor]]:
    loader = next(node for node in graph.nodes if node.type == "EditKit_LoadExample")
    example = load_example(loader.inputs["name"])
    return [("source", example.image[0]), ("mask", example.mask[0])]


def _results(graph: Graph) -> list[tuple[str, Tensor]]:
    """What its Save Image nodes wrote, with the part of their names that tells them apart."""
    from ..nodes.headless import Run, run_workflow

    with tempfile.TemporaryDirectory() as scratch:
        run = run_workflow(graph.to_api(), Run(Path(scratch), Path(scratch)))
        labels = [path.stem.rpartition("_")[0].removeprefix(graph.name).strip("_") for path in run.saved]
        names = [f"edit {label}" if label.isdigit() else label or "result" for label in labels]
        return [(name, load_picture(path)[0]) for name, path in zip(names, run.saved, strict=True)]
