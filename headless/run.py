"""The inputs and outputs of one headless execution of a workflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipelines.core.progress import Progress, silent


@dataclass
class Run:
    """One execution of a workflow.

    Attributes:
        input_folder: where Load Image looks for files.
        output_folder: where Save Image and other nodes write files.
        on_node: called before each node with the number of finished nodes, their total and the node's class.
        progress: makes the progress of a node's steps; called before each node.
        saved: files written, in order.
        texts: texts that nodes showed, by node id.
        workflow: the nodes that run, by their id.
        results: outputs of the finished nodes, by node id; a node that has some at the start is not executed.
    """

    input_folder: Path
    output_folder: Path
    on_node: Callable[[int, int, str], None] = lambda done, total, name: None
    progress: Callable[[], Progress] = lambda: silent
    saved: list[Path] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    workflow: dict[str, Any] = field(default_factory=dict)
    results: dict[str, tuple[Any, ...]] = field(default_factory=dict)
