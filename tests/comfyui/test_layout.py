"""What a template looks like after a run in ComfyUI's own page: nodes grow with their previews, and still nothing overlaps.

Needs what `test_pages.py` needs. All templates run in one server, with few steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.comfyui.page import ComfyPage, find_chromium
from editkit.tests.comfyui.server import ComfyServer
from editkit.tests.workflows import shipped

EVERY = pytest.mark.parametrize("name", shipped.NAMES)
SHORTEN = """few => {
    const inner = [...(window.app.graph.subgraphs?.values() ?? [])].flatMap(graph => graph._nodes);
    for (const node of [...window.app.graph._nodes, ...inner])
        for (const widget of node.widgets ?? []) {
            const most = few[`${node.type}.${widget.name}`];
            if (most !== undefined) widget.value = Math.min(most, widget.value);
        }
}"""
RUN = """async () => {
    const { api } = window.app;
    const done = new Promise(resolve => {
        api.addEventListener("execution_success", () => resolve(""), { once: true });
        api.addEventListener("execution_error", event => resolve(event.detail.exception_message), { once: true });
    });
    await api.queuePrompt(0, await window.app.graphToPrompt());
    return await done;
}"""


LOADED = """() => Object.entries(window.app.nodeOutputs).every(([id, output]) => {
    const node = window.app.graph.getNodeById(id);
    return !node || !output.images?.length || node.imgs?.length || node.widgets?.some(w => w.name.startsWith("editkit"));
})"""


def run(page: ComfyPage, name: str) -> None:
    """Load a template, run it with few steps, and wait until the page has drawn what came."""
    page.load(shipped.ui(name))
    page.ask(SHORTEN, {".".join(key): few for key, few in shipped.FEW.items()})
    assert not page.ask(RUN)
    for _ in range(100):  # until the previews are loaded
        if page.ask(LOADED):
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def drawn(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Every template's nodes after a run."""
    pytest.importorskip("playwright", reason="playwright is not installed: no page to test with")
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no Chromium on the PATH, and CHROMIUM is not set: no page to test with")
    with (
        ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), shipped.ROOT) as server,
        ComfyPage(server.url, chromium) as page,
    ):
        found = {}
        for name in shipped.NAMES:
            run(page, name)
            found[name] = page.nodes()
        assert not page.errors
        yield found


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node with its title bar, as large as the page draws it."""
    x, y, width, height = node["box"]
    return x, y - 30, x + max(width, node["least"][0]), y + max(height, node["least"][1])


@EVERY
def test_nothing_overlaps_after_a_run(drawn: dict[str, Any], name: str) -> None:
    for a, b in combinations(drawn[name], 2):
        (left, top, right, bottom), (x, y, end, low) = box(a), box(b)
        assert not (left < end and x < right and top < low and y < bottom), f"{a['type']} covers {b['type']}"


@EVERY
def test_nodes_stay_inside_their_groups_after_a_run(drawn: dict[str, Any], name: str) -> None:
    groups = [group["bounding"] for group in shipped.ui(name)["groups"]]
    for node in drawn[name]:
        left, top, right, bottom = box(node)
        inside = [x <= left and y <= top and right <= x + w and bottom <= y + h for x, y, w, h in groups]
        assert sum(inside) == (node["type"] != "MarkdownNote"), f"{node['type']} {node['box']} {node['least']}"
