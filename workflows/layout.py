"""Where the page draws a workflow: groups from left to right, nodes from top to bottom, so that every link runs right or down.

Nodes keep the order in which the workflow adds them, which is an order of dependence. A group fills as many columns as it needs;
a group of one column stands below another one where there is room. Lengths are the canvas's own units, pixels at zoom 1. A node's
box is its body; its title bar lies above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .elements import Fold, Group, Node, Output, Socket

TITLE = 30  # height of a node's title bar
SLOT = 20
WIDGET = 24
PADDING = 14
GAP_X = 40
GAP_Y = 20
MARGIN = 20
GROUP_TITLE = 44
WIDTH = 330
NOTE_LINE, NOTE_CHARACTERS = 15, 58
TEXT_BOX = 76  # a multiline text
IMAGE_NODE = 230  # what the page adds to a node that shows an image
MAPS = 40  # the words under the heat maps
RESULT_HEIGHT = 330  # the same for the results
TALLEST = range(690, 1321, 30)  # of a column; the height that shows the workflow largest is taken
VIEW_WIDTH, VIEW_HEIGHT = 1780, 880
VIEW_LEFT, VIEW_TOP = 24, 24
WANTED_SCALE = 0.65  # at which text is read
SMALLEST_SCALE = 0.61  # below 0.6 the page draws no text

SHOWS_IMAGE = {
    "EditKit_AlignPrompts",
    "EditKit_AttentionMaps",
    "EditKit_BlendPixels",
    "EditKit_BlendPoisson",
    "EditKit_CompositeSource",
    "EditKit_DiffEdit",
    "EditKit_DiffEditMask",
    "EditKit_DilationSchedule",
    "EditKit_Imagic",
    "EditKit_LayeredEmbeddings",
    "EditKit_LayeredTune",
    "EditKit_LoadExample",
    "EditKit_MeasureEdit",
    "EditKit_NullText",
    "EditKit_RankByText",
    "EditKit_ReleaseSchedule",
    "EditKit_StyleInvert",
    "EditKit_TuneDecoder",
    "EditKit_TuneLatent",
    "LoadImage",
    "MaskPreview",
    "PreviewImage",
}
SHOWS_TEXT = {"PreviewAny"}
# The page widens a node to its longest labels; these need more than `WIDTH`.
WIDTHS = {
    "CLIPTextEncode": 370,
    "EditKit_LayeredReference": 380,
    "EditKit_RankByText": 370,
    "PreviewAny": 370,
    "SaveImage": 380,
    "EditKit_StyleEdit": 390,
    "EditKit_LayeredEmbeddings": 430,
    "EditKit_LayeredTune": 430,
}


Sizes = Mapping[int, tuple[int, int]]  # of each node by its id, width and height


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
    def scale(self) -> float:
        """The zoom at which all of it fits the view."""
        boxes = (*self.groups, self.note)
        width = max(box.right for box in boxes) - min(box.x for box in boxes)
        return min(1.0, VIEW_WIDTH / width, VIEW_HEIGHT / max(box.bottom for box in boxes))

    @property
    def view(self) -> dict[str, object]:
        """Zoom and offset that show everything, or the upper left part where all of it would be too small to read."""
        scale = round(max(SMALLEST_SCALE, self.scale) - 0.005, 2)
        left = min(box.x for box in (*self.groups, self.note))
        return {"scale": scale, "offset": [round(VIEW_LEFT / scale) - left, round(VIEW_TOP / scale)]}


def node_size(node: Node) -> tuple[int, int]:
    """Width and height of a node's body, with room for what it shows after a run."""
    sockets = node.sockets
    rows = max(sum(not socket.is_widget for socket in sockets), len(node.info["output"]))
    height = rows * SLOT + PADDING + sum(_widget_height(socket) for socket in sockets if socket.is_widget)
    height += MAPS * (node.type == "EditKit_AttentionMaps")
    height += RESULT_HEIGHT if node.type == "SaveImage" else IMAGE_NODE * _shows_image(node)
    return WIDTHS.get(node.type, WIDTH), height + TEXT_BOX * (node.type in SHOWS_TEXT)


def _shows_image(node: Node) -> bool:
    if node.type == "EditKit_InvertDDIM":  # only what it can decode
        return isinstance(node.inputs.get("vae"), Output)
    return node.type in SHOWS_IMAGE


def _widget_height(socket: Socket) -> int:
    if socket.options.get("multiline"):
        return TEXT_BOX
    return WIDGET * (2 if socket.has_control else 1)


def fold_size(fold: Fold, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[int, int]:
    """Width and height of the node that stands for a subgraph with these ports; it shows an inner node's image."""
    widgets = [port.widget for port in inputs if port.widget]
    rows = max(len(inputs) - len(widgets), len(outputs))
    height = rows * SLOT + PADDING + sum(map(_widget_height, widgets))
    return WIDTH, height + IMAGE_NODE * any(_shows_image(node) for node in fold.nodes)


def place(groups: Sequence[Group], note: str, folds: Mapping[Fold, tuple[int, int]]) -> Placement:
    """Lay everything out; nothing overlaps. `folds` has the size of every node that stands for a subgraph."""
    sizes = {entry.id: size_of(entry, folds) for group in groups for entry in group.nodes}
    return max((_place(groups, note, sizes, tallest) for tallest in TALLEST), key=lambda placement: placement.scale)


def _place(groups: Sequence[Group], note: str, sizes: Sizes, tallest: int) -> Placement:
    nodes: dict[int, Box] = {}
    boxes: list[Box] = []
    for number, group in enumerate(groups):
        columns = _columns(group, sizes, tallest)
        left, top = (boxes[-1].right + GAP_X, 0) if boxes else (0, 0)
        if (
            number > 1
            and len(columns) == 1 == len(_columns(groups[number - 1], sizes, tallest))
            and _fits(boxes[-1], columns[0], sizes, tallest)
        ):
            left, top = boxes[-1].x, boxes[-1].bottom + GAP_X
        boxes.append(_place_group(columns, left, top, nodes, sizes))
    return Placement(nodes, boxes, _note_box(note, boxes))


def _note_box(note: str, groups: Sequence[Box]) -> Box:
    """Below the first group; where it would be taller than the view, below the group that leaves most room."""
    lowest = [box for box in groups if not any(other.x == box.x and other.y > box.y for other in groups)]
    for group in (groups[0], min(lowest, key=lambda box: box.bottom)):
        found = Box(group.x, group.bottom + GAP_X + TITLE, group.width, _note_height(note, group.width))
        if found.bottom <= VIEW_HEIGHT / WANTED_SCALE:
            break
    return found


def size_of(entry: Node | Fold, folds: Mapping[Fold, tuple[int, int]]) -> tuple[int, int]:
    return folds[entry] if isinstance(entry, Fold) else node_size(entry)


def _fits(above: Box, column: Sequence[Node | Fold], sizes: Sizes, tallest: int) -> bool:
    return above.bottom + GAP_X + GROUP_TITLE + _height(column, sizes) + MARGIN <= tallest


def _height(column: Sequence[Node | Fold], sizes: Sizes) -> int:
    return sum(TITLE + sizes[node.id][1] + GAP_Y for node in column) - GAP_Y


def _columns(group: Group, sizes: Sizes, tallest: int) -> list[list[Node | Fold]]:
    """The fewest columns that are no taller than `tallest`, and of these the most even."""
    limit = tallest - GROUP_TITLE - MARGIN
    fewest = _filled(group.nodes, limit, sizes)
    while len(even := _filled(group.nodes, limit - 10, sizes)) == len(fewest) and limit > 200:
        fewest, limit = even, limit - 10
    return fewest


def _filled(nodes: Sequence[Node | Fold], limit: int, sizes: Sizes) -> list[list[Node | Fold]]:
    columns: list[list[Node | Fold]] = [[]]
    for node in nodes:
        if columns[-1] and _height([*columns[-1], node], sizes) > limit:
            columns.append([])
        columns[-1].append(node)
    return columns


def _place_group(
    columns: Sequence[Sequence[Node | Fold]], left: int, top: int, nodes: dict[int, Box], sizes: Sizes
) -> Box:
    x, bottom = left + MARGIN, top
    for column in columns:
        y = top + GROUP_TITLE
        width = max(sizes[node.id][0] for node in column)
        for node in column:
            height = sizes[node.id][1]
            nodes[node.id] = Box(x, y + TITLE, width, height)
            y += TITLE + height + GAP_Y
        bottom = max(bottom, y - GAP_Y + MARGIN)
        x += width + GAP_X
    return Box(left, top, x - GAP_X + MARGIN - left, bottom - top)


def _note_height(text: str, width: int) -> int:
    characters = NOTE_CHARACTERS * width // 370
    return sum(-(-len(line) // characters) or 1 for line in text.splitlines()) * NOTE_LINE + 60
