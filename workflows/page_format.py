"""The page's own format of nodes, links, groups and subgraphs."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .elements import Fold, Group, Node, Output, Socket
from .layout import Box

NAMESPACE = uuid.UUID("6f4d2b8e-54c0-4b87-9d0c-5d5a0f1b7a11")
FRONTEND = "1.27.10"
NOTE = "MarkdownNote"
INSIDE, OUTSIDE = -10, -20  # the page's ids of the two ends of a subgraph
END_WIDTH = 130


@dataclass(eq=False)
class Port:
    """An input or an output of a subgraph: its name and type, and the slots of inner nodes behind it."""

    name: str
    kind: str
    slots: list[tuple[Node, int]] = field(default_factory=list)
    source: Output | None = None  # what it is connected to outside, or the inner output behind an output
    widget: Socket | None = None


def slots(node: Node) -> list[Socket]:
    """A node's input slots as the page numbers them: sockets, then one for each widget."""
    return sorted(node.sockets, key=lambda socket: socket.is_widget)


def input_ports(fold: Fold) -> list[Port]:
    """What a fold takes from outside, one port for each source, then the widgets that it shows."""
    found: dict[Output, Port] = {}
    for node in fold.nodes:
        for slot, socket in enumerate(slots(node)):
            source = node.inputs.get(socket.name)
            if isinstance(source, Output) and source.node not in fold.nodes:
                name = socket.name if source.node.id else source.node.info["output_name"][source.slot]
                port = found.setdefault(source, Port(_unused(name, found), source.kind, source=source))
                port.slots.append((node, slot))
    shown: dict[str, Port] = {}
    for node, name, label in fold.shown:  # widgets of the same label are one input
        slot, socket = next(entry for entry in enumerate(slots(node)) if entry[1].name == name)
        shown.setdefault(label, Port(label, socket.kind, widget=socket)).slots.append((node, slot))
    return [*found.values(), *shown.values()]


def _unused(name: str, ports: dict[Output, Port]) -> str:
    taken = {port.name for port in ports.values()}
    return next(tried for tried in (name, *(f"{name} {number}" for number in range(2, 99))) if tried not in taken)


def output_ports(fold: Fold, outside: Sequence[Node], *, all_of: Node | None = None) -> list[Port]:
    """What a fold gives: every inner output that a node outside takes, or every output of one inner node."""
    taken = [value for node in outside for value in node.inputs.values() if isinstance(value, Output)]
    if all_of is not None:
        taken = [Output(all_of, slot) for slot in range(len(all_of.info["output"]))]
    inner = dict.fromkeys(value for value in taken if value.node in fold.nodes)
    names = [value.node.info["output_name"][value.slot] for value in inner]
    return [
        Port(name if names.count(name) == 1 else f"{name} {place}", value.kind, source=value)
        for place, (value, name) in enumerate(zip(inner, names, strict=True), start=1)
    ]


def ui_node(
    node: Node, order: int, box: Box, arriving: dict[int, int], leaving: dict[int, list[int]]
) -> dict[str, Any]:
    """A node; `arriving` has the link of each of its input slots, `leaving` the links of each output."""
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
            {"name": name, "type": kind, "links": leaving.get(slot) or None}
            for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True))
        ],
        "properties": {"Node name for S&R": node.type, **node.properties},
        "widgets_values": widget_values(node),
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


def widget_values(node: Node) -> list[Any]:
    values = []
    for socket in node.sockets:
        if socket.is_widget:
            value = node.value(socket)
            values.append(socket.default if isinstance(value, Output) else value)
            values += ["fixed"] if socket.has_control else []
            values += ["image"] if socket.options.get("image_upload") else []
    return values


def ui_group(number: int, group: Group, box: Box, colour: str) -> dict[str, Any]:
    return {
        "id": number,
        "title": group.title,
        "bounding": box.values,
        "color": colour,
        "font_size": 24,
        "flags": {},
    }


def ui_note(number: int, text: str, box: Box, order: int) -> dict[str, Any]:
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


def fold_id(workflow: str, fold: Fold) -> str:
    """The subgraph's type: the same in every build."""
    return str(uuid.uuid5(NAMESPACE, f"{workflow}/{fold.id}"))


def ui_fold(
    fold: Fold, kind: str, order: int, box: Box, ports: tuple[list[Port], list[Port]], arriving: dict[int, int],
    leaving: dict[int, list[int]],
) -> dict[str, Any]:  # fmt: skip
    """The node that stands for a subgraph."""
    inputs, outputs = ports
    return {
        "id": fold.id,
        "type": kind,
        "pos": [box.x, box.y],
        "size": [box.width, box.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [
            {
                "name": port.name,
                "type": port.kind,
                **({"widget": {"name": port.name}} if port.widget else {}),
                "link": arriving.get(slot),
            }
            for slot, port in enumerate(inputs)
        ],
        "outputs": [
            {"name": port.name, "type": port.kind, "links": leaving.get(slot) or None}
            for slot, port in enumerate(outputs)
        ],
        "title": fold.title,
        "properties": {},
        "widgets_values": [],
    }


def ui_subgraph(
    fold: Fold, kind: str, boxes: dict[int, Box], ports: tuple[list[Port], list[Port]], first_link: int, last_node: int
) -> dict[str, Any]:
    """The definition of a subgraph: its ends, its nodes and its links, numbered from `first_link`."""
    inputs, outputs = ports
    ends: list[list[Any]] = []
    for slot, port in enumerate(inputs):
        ends += [[INSIDE, slot, node, place, port.kind] for node, place in port.slots]
    for node in fold.nodes:
        for place, socket in enumerate(slots(node)):
            source = node.inputs.get(socket.name)
            if isinstance(source, Output) and source.node in fold.nodes:
                ends.append([source.node.id, source.slot, node, place, source.kind])
    ends += [
        [port.source.node.id, port.source.slot, None, slot, port.kind]
        for slot, port in enumerate(outputs)
        if port.source
    ]
    links = [
        {
            "id": first_link + number,
            "origin_id": origin,
            "origin_slot": slot,
            "target_id": OUTSIDE if target is None else target.id,
            "target_slot": place,
            "type": socket_type,
        }
        for number, (origin, slot, target, place, socket_type) in enumerate(ends)
    ]
    right = max(box.right for box in boxes.values())
    return {
        "id": kind,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": last_node,
            "lastLinkId": first_link + len(links) - 1,
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": fold.title,
        "inputNode": {"id": INSIDE, "bounding": [-END_WIDTH - 60, 40, END_WIDTH, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right + 60, 40, END_WIDTH, 40 + 20 * len(outputs)]},
        "inputs": [
            _ui_end(
                kind,
                "in",
                port,
                [link["id"] for link in links if (link["origin_id"], link["origin_slot"]) == (INSIDE, slot)],
            )
            for slot, port in enumerate(inputs)
        ],
        "outputs": [
            _ui_end(
                kind, "out", port, [k["id"] for k in links if (k["target_id"], k["target_slot"]) == (OUTSIDE, slot)]
            )
            for slot, port in enumerate(outputs)
        ],
        "widgets": [],
        "nodes": [_inner(node, order, boxes[node.id], links) for order, node in enumerate(fold.nodes)],
        "groups": [],
        "links": links,
        "extra": {},
    }


def _ui_end(kind: str, side: str, port: Port, numbers: list[int]) -> dict[str, Any]:
    name = str(uuid.uuid5(NAMESPACE, f"{kind}/{side}/{port.name}"))
    return {"id": name, "name": port.name, "type": port.kind, "linkIds": numbers, "pos": [0, 0]}


def _inner(node: Node, order: int, box: Box, links: list[dict[str, Any]]) -> dict[str, Any]:
    arriving = {link["target_slot"]: link["id"] for link in links if link["target_id"] == node.id}
    leaving: dict[int, list[int]] = {}
    for link in links:
        if link["origin_id"] == node.id:
            leaving.setdefault(link["origin_slot"], []).append(link["id"])
    return ui_node(node, order, box, arriving, leaving)
