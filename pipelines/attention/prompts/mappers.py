"""Which source tokens' attention serves which target tokens (Hertz et al. 2022; methods.md, 7.1 and 7.2).

A mapper M is [T, T], source tokens down, target tokens across: target token n gets the source map A M[:, n].
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import FamilyError, ParameterError
from ...core.protocols import Token


class Window(NamedTuple):
    """Places of the special tokens of one window of a padded prompt."""

    begin: int
    end: int
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a padded prompt has its words and its special tokens.

    Attributes:
        ids: of every token.    content: places of those that are no special tokens.    windows: the others' places.
    """

    ids: tuple[int, ...]
    content: tuple[int, ...]
    windows: tuple[Window, ...]

    @property
    def padding(self) -> frozenset[int]:
        return frozenset(place for window in self.windows for place in window.padding)


class Span(NamedTuple):
    """Source tokens and the target tokens that answer them; one side empty = removed or added."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def layout(tokens: Sequence[Token]) -> Layout:
    """Read the windows of a padded prompt: each has a begin token, words, an end token and padding.

    Raises: FamilyError for any other order.
    """
    special = [place for place, token in enumerate(tokens) if token.start < 0]
    begins = [place for place in special if tokens[place].id == tokens[0].id]
    if begins[:1] != [0]:
        raise FamilyError("clip has no begin token: prompts can be aligned on CLIP's tokens alone")
    windows = []
    for begin, after in zip(begins, [*begins[1:], len(tokens)], strict=True):
        tail = [place for place in special if begin < place < after]
        if not tail or tail != list(range(tail[0], after)):
            raise FamilyError("clip has no end token after the words: prompts can be aligned on CLIP's tokens alone")
        windows.append(Window(begin, tail[0], tuple(tail[1:])))
    content = [place for place, token in enumerate(tokens) if token.start >= 0]
    return Layout(tuple(token.id for token in tokens), tuple(content), tuple(windows))


# --------------------------------------------------------------------------------------------------------- sequences
def aligned(source: Sequence[Hashable], target: Sequence[Hashable]) -> list[int]:
    """Needleman-Wunsch: for each item of the target the index of its equal in the source, or -1.

    Gap 0, match 1, mismatch -1; of equally good steps, from the end, a gap in the source is taken first, then a gap in the
    target, then the pair: what is there several times is matched as early as can be. Two gaps cost less than a mismatch,
    so that only equals are paired.
    """
    rows, columns = len(source), len(target)
    score = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            pair = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], pair)
    found, i, j = [-1] * columns, rows, columns
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found


# ----------------------------------------------------------------------------------------------------------- mappers
def refine_mapper(source: Layout, target: Layout, *, legacy_tail: bool = False) -> tuple[Tensor, Tensor]:
    """Refine: tokens that both prompts have keep their map, new ones have their own (methods.md, 7.2).

    A padding token is served by the token at its own place. Where the source is the longer prompt that is a word or the end
    token, whose map is then used twice; here such padding gets nothing, unless `legacy_tail` asks for it as published.
    Returns: mapper [T, T] and gate [T], both float32.
    """
    mapper, gate = _blank(source)
    pairs = aligned([source.ids[i] for i in source.content], [target.ids[i] for i in target.content])
    for place, partner in zip(target.content, pairs, strict=True):
        if partner < 0:
            gate[place] = 0
        else:
            mapper[source.content[partner], place] = 1
    padding = source.padding
    for window, other in zip(target.windows, source.windows, strict=True):
        mapper[other.begin, window.begin] = mapper[other.end, window.end] = 1
        for place in window.padding:
            mapper[place, place] = float(legacy_tail or place in padding)
    return mapper, gate


def span_mapper(spans: Sequence[Span], source: Layout, target: Layout) -> tuple[Tensor, Tensor]:
    """Replace, span by span (methods.md, 7.1): every row sums to 1, so that no attention is lost and none made.

    Tokens of spans of equal length serve each other one to one; otherwise every source token gives each target token an
    equal part. Added tokens have their own map. The attention of removed ones, of which the publication says nothing, goes
    to the begin token of their window, where a model looks when no word applies. End and padding tokens follow each other;
    what is left of the source's padding joins the target's last.
    Returns: mapper [T, T] and gate [T], both float32.
    """
    mapper, gate = _blank(source)
    for span in spans:
        _write(mapper, gate, span)
        if not span.target:
            for place in span.source:
                mapper[place, _begin(source, place)] = 1
    for window, other in zip(source.windows, target.windows, strict=True):
        mapper[window.begin, other.begin] = mapper[window.end, other.end] = 1
        room = other.padding or (other.end,)
        for number, place in enumerate(window.padding):
            mapper[place, room[min(number, len(room) - 1)]] = 1
    return mapper, gate


def published_mapper(spans: Sequence[Span], source: Layout, target: Layout) -> tuple[Tensor, Tensor]:
    """`span_mapper` with the official code's tail: after the last change target token j is served by source token j.

    Where the changes alter the number of tokens, the words behind them so get the maps of other words (methods.md, 7.1, Bug).
    Raises: ParameterError for prompts of several windows, which the official code does not have.
    """
    if len(source.windows) > 1:
        raise ParameterError(
            f"legacy_tail is on but a prompt has {len(source.windows)} windows of tokens: shorten it or turn it off"
        )
    mapper, gate = _blank(source)
    count, i, j = len(source.ids), 0, 0
    for span in spans:
        if _same(span, source, target):
            continue
        while (i < span.source[0]) if span.source else (j < span.target[0]):
            mapper[i, j] = 1
            i, j = i + 1, j + 1
        _write(mapper, gate, span)
        i, j = i + len(span.source), j + len(span.target)
    for column in range(j, count - max(i - j, 0)):
        mapper[column, column] = 1
    return mapper, gate


def _blank(source: Layout) -> tuple[Tensor, Tensor]:
    count = len(source.ids)
    return torch.zeros(count, count), torch.ones(count)


def _write(mapper: Tensor, gate: Tensor, span: Span) -> None:
    if not span.source:
        gate[list(span.target)] = 0
    elif len(span.source) == len(span.target):
        mapper[list(span.source), list(span.target)] = 1
    else:
        for place in span.target:
            mapper[list(span.source), place] = 1 / len(span.target)


def _same(span: Span, source: Layout, target: Layout) -> bool:
    return [source.ids[i] for i in span.source] == [target.ids[i] for i in span.target]


def _begin(source: Layout, place: int) -> int:
    return max(window.begin for window in source.windows if window.begin <= place)


# ------------------------------------------------------------------------------------------------------------- spans
class Item(NamedTuple):
    """A word, or a token of punctuation between words: what prompts are compared by, and its tokens."""

    key: Hashable
    tokens: tuple[int, ...]
    word: bool


def changed_spans(source: Sequence[Item], target: Sequence[Item]) -> list[Span]:
    """Spans chosen one by one: items that both have are matched, and what lies between two matches is substituted.

    As many words as before replace each other in order; another number of words, as one long word. Words against nothing
    are added or removed.
    """
    pairs = aligned([item.key for item in source], [item.key for item in target])
    spans: list[Span] = []
    i = j = 0
    for index, partner in [*((n, p) for n, p in enumerate(pairs) if p >= 0), (len(target), len(source))]:
        spans += _substituted(source[i:partner], target[j:index])
        if index < len(target):
            spans.append(Span(source[partner].tokens, target[index].tokens))
        i, j = partner + 1, index + 1
    return spans


def _substituted(source: Sequence[Item], target: Sequence[Item]) -> Iterator[Span]:
    counts = [sum(item.word for item in items) for items in (source, target)]
    if counts[0] == counts[1]:
        yield from replaced_spans(source, target)
        return
    if all(counts):
        yield Span(
            *(tuple(place for item in items if item.word for place in item.tokens) for items in (source, target))
        )
        source, target = ([item for item in items if not item.word] for items in (source, target))
    yield from (Span(item.tokens, ()) for item in source)
    yield from (Span((), item.tokens) for item in target)


def replaced_spans(source: Sequence[Item], target: Sequence[Item]) -> list[Span]:
    """Spans of two texts of equally many words: word for word, and the punctuation between them."""
    spans: list[Span] = []
    for (before, word), (other, partner) in zip(_by_word(source), _by_word(target), strict=True):
        spans += _punctuation(before, other)
        if word is not None and partner is not None:
            spans.append(Span(word.tokens, partner.tokens))
    return spans


def _by_word(items: Sequence[Item]) -> Iterator[tuple[list[Item], Item | None]]:
    """Each word with the punctuation before it; last, None with the punctuation at the end."""
    before: list[Item] = []
    for item in items:
        if item.word:
            yield before, item
            before = []
        else:
            before.append(item)
    yield before, None


def _punctuation(source: Sequence[Item], target: Sequence[Item]) -> Iterator[Span]:
    pairs = aligned([item.key for item in source], [item.key for item in target])
    for index, item in enumerate(source):
        if index not in pairs:
            yield Span(item.tokens, ())
    for item, partner in zip(target, pairs, strict=True):
        yield Span(source[partner].tokens if partner >= 0 else (), item.tokens)
