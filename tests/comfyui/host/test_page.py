"""What the page is told: warnings under their nodes, and the course of a learning, which it may end."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import SimpleNamespace

import pytest
from comfy_execution.utils import CurrentNodeContext

from editkit.hosts.comfyui import page as told
from editkit.hosts.host import show_warnings

log = logging.getLogger("editkit")


@pytest.fixture
def page(monkeypatch):
    """What the page was told: (text, node id)."""
    sent: list[tuple[str, str]] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, told.SERVERS[0], module)
    before = list(log.handlers)
    show_warnings()
    show_warnings()
    yield sent
    log.handlers[:] = before


def test_warnings_of_a_node_show_together_under_it(page, caplog) -> None:
    with CurrentNodeContext("run", "7"):
        log.warning("mask %d is empty", 0)
        log.warning("mask %d is empty", 0)
        log.warning("the stroke is gone")
        log.info("not a warning")
    with CurrentNodeContext("run", "8"):
        log.warning("another node")
    assert page[0] == ("Warning: mask 0 is empty", "7")
    assert page[-2] == ("Warning: mask 0 is empty\nWarning: the stroke is gone", "7")
    assert page[-1] == ("Warning: another node", "8")
    assert "the stroke is gone" in caplog.text


def test_warnings_outside_a_run_go_to_the_log_alone(page, caplog) -> None:
    log.warning("no node runs")
    assert not page
    assert "no node runs" in caplog.text


def test_a_page_that_cannot_be_reached_never_stops_a_node(page, monkeypatch, caplog) -> None:
    def gone(text: str, node: str) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(sys.modules[told.SERVERS[0]].PromptServer.instance, "send_progress_text", gone)
    with CurrentNodeContext("run", "7"):
        log.warning("said to nobody")
    assert "said to nobody" in caplog.text


def test_a_learning_is_told_and_may_be_ended(monkeypatch) -> None:
    sent: list[tuple[str, dict]] = []
    routes: list[str] = []
    handlers: dict = {}

    class Routes(list):
        def post(self, path):
            self.append(SimpleNamespace(path=path))
            return lambda handler: handlers.setdefault(path, handler)

    server = SimpleNamespace(
        send_progress_text=None,
        routes=Routes(routes),
        client_id="me",
        send_sync=lambda event, data, sid: sent.append((event, data)),
    )
    web = SimpleNamespace(Response=lambda status: status)
    monkeypatch.setitem(
        sys.modules, told.SERVERS[0], SimpleNamespace(PromptServer=SimpleNamespace(instance=server), web=web)
    )
    told.serve_stop()
    told.serve_stop()
    assert [route.path for route in server.routes] == [told.STOP]
    with CurrentNodeContext("run", "7"):
        live = told.LiveLearning()
    live.step(1, 10)
    assert not sent  # nothing is learned yet
    live.losses([3.0, 2.0])
    live.step(10, 10)
    assert sent[0][0] == told.EVENT
    assert sent[0][1].items() >= {"node": "7", "done": 10, "total": 10, "losses": [3.0, 2.0], "last": 2.0}.items()

    class Request:
        def __init__(self, body):
            self.body = body

        async def json(self):
            return self.body

    assert asyncio.run(handlers[told.STOP](Request({"node": 8}))) == 204 and not live.stop_requested()
    assert asyncio.run(handlers[told.STOP](Request([]))) == 400
    assert asyncio.run(handlers[told.STOP](Request({"node": 7}))) == 204 and live.stop_requested()
    live.proceed()
    assert not live.stop_requested()
