"""The shipped workflows in ComfyUI's own page, in a headless Chromium.

Needs COMFYUI_PATH, the package playwright (its browsers are not needed) and a Chromium: on the PATH, or named by CHROMIUM.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editkit.tests.comfyui.page import ComfyPage, find_chromium
from editkit.tests.comfyui.server import ComfyServer
from editkit.tests.workflows import shipped

EVERY = pytest.mark.parametrize("name", shipped.NAMES)
NOTE = "MarkdownNote"


@pytest.fixture(scope="module")
def page(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyPage]:
    pytest.importorskip("playwright", reason="playwright is not installed: no page to test with")
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no Chromium on the PATH, and CHROMIUM is not set: no page to test with")
    with (
        ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), shipped.ROOT) as server,
        ComfyPage(server.url, chromium) as page,
    ):
        yield page


@EVERY
def test_loads_without_a_missing_node_or_an_error(page: ComfyPage, name: str) -> None:
    workflow = shipped.ui(name)
    page.load(workflow)
    nodes = page.nodes()
    assert {node["id"] for node in nodes} == {node["id"] for node in workflow["nodes"]}
    assert not [node["type"] for node in nodes if not node["known"] or node["errors"]]
    assert not page.errors


@EVERY
def test_the_page_makes_the_api_twin(page: ComfyPage, name: str) -> None:
    """What the page would queue is workflows/api/NAME.json, but for a widget that Preview Any adds by itself."""
    page.load(shipped.ui(name))
    prompt = page.prompt()
    for node in prompt.values():
        if node["class_type"] == "PreviewAny":
            node["inputs"].pop("preview", None)
    assert prompt == shipped.api(name)


def is_written(values: list, node: dict, workflow: dict) -> bool:
    """Whether the page has the values of the file. A subgraph's node shows those of its inner nodes, which the file has."""
    graphs = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    if node["type"] not in graphs:
        return values == node["widgets_values"]
    inner = [value for part in graphs[node["type"]]["nodes"] for value in part.get("widgets_values", [])]
    return all(value in inner for value in values)


@EVERY
def test_the_page_keeps_places_sizes_and_values(page: ComfyPage, name: str) -> None:
    """Every node is large enough for what is on it: the page would make a smaller one grow over its neighbours."""
    workflow = shipped.ui(name)
    page.load(workflow)
    written = {node["id"]: node for node in workflow["nodes"]}
    for node in page.nodes():
        x, y, width, height = node["box"]
        assert [x, y] == written[node["id"]]["pos"]
        assert [width, height] == written[node["id"]]["size"], node["type"]
        assert node["least"][0] <= width, node["type"]
        assert node["least"][1] <= height, node["type"]
        if node["type"] not in ("PreviewAny", NOTE):
            assert is_written(node["values"], written[node["id"]], workflow), node["type"]


@EVERY
def test_saving_it_in_the_page_changes_nothing_that_matters(page: ComfyPage, name: str) -> None:
    workflow = shipped.ui(name)
    page.load(workflow)
    again = page.ask("() => window.app.graph.serialize()")
    assert again["links"] == workflow["links"]
    assert again["groups"] == workflow["groups"]
    saved = {node["id"]: node for node in again["nodes"]}
    for node in workflow["nodes"]:
        same = saved[node["id"]]
        assert [(i["name"], i["type"], i["link"]) for i in same.get("inputs", [])] == [
            (i["name"], i["type"], i["link"]) for i in node["inputs"]
        ]
        assert is_written(same["widgets_values"], node, workflow) or node["type"] == "PreviewAny"


def test_a_workflow_saved_when_an_input_took_fewer_types(page: ComfyPage) -> None:
    """Negatives were CONDITIONING before they could be embeddings too: saved links stay, and both kinds connect."""
    workflow = shipped.ui("blended_edit")
    slots = [slot for node in workflow["nodes"] for slot in node["inputs"] if slot["name"] == "negative"]
    assert slots and all(slot["type"] == "CONDITIONING,EDITKIT_EMBEDDINGS" for slot in slots)
    for slot in slots:
        slot["type"] = "CONDITIONING"
    page.load(workflow)
    assert not page.errors
    prompt = page.prompt()
    assert [n["inputs"]["negative"] for n in prompt.values() if "negative" in n["inputs"]] == [
        n["inputs"]["negative"] for n in shipped.api("blended_edit").values() if "negative" in n["inputs"]
    ]
    valid = "(kind) => window.LiteGraph.isValidConnection(kind, 'CONDITIONING,EDITKIT_EMBEDDINGS')"
    assert [page.ask(valid, kind) for kind in ("CONDITIONING", "EDITKIT_EMBEDDINGS", "LATENT")] == [True, True, False]


def test_text_is_drawn_at_the_zoom_a_workflow_opens_with(page: ComfyPage) -> None:
    for name in shipped.NAMES:
        assert shipped.ui(name)["extra"]["ds"]["scale"] > page.ask(
            "() => window.app.canvas.low_quality_zoom_threshold ?? 0.6"
        )
