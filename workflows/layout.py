"""Where the page draws a workflow: groups from left to right in rows, columns in a group, nodes stacked in a column.

Lengths are the canvas's own units, pixels at zoom 1. A node's box is its body; its title bar lies above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .elements import Group, Node, Socket

TITLE = 30  # height of a node's title bar
SLOT = 20
WIDGET = 24
PADDING = 14
GAP_X = 50
GAP_Y = 24
MARGIN = 24
GROUP_TITLE = 44
WIDTH, NOTE_WIDTH = 350, 420
NOTE_LINE, NOTE_CHARACTERS = 18, 56
TEXT_BOX = 76  # a multiline text
IMAGE_NODE = 230  # what the page adds to a node that shows an image
VIEW_WIDTH = 1780
VIEW_HEIGHT = 880
VIEW_LEFT = 60
VIEW_TOP = 80
SMALLEST_SCALE = 0.61  # below 0.6 the page draws no text

SHOWS_IMAGE = {
    "EditKit_LoadExample",
    "EditKit_DilationSchedule",
    "EditKit_ReleaseSchedule",
    "EditKit_RankByText",
    "EditKit_TuneDecoder",
    "EditKit_TuneLatent",
    "EditKit_BlendPoisson",
    "EditKit_BlendPixels",
    "EditKit_CompositeSource",
    "EditKit_DiffEditMask",
    "EditKit_DiffEdit",
    "EditKit_InvertDDIM",
    "EditKit_NullText",
    "MaskPreview",
    "PreviewImage",
    "SaveImage",
}
SHOWS_TEXT = {"PreviewAny"}
# The page widens a node to its longest socket names; these need more than `WIDTH`.
WIDTHS = {
    "CLIPTextEncode": 370,
    "EditKit_RankByText": 370,
    "PreviewAny": 370,
    "EditKit_StyleEdit": 390,
    "EditKit_LayeredEmbeddings": 430,
    "EditKit_LayeredTune": 430,
}


@dataclass(frozen=True)
class Box:
    """A rectangle: its upper left corner and its size."""

    x: int
    y: int
    width: int
    height: int

    @property
    def values(self) -> list[int]:
        return [self.x, self.y, self.width, self.height]

    @property
    def right(self) -> int:
        return self.x + self.width

    @property
    def bottom(self) -> int:
        return self.y + self.height


@dataclass(frozen=True)
class Placement:
    """Boxes of the nodes by id, of the groups in order, and of the note."""

    nodes: dict[int, Box]
    groups: list[Box]
    note: Box

    @property
    def view(self) -> dict[str, object]:
        """Zoom and offset that show everything, or the upper left part where all of it would be too small to read."""
        width = max(box.right for box in self.groups) - self.note.x
        height = max(box.bottom for box in (*self.groups, self.note))
        scale = round(min(1.0, max(SMALLEST_SCALE, min(VIEW_WIDTH / width, VIEW_HEIGHT / height))), 2)
        return {"scale": scale, "offset": [round(VIEW_LEFT / scale) - self.note.x, round(VIEW_TOP / scale)]}


def node_size(node: Node) -> tuple[int, int]:
    """Width and height of a node's body, with room for what it shows after a run."""
    sockets = node.sockets
    rows = max(sum(not socket.is_widget for socket in sockets), len(node.info["output"]))
    height = rows * SLOT + PADDING + sum(_widget_height(socket) for socket in sockets if socket.is_widget)
    height += IMAGE_NODE * (node.type in SHOWS_IMAGE) + TEXT_BOX * (node.type in SHOWS_TEXT)
    return WIDTHS.get(node.type, WIDTH), height


def _widget_height(socket: Socket) -> int:
    if socket.options.get("multiline"):
        return TEXT_BOX
    return WIDGET * (2 if socket.has_control else 1)


def place(rows: Sequence[Sequence[Group]], note: str) -> Placement:
    """Lay everything out; nothing overlaps."""
    nodes: dict[int, Box] = {}
    groups: list[Box] = []
    top = 0
    for row in rows:
        boxes: list[Box] = []
        for group in row:
            boxes.append(_place_group(group, boxes[-1].right + GAP_X if boxes else 0, top, nodes))
        tallest = max(box.height for box in boxes)
        groups += [Box(box.x, box.y, box.width, tallest) for box in boxes]
        top += tallest + GAP_X
    return Placement(nodes, groups, _note_box(note))


def _place_group(group: Group, left: int, top: int, nodes: dict[int, Box]) -> Box:
    x, bottom = left + MARGIN, top
    for column in group.columns:
        y = top + GROUP_TITLE
        sizes = [node_size(node) for node in column]
        for node, (width, height) in zip(column, sizes, strict=True):
            nodes[node.id] = Box(x, y + TITLE, width, height)
            y += TITLE + height + GAP_Y
        bottom = max(bottom, y - GAP_Y + MARGIN)
        x += max(width for width, _ in sizes) + GAP_X
    return Box(left, top, x - GAP_X + MARGIN - left, bottom - top)


def _note_box(text: str) -> Box:
    lines = sum(-(-len(line) // NOTE_CHARACTERS) or 1 for line in text.splitlines())
    return Box(-NOTE_WIDTH - GAP_X, TITLE, NOTE_WIDTH, lines * NOTE_LINE + 60)
