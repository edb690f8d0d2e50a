"""The workflows that ship with EditKit. All use the bundled model."""

from __future__ import annotations

from collections.abc import Callable

from . import attention, blended, flow, inversion, layered, style
from .graph import Graph

WORKFLOWS: dict[str, Callable[[], Graph]] = {
    make.__name__: make for module in (blended, inversion, attention, layered, style, flow) for make in module.WORKFLOWS
}
