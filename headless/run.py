"""What one headless execution of a workflow reads, writes and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """One execution of a workflow.

    Attributes:
        input_folder: where Load Image looks.    output_folder: where Save Image writes.
        saved: files written, in order.    texts: texts that nodes showed, by node id.
    """

    input_folder: Path
    output_folder: Path
    on_node: Callable[[int, int, str], None] = lambda done, total, name: None
    saved: list[Path] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    results: dict[str, tuple[Any, ...]] = field(default_factory=dict)
