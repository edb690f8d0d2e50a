"""A figure of an alignment: the words of the source above those of the target, with a line between aligned words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from torch import Tensor

from ...evaluation.drawing import INK, LINE, PAPER, from_pil, label_font
from .prompt_edit import PromptEdit
from .report import Group, Kind, groups, word_notes
from .words import Word

# all sizes in pixels; a node shows the figure at about half its size, so letters are large
WIDTH = 640
NARROWEST = 450  # the legend's width
MARGIN = 14
ROOM = WIDTH - 2 * MARGIN
GAP = 10  # between neighbouring boxes
PADDING = 9  # between a box and its word
WORD = 26  # height of a word's letters
NOTE = 17  # height of a note's letters
BOX = 58  # height of a word's box
JOIN = 46  # height of the lines between aligned words
STEP = 26  # between lines of text
COLOURS: dict[Kind, tuple[int, int, int]] = {
    "same": (120, 130, 145),
    "replaced": (26, 115, 232),
    "added": (24, 140, 70),
    "removed": (205, 60, 50),
}


@dataclass(frozen=True)
class Box:
    """A word with its number in the prompt, and `x` from the column's left edge, in pixels."""

    number: int
    text: str
    note: str
    width: int
    x: int = 0


@dataclass(frozen=True)
class Column:
    """The boxes of an aligned group of words, or the part of a long group that fits into a line."""

    group: Group
    source: tuple[Box, ...]
    target: tuple[Box, ...]

    @property
    def width(self) -> int:
        return max(row[-1].x + row[-1].width for row in (self.source, self.target) if row)

    def aligned(self) -> Iterator[tuple[Box, Box]]:
        """The boxes (source, target) of aligned words."""
        above = {box.number: box for box in self.source}
        below = {box.number: box for box in self.target}
        return ((above[i], below[j]) for i, j in self.group.aligned if i in above and j in below)


def alignment_figure(edit: PromptEdit) -> Tensor:
    """Draw the source's words above the target's, wrapped where the prompts are long: IMAGE [1, H, W, 3], W at most 640.

    A line joins a source word and the target word that receives its maps. Colours show which words are the same, replaced,
    added and removed. Small letters give weights, step ranges, and whether a word's region may change or stays.
    """
    from PIL import Image, ImageDraw

    columns = _columns(edit)
    lines = _wrapped(columns)
    widest = max((sum(c.width + GAP for c in line) - GAP for line in lines), default=0)
    page_width = max(min(WIDTH, widest + 2 * MARGIN), NARROWEST)
    height = MARGIN + len(lines) * (2 * BOX + JOIN + STEP) + NOTE + MARGIN
    page = Image.new("RGB", (page_width, height), PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for line in lines:
        x = MARGIN
        for column in line:
            _draw_column(draw, column, x, y)
            x += column.width + GAP
        y += 2 * BOX + JOIN
        if line is not lines[-1]:
            draw.line((MARGIN, y + STEP // 2, page_width - MARGIN, y + STEP // 2), fill=LINE)
        y += STEP
    _legend(draw, y)
    return from_pil(page)


# ------------------------------------------------------------------------------------------------------------ layout
def _columns(edit: PromptEdit) -> list[Column]:
    source = _boxes(edit.source_words, word_notes(edit, edit.source_words, source=True))
    target = _boxes(edit.target_words, word_notes(edit, edit.target_words, source=False))
    found = []
    for group in groups(edit):
        above_rows = _rows([source[i] for i in group.source])
        below_rows = _rows([target[j] for j in group.target])
        for above, below in zip_longest(above_rows, below_rows, fillvalue=()):
            width = Column(group, above, below).width
            found.append(Column(group, _centred(above, width), _centred(below, width)))
    return found


def _boxes(words: Sequence[Word], notes: Sequence[tuple[str, ...]]) -> list[Box]:
    return [
        _box(number, word.text, " ".join(note)) for number, (word, note) in enumerate(zip(words, notes, strict=True))
    ]


def _box(number: int, word: str, note: str) -> Box:
    font, small = label_font(WORD), label_font(NOTE)
    text = _shortened(_plain(word), font)
    return Box(number, text, note, round(max(font.getlength(text), small.getlength(note))) + 2 * PADDING)


def _rows(boxes: Sequence[Box]) -> list[tuple[Box, ...]]:
    """Boxes side by side, wrapped into rows at most `ROOM` wide."""
    rows: list[list[Box]] = []
    x = 0
    for box in boxes:
        if not rows or x + box.width > ROOM:
            rows.append([])
            x = 0
        rows[-1].append(replace(box, x=x))
        x += box.width + GAP
    return [tuple(row) for row in rows]


def _plain(word: str) -> str:
    """The word without accents, which the font lacks."""
    return "".join(char for char in unicodedata.normalize("NFKD", word) if not unicodedata.combining(char))


def _shortened(text: str, font: Any) -> str:
    if font.getlength(text) <= ROOM - 2 * PADDING:
        return text
    end = next(
        end for end in range(min(len(text), 80), -1, -1) if font.getlength(text[:end] + "...") <= ROOM - 2 * PADDING
    )
    return text[:end] + "..."


def _centred(row: tuple[Box, ...], width: int) -> tuple[Box, ...]:
    shift = (width - row[-1].x - row[-1].width) // 2 if row else 0
    return tuple(replace(box, x=box.x + shift) for box in row)


def _wrapped(columns: Sequence[Column]) -> list[list[Column]]:
    lines: list[list[Column]] = []
    used = 0
    for column in columns:
        if not lines or used + column.width > ROOM:
            lines.append([])
            used = 0
        lines[-1].append(column)
        used += column.width + GAP
    return lines


# ----------------------------------------------------------------------------------------------------------- drawing
def _draw_column(draw: Any, column: Column, x: int, y: int) -> None:
    colour = COLOURS[column.group.kind]
    top, bottom = y + BOX, y + BOX + JOIN
    for above, below in column.aligned():
        ends = (x + above.x + above.width // 2, top, x + below.x + below.width // 2, bottom)
        draw.line(ends, fill=colour, width=3)
    for row, edge in ((column.source, y), (column.target, bottom)):
        for box in row:
            _draw_box(draw, box, x, edge, colour)


def _draw_box(draw: Any, box: Box, x: int, y: int, colour: tuple[int, int, int]) -> None:
    left, right = x + box.x, x + box.x + box.width
    tint = tuple(round(255 - (255 - part) * 0.14) for part in colour)
    draw.rounded_rectangle((left, y, right, y + BOX), radius=8, fill=tint, outline=colour, width=2)
    middle = (left + right) / 2
    draw.text((middle, y + (20 if box.note else BOX // 2)), box.text, fill=INK, font=label_font(WORD), anchor="mm")
    if box.note:
        draw.text((middle, y + BOX - 14), box.note, fill=colour, font=label_font(NOTE), anchor="mm")


def _legend(draw: Any, y: int) -> None:
    font, x = label_font(NOTE), float(MARGIN)
    draw.text((x, y), "source over target:", fill=INK, font=font)
    x += font.getlength("source over target:") + GAP
    for kind, colour in COLOURS.items():
        draw.text((x, y), kind, fill=colour, font=font)
        x += font.getlength(kind) + GAP
