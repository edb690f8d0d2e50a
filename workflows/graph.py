"""A workflow, described once and written in both of ComfyUI's formats: UI (page) and API (server)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from .elements import Group, Node, Output, Socket, sockets
from .layout import Box, Placement, place
from .stock import STOCK, Info

NAMESPACE = uuid.UUID("6f4d2b8e-54c0-4b87-9d0c-5d5a0f1b7a11")
FRONTEND = "1.27.10"
NOTE = "MarkdownNote"


def our_nodes() -> dict[str, Info]:
    """Every EditKit node as `/object_info` describes it."""
    from ..headless.runner import load_host

    load_host()
    from ..nodes.extension import NODES

    infos = (node.GET_NODE_INFO_V1() for node in NODES)
    return {info["name"]: info for info in infos}


class Graph:
    """A workflow. Nodes are added row by row, group by group, column by column.

    Args:
        name: the file's name without its ending.    note: Markdown, shown left of everything.
    """

    def __init__(self, name: str, note: str) -> None:
        self.name, self.note = name, note
        self.known = STOCK | our_nodes()
        self.nodes: list[Node] = []
        self.rows: list[list[Group]] = [[]]

    def row(self) -> None:
        """Put the next groups below the last ones, at the left again."""
        self.rows.append([])

    @contextmanager
    def group(self, title: str) -> Iterator[Group]:
        """Nodes added inside belong to one titled frame."""
        self.rows[-1].append(Group(title))
        yield self.rows[-1][-1]

    def column(self) -> None:
        """Put the next nodes right of the last ones, in the same group."""
        self.rows[-1][-1].columns.append([])

    def add(self, kind: str, title: str | None = None, **inputs: Any) -> Node:
        """A node below the last one.

        Each input is an `Output` or the value of a widget; a widget that is left out has its default.
        Raises: KeyError for a node or input that does not exist.
        """
        info = self.known[kind]
        unknown = set(inputs) - {socket.name for socket in sockets(info)}
        if unknown:
            raise KeyError(f"{kind} has no input {', '.join(sorted(unknown))}")
        node = Node(len(self.nodes) + 1, kind, title or info["display_name"], info, inputs)
        self.nodes.append(node)
        self.rows[-1][-1].columns[-1].append(node)
        return node

    def to_api(self) -> dict[str, Any]:
        """The server's format: class and inputs by node id."""
        return {str(node.id): _api_node(node) for node in self.nodes}

    def to_ui(self) -> dict[str, Any]:
        """The page's format: nodes with places and sizes, links, groups and the note."""
        links = [
            [number, source.node.id, source.slot, node.id, slot, socket_type]
            for number, (source, node, slot, socket_type) in enumerate(self._links(), start=1)
        ]
        placement = place(self.rows, self.note)
        groups = [group for row in self.rows for group in row]
        note_id = len(self.nodes) + 1
        nodes = [_ui_node(node, order, placement, links) for order, node in enumerate(self.nodes)]
        return {
            "id": str(uuid.uuid5(NAMESPACE, self.name)),
            "revision": 0,
            "last_node_id": note_id,
            "last_link_id": len(links),
            "nodes": [*nodes, _ui_note(note_id, self.note, placement.note, len(nodes))],
            "links": links,
            "groups": [_ui_group(number, group, box) for number, group, box in zip(count(1), groups, placement.groups)],
            "config": {},
            "extra": {"ds": placement.view, "frontendVersion": FRONTEND},
            "version": 0.4,
        }

    def _links(self) -> Iterator[tuple[Output, Node, int, str]]:
        """Every link: from which output, to which node, at which of its slots, and of which type."""
        for node in self.nodes:
            for slot, socket in enumerate(slots(node)):
                source = node.inputs.get(socket.name)
                if isinstance(source, Output):
                    yield source, node, slot, source.kind


def slots(node: Node) -> list[Socket]:
    """A node's input slots as the page numbers them: sockets, then one for each widget."""
    return sorted(node.sockets, key=lambda socket: socket.is_widget)


def _api_node(node: Node) -> dict[str, Any]:
    inputs = {}
    for socket in node.sockets:
        value = node.inputs.get(socket.name)
        if isinstance(value, Output):
            inputs[socket.name] = [str(value.node.id), value.slot]
        elif socket.is_widget:
            inputs[socket.name] = node.value(socket)
    return {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title}}


def _ui_node(node: Node, order: int, placement: Placement, links: list[list]) -> dict[str, Any]:
    arriving = {link[4]: link[0] for link in links if link[3] == node.id}
    leaving = [[link[0] for link in links if link[1:3] == [node.id, slot]] for slot in range(len(node.info["output"]))]
    box = placement.nodes[node.id]
    written = {
        "id": node.id,
        "type": node.type,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [_ui_input(socket, arriving.get(slot)) for slot, socket in enumerate(slots(node))],
        "outputs": [
            {"name": name, "type": kind, "links": numbers or None}
            for name, kind, numbers in zip(node.info["output_name"], node.info["output"], leaving, strict=True)
        ],
        "properties": {"Node name for S&R": node.type},
        "widgets_values": _widget_values(node),
    }
    if node.title != node.info["display_name"]:
        written["title"] = node.title
    return written


def _ui_input(socket: Socket, link: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": socket.name, "type": socket.kind}
    if socket.optional:
        entry["shape"] = 7  # drawn as a ring
    if socket.is_widget:
        entry["widget"] = {"name": socket.name}
    return {**entry, "link": link}


def _widget_values(node: Node) -> list[Any]:
    values = []
    for socket in node.sockets:
        if socket.is_widget:
            value = node.value(socket)
            values.append(socket.default if isinstance(value, Output) else value)
            values += ["fixed"] if socket.has_control else []
    return values


def _ui_group(number: int, group: Group, box: Box) -> dict[str, Any]:
    return {
        "id": number,
        "title": group.title,
        "bounding": box.values,
        "color": "#3f789e",
        "font_size": 24,
        "flags": {},
    }


def _ui_note(number: int, text: str, box: Box, order: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": NOTE,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About this workflow",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }
