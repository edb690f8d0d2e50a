"""A workflow, described once and written in both of ComfyUI's formats: UI (page) and API (server)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from uuid import uuid5

from .elements import Fold, Group, Node, Output, sockets
from .layout import Box, fold_size, place
from .page_format import (
    FRONTEND,
    NAMESPACE,
    Port,
    fold_id,
    input_ports,
    output_ports,
    slots,
    ui_fold,
    ui_group,
    ui_node,
    ui_note,
    ui_subgraph,
)
from .stock import STOCK, Info

COLOURS = ("#3f789e", "#8a6d3b", "#5a8a4a")  # of the first group, of those between, and of the last
RESULT = "RESULT"


def our_nodes() -> dict[str, Info]:
    """Every EditKit node as `/object_info` describes it."""
    from ..headless.runner import load_host

    load_host()
    from ..nodes.extension import NODES

    infos = (node.GET_NODE_INFO_V1() for node in NODES)
    return {info["name"]: info for info in infos}


class Graph:
    """A workflow. Nodes are added group by group, in order of dependence.

    Args:
        name: the name of the description.    note: Markdown, shown below the first group.
    """

    def __init__(self, name: str, note: str) -> None:
        self.name, self.note = name, note
        self.known = STOCK | our_nodes()
        self.nodes: list[Node] = []
        self.groups: list[Group] = []
        self._fold: Fold | None = None
        self._last_id = 0

    @contextmanager
    def group(self, title: str) -> Iterator[Group]:
        """Nodes added inside belong to one titled frame."""
        self.groups.append(Group(title))
        yield self.groups[-1]

    def add(self, kind: str, title: str | None = None, **inputs: Any) -> Node:
        """A node behind the last one.

        Each input is an `Output` or the value of a widget; a widget that is left out has its default.
        Raises: KeyError for a node or input that does not exist.
        """
        info = self.known[kind]
        unknown = set(inputs) - {socket.name for socket in sockets(info)}
        if unknown:
            raise KeyError(f"{kind} has no input {', '.join(sorted(unknown))}")
        title = title or (RESULT if kind == "SaveImage" else info["display_name"])
        node = Node(self._next_id(), kind, title, info, inputs)
        self.nodes.append(node)
        (self.groups[-1] if self._fold is None else self._fold).nodes.append(node)
        return node

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    @contextmanager
    def fold(self, title: str) -> Iterator[Fold]:
        """Nodes added inside are one node in the page, a subgraph."""
        self._fold = Fold(self._next_id(), title)
        self.groups[-1].nodes.append(self._fold)
        yield self._fold
        self._fold = None

    @property
    def folds(self) -> list[Fold]:
        return [entry for group in self.groups for entry in group.nodes if isinstance(entry, Fold)]

    def to_api(self) -> dict[str, Any]:
        """The server's format: class and inputs by node id. A node of a subgraph has the subgraph's id before its own."""
        outer = {node: f"{fold.id}:" for fold in self.folds for node in fold.nodes}
        return {f"{outer.get(node, '')}{node.id}": _api_node(node, outer) for node in self.nodes}

    def to_ui(self) -> dict[str, Any]:
        """The page's format: nodes with places and sizes, links, groups, subgraphs and the note."""
        folds = {fold: (input_ports(fold), output_ports(fold, self._outside(fold))) for fold in self.folds}
        links = [[number, *ends] for number, ends in enumerate(self._links(folds), start=1)]
        placement = place(self.groups, self.note, {fold: fold_size(fold, *ports) for fold, ports in folds.items()})
        note_id = self._next_id()
        shown = [entry for group in self.groups for entry in group.nodes]
        nodes = []
        for order, entry in enumerate(shown):
            arriving = {link[4]: link[0] for link in links if link[3] == entry.id}
            leaving: dict[int, list[int]] = {}
            for link in links:
                if link[1] == entry.id:
                    leaving.setdefault(link[2], []).append(link[0])
            box = placement.nodes[entry.id]
            if isinstance(entry, Fold):
                nodes.append(ui_fold(entry, fold_id(self.name, entry), order, box, folds[entry], arriving, leaving))
            else:
                nodes.append(ui_node(entry, order, box, arriving, leaving))
        definitions = self._subgraphs(folds, len(links) + 1)
        return {
            "id": str(uuid5(NAMESPACE, self.name)),
            "revision": 0,
            "last_node_id": note_id,
            "last_link_id": max([len(links), *(link["id"] for graph in definitions for link in graph["links"])]),
            "nodes": [*nodes, ui_note(note_id, self.note, placement.note, len(nodes))],
            "links": links,
            "groups": [
                ui_group(number, group, box, self._colour(number))
                for number, group, box in zip(count(1), self.groups, placement.groups)
            ],
            **({"definitions": {"subgraphs": definitions}} if definitions else {}),
            "config": {},
            "extra": {"ds": placement.view, "frontendVersion": FRONTEND},
            "version": 0.4,
        }

    def _subgraphs(self, folds: dict[Fold, tuple[list[Port], list[Port]]], first_link: int) -> list[dict[str, Any]]:
        made = []
        for fold, ports in folds.items():
            boxes = inside(fold)
            made.append(ui_subgraph(fold, fold_id(self.name, fold), boxes, ports, first_link, self._last_id))
            first_link += len(made[-1]["links"])
        return made

    def _outside(self, fold: Fold) -> list[Node]:
        return [node for node in self.nodes if node not in fold.nodes]

    def _colour(self, number: int) -> str:
        """The same colour for the same part of every workflow: what goes in, what happens, what comes out."""
        return COLOURS[0] if number == 1 else COLOURS[2] if number == len(self.groups) else COLOURS[1]

    def _links(self, folds: dict[Fold, tuple[list[Port], list[Port]]]) -> Iterator[list[Any]]:
        """Every link that the page shows: source and its slot, target and its slot, and the type."""
        for entry in (entry for group in self.groups for entry in group.nodes):
            if isinstance(entry, Fold):
                taken = [(slot, port.source) for slot, port in enumerate(folds[entry][0])]
            else:
                values = [(slot, entry.inputs.get(socket.name)) for slot, socket in enumerate(slots(entry))]
                taken = [(slot, value) for slot, value in values if isinstance(value, Output)]
            for slot, source in taken:
                if source is not None:
                    yield [*_shown_source(source, folds), entry.id, slot, source.kind]


def _shown_source(source: Output, folds: dict[Fold, tuple[list[Port], list[Port]]]) -> tuple[int, int]:
    """The node and slot that the page draws a link from: those of the subgraph where the source is inside one."""
    for fold, (_, outputs) in folds.items():
        if source.node in fold.nodes:
            return fold.id, next(slot for slot, port in enumerate(outputs) if port.source == source)
    return source.node.id, source.slot


def inside(fold: Fold) -> dict[int, Box]:
    """Where the nodes of a subgraph lie."""
    return place([Group("", list(fold.nodes))], "", {}).nodes


def _api_node(node: Node, outer: dict[Node, str]) -> dict[str, Any]:
    inputs = {}
    for socket in node.sockets:
        value = node.inputs.get(socket.name)
        if isinstance(value, Output):
            inputs[socket.name] = [f"{outer.get(value.node, '')}{value.node.id}", value.slot]
        elif socket.is_widget:
            inputs[socket.name] = node.value(socket)
    return {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title}}
