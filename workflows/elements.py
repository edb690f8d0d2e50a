"""The elements of a workflow: nodes, inputs, outputs and groups, as the schemas describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .stock import Info

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = ("seed", "noise_seed")  # the page adds a control widget to these unless the schema says otherwise


@dataclass(frozen=True)
class Socket:
    """One input as a schema describes it. `kind` is its type; a combo's kind is COMBO and `options` its values."""

    name: str
    kind: str
    options: Mapping[str, Any]
    optional: bool

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput")

    @property
    def has_control(self) -> bool:
        """Whether the page puts a "control after generate" widget behind it."""
        return self.kind == "INT" and bool(self.options.get("control_after_generate", self.name in SEEDS))

    @property
    def default(self) -> Any:
        if "default" in self.options:
            return self.options["default"]
        return {"COMBO": self.options.get("options", [None])[0], "STRING": "", "BOOLEAN": False}.get(self.kind, 0)


def sockets(info: Info) -> list[Socket]:
    """A node's inputs in the page's order: the required ones, then the optional ones."""
    found = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # the old way to write a combo
                kind, options = "COMBO", {**options, "options": kind}
            found.append(Socket(name, kind, options, group == "optional"))
    return found


@dataclass(frozen=True)
class Output:
    """One output of a node, to be given to another's input."""

    node: Node
    slot: int

    @property
    def kind(self) -> str:
        return self.node.info["output"][self.slot]


@dataclass(eq=False)
class Node:
    """A node of the graph; `node["image"]` is its output of that name."""

    id: int
    type: str
    title: str
    info: Info
    inputs: dict[str, Any]
    properties: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Output:
        names = self.info["output_name"]
        if name not in names:
            raise KeyError(f"{self.type} has no output {name!r}: it has {', '.join(names)}")
        return Output(self, names.index(name))

    @property
    def out(self) -> Output:
        """Its first output."""
        return Output(self, 0)

    @property
    def sockets(self) -> list[Socket]:
        return sockets(self.info)

    def value(self, socket: Socket) -> Any:
        return self.inputs.get(socket.name, socket.default)


@dataclass(eq=False)
class Fold:
    """Nodes that the page shows as one node, a subgraph; they are opened by a double click.

    Attributes:
        id, title: of the node that stands for them.
        nodes: what is inside, in order of dependence.
        shown: widgets of inner nodes that the outer node shows: node, input, label.
    """

    id: int
    title: str
    nodes: list[Node] = field(default_factory=list)
    shown: list[tuple[Node, str, str]] = field(default_factory=list)

    def show(self, node: Node, name: str, label: str) -> None:
        self.shown.append((node, name, label))


@dataclass
class Group:
    """Nodes in one titled frame, in order of dependence."""

    title: str
    nodes: list[Node | Fold] = field(default_factory=list)
