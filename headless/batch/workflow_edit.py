"""The edit of a line: run its workflow, reuse what the line before computed, and measure the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..run import Run
from ..runner import execution_order, is_link, node_classes, run_workflow
from .manifest import IMAGE_NODE, LOADERS, MASK_NODE, Line, workflow_of

OUTPUT_NODES = ("SaveImage", "PreviewImage", "PreviewAny", "MaskPreview")
FILE_LOADERS = ("LoadImage", "LoadImageMask")


class WorkflowEdit:
    """Runs one workflow for each line; an `Edit` of the loop.

    The results of the nodes are kept for one line, as ComfyUI keeps those of the prompt before. A node whose inputs are the
    same in the next line is not run again: the model always, and the encoded and inverted image where the image is the same.
    """

    def __init__(self, workflow: Mapping[str, Any], folder: Path) -> None:
        """Take the nodes of a checked workflow and the folder that images and masks are in."""
        self.workflow = workflow
        self.folder = folder
        self.kept: dict[str, tuple[Any, ...]] = {}
        self.classes = node_classes()

    def __call__(self, line: Line, draft: Path) -> dict[str, Any]:
        """The entries of the line's record; the images are written below `draft`. Raises EditError."""
        fields = line.fields()
        nodes = workflow_of(self.workflow, fields, self.folder)
        keys = result_keys(nodes, self.classes, self.folder)
        run = Run(self.folder, draft)
        run.results.update({name: self.kept[key] for name, key in keys.items() if key in self.kept})
        self.kept = {}  # what this line does not need is freed before it runs
        reused = len(run.results)
        try:
            run_workflow(nodes, run)
        finally:  # also of a line that fails: the next needs the model
            self.kept = {keys[name]: result for name, result in run.results.items() if name in keys}
        texts = ["\n".join(found) for found in run.texts.values()]
        return {"reused_nodes": reused, "metrics": measured(nodes, run), "texts": texts}


def result_keys(nodes: Mapping[str, Any], classes: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """A key for the result of each node that depends on its inputs alone; equal keys have equal results.

    Nodes that write or show, that read a file which is not an image, or that are not EditKit's have none, and neither have
    the nodes after them.
    """
    keys: dict[str, str] = {}
    for name in execution_order(nodes):
        node = nodes[name]
        if not _reusable(classes.get(node["class_type"]), node["class_type"]):
            continue
        inputs = [(key, _input_key(value, keys)) for key, value in sorted(node["inputs"].items())]
        if any(value is None for _, value in inputs):
            continue
        about = [node["class_type"], inputs, _stamp(node, folder)]
        keys[name] = sha256(json.dumps(about).encode()).hexdigest()
    return keys


def _input_key(value: Any, keys: Mapping[str, str]) -> Any:
    """What stands for an input in a key; None for the output of a node that has no key."""
    if not is_link(value):
        return ["value", value]
    return ["link", keys[str(value[0])], value[1]] if str(value[0]) in keys else None


def _reusable(cls: Any, class_type: str) -> bool:
    if getattr(cls, "stock_node", False):
        return class_type not in OUTPUT_NODES
    if not class_type.startswith("EditKit_") or not hasattr(cls, "define_schema"):
        return False
    return "fingerprint_inputs" not in vars(cls) and not cls.define_schema().is_output_node


def _stamp(node: Mapping[str, Any], folder: Path) -> list[int]:
    """The time and size of the file that a node loads."""
    if node["class_type"] not in FILE_LOADERS:
        return []
    try:
        found = (folder / str(node["inputs"].get("image"))).stat()
    except (OSError, ValueError):  # the node says what is wrong with the name
        return []
    return [found.st_mtime_ns, found.st_size]


def measured(nodes: Mapping[str, Any], run: Run) -> dict[str, float]:
    """Metrics of the last saved image against the source; none where the workflow loads no image or changes its size."""
    from ...hosts.bundled.example_images import load_image
    from ...pipelines.evaluation.report import measure_edit

    source, mask = _source(nodes, run)
    if source is None or not run.saved:
        return {}
    edited = load_image(run.saved[-1])
    if source.shape != edited.shape or (mask is not None and mask.shape != source.shape[:3]):
        return {}
    return {row.name: float(row.values[0]) for row in measure_edit(source, edited, mask=mask).rows}


def _source(nodes: Mapping[str, Any], run: Run) -> tuple[Any, Any]:
    """The image that was edited and the mask that the edit took, or None."""
    loaders = [name for name in (IMAGE_NODE, *nodes) if name in run.results and _loads(nodes[name])]
    if not loaders:
        return None, None
    taken = {(str(v[0]), v[1]) for node in nodes.values() for v in node["inputs"].values() if is_link(v)}
    image = run.results[loaders[0]]
    if MASK_NODE in run.results:
        return image[0], run.results[MASK_NODE][0]
    return image[0], image[1] if (loaders[0], 1) in taken else None


def _loads(node: Mapping[str, Any]) -> bool:
    return node["class_type"] in LOADERS
