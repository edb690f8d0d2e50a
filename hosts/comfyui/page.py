"""What ComfyUI's page is told while a node runs, and what its user asks of it: warnings, the course of a learning, a stop.

Nothing here needs a page: without a server, or with a page that cannot be reached, a node runs as it is.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

log = logging.getLogger("editkit")

EVENT, STOP = "editkit.learning", "/editkit/stop"
EVERY = 0.25  # seconds between two messages of a learning
POINTS = 160  # of a loss curve

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


# ----------------------------------------------------------------------------------------------------------- learning
_stops: set[str] = set()  # nodes whose learning should end


class LiveLearning:
    """Tells the page how the learning of the running node goes, and whether its user asked to end it."""

    def __init__(self) -> None:
        context = _running_node()
        self.node = "" if context is None else str(context.node_id)
        self._began = self._sent = time.monotonic()
        self._losses: list[float] = []
        _stops.discard(self.node)

    def losses(self, values: Sequence[float]) -> None:
        """The losses so far, for the next message."""
        self._losses = [*values]

    def step(self, done: int, total: int) -> None:
        """A message, if the last one was long enough ago. Nothing before the first losses."""
        now = time.monotonic()
        if not self._losses or not self.node or (now - self._sent < EVERY and done < total):
            return
        self._sent = now
        stride = max(1, -(-len(self._losses) // POINTS))
        message = {
            "node": self.node,
            "done": done,
            "total": total,
            "seconds": now - self._began,
            "losses": self._losses[::stride],
            "last": self._losses[-1],
            "stopping": self.stop_requested(),
        }
        try:
            server = _server()
            if server is not None:
                server.send_sync(EVENT, message, getattr(server, "client_id", None))
        except Exception:  # a page that is gone never stops a node
            log.debug("the page could not be told about a learning", exc_info=True)

    def stop_requested(self) -> bool:
        return self.node in _stops

    def proceed(self) -> None:
        _stops.discard(self.node)


def serve_stop() -> None:
    """Let the page end the learning of a node and keep what it has learned: POST /editkit/stop {"node": id}."""
    server = _server()
    module = next((sys.modules[name] for name in SERVERS if hasattr(sys.modules.get(name), "web")), None)
    if server is None or module is None:
        return
    listed = getattr(server.routes, "routes", server.routes)  # the packaged fork keeps them in a list of a wrapper
    if any(getattr(route, "path", None) == STOP for route in listed):
        return

    async def stop(request: Any) -> Any:
        try:
            node = str((await request.json())["node"])
        except (KeyError, TypeError, ValueError):
            return module.web.Response(status=400)
        _stops.add(node)
        return module.web.Response(status=204)

    server.routes.post(STOP)(stop)
