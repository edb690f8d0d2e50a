"""Every warning shows under its node, by the host's progress text, as well as in the log."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
from comfy_execution.utils import CurrentNodeContext

from editkit.hosts.comfyui import node_warnings
from editkit.hosts.host import show_warnings

log = logging.getLogger("editkit")


@pytest.fixture
def page(monkeypatch):
    """What the page was told: (text, node id)."""
    sent: list[tuple[str, str]] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    module = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, node_warnings.SERVERS[0], module)
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
    monkeypatch.setattr(sys.modules[node_warnings.SERVERS[0]].PromptServer.instance, "send_progress_text", gone)
    with CurrentNodeContext("run", "7"):
        log.warning("said to nobody")
    assert "said to nobody" in caplog.text
