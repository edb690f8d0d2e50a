"""Warnings under the node that runs, as well as in the log: ComfyUI's page shows a node's progress text below it."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger("editkit")

SERVERS = ("server", "comfy.cmd.server")  # the module of ComfyUI's server, and of the packaged fork's


class NodeWarnings(logging.Handler):
    """Sends every EditKit warning to the page, for the node that runs. Warnings of one run of a node are shown together."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._node: tuple[Any, str] | None = None
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning. A page that cannot be reached never stops an edit."""
        try:
            context, server = _running_node(), _server()
            if context is None or server is None:
                return
            run = getattr(context, "prompt_id", None) or getattr(context, "task_id", None)  # the fork's name
            node = (run, context.node_id)
            if node != self._node:
                self._node, self._lines = node, []
            line = f"Warning: {record.getMessage()}"
            if line not in self._lines:
                self._lines.append(line)
            server.send_progress_text("\n".join(self._lines), context.node_id)
        except Exception:  # noqa: BLE001 (logging never raises)
            self.handleError(record)


def _running_node() -> Any | None:
    """The prompt and the node that this thread runs; None outside a run."""
    from comfy_execution.utils import get_executing_context

    return get_executing_context()


def _server() -> Any | None:
    """The server with an open page; None without a server, or for one without progress texts."""
    modules = (sys.modules.get(name) for name in SERVERS)
    instances = (getattr(getattr(module, "PromptServer", None), "instance", None) for module in modules)
    return next((server for server in instances if hasattr(server, "send_progress_text")), None)


def show_warnings_under_nodes() -> None:
    """Send EditKit's warnings to the page from now on; a second call changes nothing."""
    if not any(isinstance(handler, NodeWarnings) for handler in log.handlers):
        log.addHandler(NodeWarnings())
