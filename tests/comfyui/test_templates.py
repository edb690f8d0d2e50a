"""Templates for checkpoints, blueprints and the search in ComfyUI's own page, in a headless Chromium.

Needs what `test_pages.py` needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from editkit.tests.comfyui.page import ComfyPage, find_chromium
from editkit.tests.comfyui.server import ComfyServer
from editkit.tests.nodes.test_search import WORDS
from editkit.tests.workflows import shipped
from editkit.tests.workflows.test_blueprints import FOLDER, NAMES
from editkit.tests.workflows.test_checkpoint_templates import NAMES as TEMPLATES
from editkit.tests.workflows.test_checkpoint_templates import page as template_of

SEARCH = """words => {
    const store = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get("nodeDef");
    return store.nodeSearchService.searchNode(words).map(found => found.name);
}"""
UNPACK = """() => {
    const [node] = window.app.graph._nodes;
    window.app.graph.unpackSubgraph(node);
    return window.app.graph._nodes.map(inner => inner.type).sort();
}"""
SHOWN = 64  # the page shows as many results


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), shipped.ROOT) as server:
        yield server


@pytest.fixture(scope="module")
def page(server: ComfyServer) -> Iterator[ComfyPage]:
    pytest.importorskip("playwright", reason="playwright is not installed: no page to test with")
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no Chromium on the PATH, and CHROMIUM is not set: no page to test with")
    with ComfyPage(server.url, chromium) as page:
        yield page


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_for_a_checkpoint_loads_and_gives_its_step_nodes(page: ComfyPage, name: str) -> None:
    from editkit.workflows.checkpoints import template

    page.load(template_of(name))
    assert not [node["type"] for node in page.nodes() if not node["known"]]
    assert not page.errors
    assert page.prompt() == template(name).to_api()


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_unpacks_into_its_step_nodes(page: ComfyPage, name: str) -> None:
    blueprint: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    page.load(blueprint)
    (node,) = page.nodes()
    assert node["known"] and node["inputs"] == [entry["name"] for entry in blueprint["nodes"][0]["inputs"]]
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    assert page.ask(UNPACK) == sorted(inner["type"] for inner in subgraph["nodes"])
    assert not page.errors


def test_newer_hosts_list_the_blueprints(server: ComfyServer) -> None:
    try:
        found = server.get("/global_subgraphs")
    except HTTPError:
        pytest.skip("this ComfyUI reads no blueprints of custom nodes")
    assert set(NAMES) <= {entry["name"] for entry in found.values()}


@pytest.mark.parametrize("words", [*WORDS, "invert image", "unsampler"])
def test_the_page_s_search_finds_what_artists_type(page: ComfyPage, words: str) -> None:
    node = f"EditKit_{WORDS.get(words, 'InvertDDIM')}"
    assert node in page.ask(SEARCH, words)[:SHOWN]
