"""The manifest of a batch: one JSON object per line, each of which changes some inputs of the same workflow."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...pipelines.core.errors import LoadError, ParameterError
from ..runner import is_link

# Keys of a line, and the types of their values.
KEYS: dict[str, Any] = {
    "id": (str, int),
    "image": str,
    "mask": str,
    "prompt": str,
    "source_prompt": str,
    "negative": str,
    "seed": int,
    "overrides": dict,
}
# Prompts by the titles of their nodes in the shipped workflows, and by the inputs of Align Prompts (P2P, Word Swap).
PROMPTS = {
    "prompt": ("Target prompt", "target_text"),
    "source_prompt": ("Source prompt", "source_text"),
    "negative": ("Negative prompt", ""),
}
ALIGN = "EditKit_AlignPrompts"
LOADERS = ("EditKit_LoadExample", "LoadImage")  # outputs: image, mask
SEEDS = ("seed", "noise_seed")
# They encode or invert the source; with their seed unchanged, lines of one image can share the result.
OF_THE_SOURCE = ("EditKit_EncodeImage", "EditKit_InvertDDIM", "EditKit_StyleInvert")
IMAGE_NODE, MASK_NODE = "line image", "line mask"


@dataclass(frozen=True)
class Line:
    """One line of a manifest.

    Attributes:
        number: from 1, empty lines counted.
        content: its bytes.
    """

    number: int
    content: bytes

    def digest(self, workflow: str) -> str:
        """What tells this edit from another one: 16 hexadecimal digits over the workflow and the line."""
        return sha256(workflow.encode() + b"\n" + self.content).hexdigest()[:16]

    def fields(self) -> dict[str, Any]:
        """The edit that the line describes; null is the same as no value. Raises ParameterError."""
        try:
            found = json.loads(self.content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"the line is no JSON object ({str(error)[:100]})") from error
        if not isinstance(found, dict):
            raise ParameterError(f"the line is a {type(found).__name__}: give a JSON object")
        fields = {key: value for key, value in found.items() if value is not None}
        for key, value in fields.items():
            if key not in KEYS:
                raise ParameterError(f"the line has {key[:40]!r}: choose from {', '.join(KEYS)}")
            if not isinstance(value, KEYS[key]) or isinstance(value, bool):
                raise ParameterError(f"{key} is a {type(value).__name__}: see 'editkit batch --help' for its type")
        return fields


def read_lines(manifest: Path) -> Iterator[Line]:
    """The lines of a file that are not empty, one at a time. Raises LoadError for a file that cannot be read."""
    try:
        with manifest.open("rb") as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    yield Line(number, content.strip())
    except OSError as error:
        raise LoadError(f"{manifest} cannot be read as a manifest ({error}): give a file of JSON lines") from error


# ------------------------------------------------------------------------------------------------- line to workflow
def workflow_of(workflow: Mapping[str, Any], fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The workflow of one line.

    Args:
        workflow: nodes by their id, checked.
        fields: of the line, checked.
        folder: that image and mask are in.
    Returns: a copy with the line's image, mask, prompts, seed and overrides, in this order.
    Raises: ParameterError for what the workflow has no place for, LoadError for an image that cannot be read.
    """
    nodes = copy.deepcopy(dict(workflow))
    _set_images(nodes, fields, folder)
    for key, (title, name) in PROMPTS.items():
        if key in fields:
            _set_prompt(nodes, key, title, name, fields[key])
    if "seed" in fields:
        _set_seed(nodes, fields["seed"])
    for where, inputs in fields.get("overrides", {}).items():
        node = nodes[find_node(nodes, where)]
        if not isinstance(inputs, dict):
            raise ParameterError(f"overrides of {where!r} are a {type(inputs).__name__}: give inputs and their values")
        node["inputs"].update(inputs)
    return nodes


def find_node(nodes: Mapping[str, Any], where: str) -> str:
    """The id of a node by its id or title. Raises ParameterError if no node or several have the title."""
    if where in nodes:
        return where
    found = [name for name in nodes if _title(nodes[name]) == where]
    if len(found) == 1:
        return found[0]
    count = "several nodes" if found else "no node"
    raise ParameterError(
        f"overrides name {where[:60]!r}, and {count} of the workflow have this title: give the node's id"
    )


def _title(node: Mapping[str, Any]) -> str:
    about = node.get("_meta")
    return str(about.get("title", "")) if isinstance(about, Mapping) else ""


def _set_prompt(nodes: dict[str, Any], key: str, title: str, name: str, text: str) -> None:
    """Every node with the title of the prompt takes the text, and every Align Prompts (P2P, Word Swap)."""
    places = [(node, "text") for node in nodes.values() if _title(node) == title and "text" in node["inputs"]]
    places += [(node, name) for node in nodes.values() if node["class_type"] == ALIGN and name in node["inputs"]]
    if not places:
        raise ParameterError(f"{key} has no node {title!r} in this workflow: set the text with overrides")
    for node, name in places:
        node["inputs"][name] = text


def _set_seed(nodes: dict[str, Any], seed: int) -> None:
    """Every seed of the workflow but those of encoding and inversion; each node checks its range."""
    for node in nodes.values():
        for name in SEEDS:
            if name in node["inputs"] and node["class_type"] not in OF_THE_SOURCE:
                node["inputs"][name] = seed


def _set_images(nodes: dict[str, Any], fields: Mapping[str, Any], folder: Path) -> None:
    """Load the line's image and mask in place of the workflow's own."""
    loaders = [name for name, node in nodes.items() if node["class_type"] in LOADERS]
    if len(loaders) != 1 and ("image" in fields or "mask" in fields):
        raise ParameterError(
            f"image is set, but the workflow loads {len(loaders)} images: set the inputs of its Load Image with overrides"
        )
    if "image" in fields:
        nodes[IMAGE_NODE] = {"class_type": "LoadImage", "inputs": {"image": fields["image"]}}
        _relink(nodes, loaders[0], 0, [IMAGE_NODE, 0])
        if "mask" not in fields and _relink(nodes, loaders[0], 1, [IMAGE_NODE, 1]):
            if not _has_transparency(folder / fields["image"]):
                raise ParameterError("mask is missing: give one, or an image whose transparent pixels are the mask")
    if "mask" in fields:
        channel = "alpha" if _has_transparency(folder / fields["mask"]) else "red"
        nodes[MASK_NODE] = {"class_type": "LoadImageMask", "inputs": {"image": fields["mask"], "channel": channel}}
        if not _relink(nodes, loaders[0], 1, [MASK_NODE, 0]):
            raise ParameterError("mask is set, but the workflow has no node that takes one: leave it out")


def _relink(nodes: dict[str, Any], loader: str, output: int, link: list[Any]) -> int:
    """Take `link` wherever an output of the loader was taken; how often that was."""
    count = 0
    for node in nodes.values():
        for name, value in node["inputs"].items():
            if is_link(value) and [str(value[0]), value[1]] == [loader, output]:
                node["inputs"][name] = link
                count += 1
    return count


def _has_transparency(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as file:
            return "A" in file.getbands() or "transparency" in file.info
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise LoadError(f"{path} cannot be read as an image ({error}): give a path below {path.parent}") from error
