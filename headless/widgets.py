"""The values that a workflow file holds itself: their types and ranges, which ComfyUI checks before it runs a workflow."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from ..pipelines.core.errors import ParameterError
from .arguments import LARGEST_SEED, check_text

# The types of a stock node's widgets.
ANNOTATIONS = {"int": "INT", "float": "FLOAT", "str": "STRING", "bool": "BOOLEAN"}
# The ranges of a stock node's numbers, as in ComfyUI.
STOCK_RANGES = {
    "amount": (1, 64),
    "batch_index": (0, 4095),
    "batch_size": (1, 4096),
    "cfg": (0, 100),
    "denoise": (0, 1),
    "height": (16, 16384),
    "length": (1, 4096),
    "noise_seed": (0, LARGEST_SEED),
    "seed": (0, LARGEST_SEED),
    "steps": (1, 10000),
    "width": (16, 16384),
}
# Choices that are names of files or folders: without ComfyUI, paths.
PATHS = {("EditKit_LoadModel", "model"), ("EditKit_LoadRanker", "weights"), ("EditKit_LoadEmbeddings", "file")}
NEEDED = {
    "INT": "give a whole number",
    "FLOAT": "give a number",
    "BOOLEAN": "give true or false",
    "STRING": "give a text",
}


@dataclass(frozen=True)
class Widget:
    """What an input of a node takes.

    Attributes:
        kind: the type, as ComfyUI names it; empty where it is not known.
        lowest, highest: of a number; None = no bound.
        options: of a choice; empty = any.
    """

    kind: str = ""
    lowest: float | None = None
    highest: float | None = None
    options: tuple[Any, ...] = ()


def widgets_of(cls: Any) -> dict[str, Widget]:
    """The inputs of a node by name; of nodes that are not ours, nothing."""
    if getattr(cls, "stock_node", False):
        return {
            name: Widget(ANNOTATIONS.get(str(parameter.annotation), ""), *STOCK_RANGES.get(name, (None, None)))
            for name, parameter in inspect.signature(cls).parameters.items()
        }
    if getattr(cls, "__module__", "").startswith(__name__.partition(".headless")[0] + ".nodes"):
        schema = cls.define_schema()
        return {entry.id: _widget(schema.node_id, entry) for entry in schema.inputs}
    return {}


def _widget(node: str, entry: Any) -> Widget:
    options = () if (node, entry.id) in PATHS else getattr(entry, "options", None) or ()
    return Widget(entry.get_io_type(), getattr(entry, "min", None), getattr(entry, "max", None), tuple(options))


def checked_widget(name: str, value: Any, widget: Widget) -> Any:
    """A value that the workflow holds itself. Raises ParameterError for another type, or a value out of range."""
    checked = _of_type(name, value, widget.kind)
    if widget.options and checked not in widget.options:
        choices = ", ".join(map(str, widget.options))
        raise ParameterError(f"input {name!r} is {_brief(value)}: choose one of {choices}")
    if widget.kind in ("INT", "FLOAT"):
        low, high = widget.lowest, widget.highest
        if (low is not None and checked < low) or (high is not None and checked > high):
            least = "any" if low is None else f"{low:g}" if widget.kind == "FLOAT" else str(low)
            most = "any" if high is None else f"{high:g}" if widget.kind == "FLOAT" else str(high)
            raise ParameterError(f"input {name!r} is {_brief(value)}: give a number from {least} to {most}")
    return checked


def _of_type(name: str, value: Any, kind: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "INT" and number and value == value // 1:
        return int(value)
    if kind == "FLOAT" and number and abs(value) <= sys.float_info.max:
        return value
    if isinstance(value, str):
        check_text(value, f"input {name!r}")
    types: dict[str, Any] = {"STRING": str, "COMBO": (str, int, float), "BOOLEAN": bool, "": object}
    if kind in types and isinstance(value, types[kind]):
        return value
    raise ParameterError(f"input {name!r} is {_brief(value)}: {NEEDED.get(kind, 'connect the output of a node')}")


def _brief(value: Any) -> str:
    return repr(str(value)[:60])
