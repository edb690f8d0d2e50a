"""Mappers: which source tokens' maps each target token receives (Hertz et al. 2022; docs/methods.md, sections 7.1, 7.2).

A mapper M is [T, T], source tokens down, target tokens across: target token n receives the map A_source M[:, n]. Alphas [T]
are 1 where a token receives source maps and 0 where it keeps its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.errors import FamilyError, ParameterError
from ...core.protocols import Token

MOST_ITEMS = 12000  # of a prompt after the common beginning; the table of scores then takes 290 MB


class Window(NamedTuple):
    """The special tokens of one window of a padded prompt (77 tokens in CLIP)."""

    begin: int
    end: int
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The places of words and special tokens in a padded prompt.

    Attributes:
        ids: of every token.
        content: places of the tokens of the text.
        windows: places of the special tokens.
    """

    ids: tuple[int, ...]
    content: tuple[int, ...]
    windows: tuple[Window, ...]

    @property
    def padding(self) -> frozenset[int]:
        return frozenset(place for window in self.windows for place in window.padding)


class Span(NamedTuple):
    """Aligned source and target tokens; one side is empty if they were removed or added."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def layout(tokens: Sequence[Token]) -> Layout:
    """Read the windows of a padded prompt: each has a begin token, words, an end token and padding.

    Raises: FamilyError for any other order.
    """
    special = [place for place, token in enumerate(tokens) if token.start < 0]
    begins = [place for place in special if tokens[place].id == tokens[0].id]
    if begins[:1] != [0]:
        raise FamilyError("clip has no begin token: only prompts in CLIP's tokens can be aligned")
    windows = []
    for begin, after in zip(begins, [*begins[1:], len(tokens)], strict=True):
        tail = [place for place in special if begin < place < after]
        if not tail or tail != list(range(tail[0], after)):
            raise FamilyError("clip has no end token after the words: only prompts in CLIP's tokens can be aligned")
        windows.append(Window(begin, tail[0], tuple(tail[1:])))
    content = [place for place, token in enumerate(tokens) if token.start >= 0]
    return Layout(tuple(token.id for token in tokens), tuple(content), tuple(windows))


# --------------------------------------------------------------------------------------------------------- sequences
def aligned(source: Sequence[Hashable], target: Sequence[Hashable]) -> list[int]:
    """Needleman-Wunsch: for each item of the target the index of the equal item in the source, or -1.

    Gap 0, match 1, mismatch -1. The traceback prefers a gap in the source, then a gap in the target, then the pair, so
    repeated items are aligned as early as possible. Two gaps cost less than a mismatch, so only equal items are aligned.

    The common beginning is aligned item by item, which is what the traceback would do.
    Raises: ParameterError where more than MOST_ITEMS are left of either sequence.
    """
    begin = next((i for i, (a, b) in enumerate(zip(source, target, strict=False)) if a != b), None)
    if begin is None:
        begin = min(len(source), len(target))
    rest = source[begin:], target[begin:]
    if max(map(len, rest)) > MOST_ITEMS:
        raise ParameterError(
            f"source_text and target_text differ in {len(rest[0])} and {len(rest[1])} words or tokens after their common "
            f"beginning: at most {MOST_ITEMS} can be aligned, so shorten them"
        )
    later = [place if place < 0 else place + begin for place in _traced(_scores(*rest))]
    return [*range(begin), *later]


def _scores(source: Sequence[Hashable], target: Sequence[Hashable]) -> np.ndarray:
    """The best score of every two beginnings, [len(source) + 1, len(target) + 1].

    Gaps are free, so a row is the running maximum of what the row above and the pairs give.
    """
    numbers: dict[Hashable, int] = {}
    first, second = (
        np.array([numbers.setdefault(item, len(numbers)) for item in items], int) for items in (source, target)
    )
    score = np.zeros((len(first) + 1, len(second) + 1), np.int16)
    for i, item in enumerate(first):
        pairs = score[i, :-1] + (second == item)
        score[i + 1, 1:] = np.maximum.accumulate(np.maximum(score[i, 1:], pairs))
    return score


def _traced(score: np.ndarray) -> list[int]:
    """The alignment of the last column's best score; see `aligned`."""
    i, j = score.shape[0] - 1, score.shape[1] - 1
    found = [-1] * j
    while i > 0 and j > 0:
        if score[i, j] == score[i, j - 1]:
            j -= 1
        elif score[i, j] == score[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found


# ----------------------------------------------------------------------------------------------------------- mappers
def refine_mapper(source: Layout, target: Layout, *, legacy_tail: bool = False) -> tuple[Tensor, Tensor]:
    """Refine: A_n = a_n A_source,m(n) + (1 - a_n) A_target,n with m(n) the aligned source token (docs/methods.md, section 7.2).

    Tokens that both prompts have receive the source's map; new ones (a_n = 0) keep their own. A padding token receives the
    map of the source token at the same place. Deviation: where the source is longer, that is a word or the end token, whose
    map would be used twice; such padding receives nothing, unless `legacy_tail` asks for the published form.

    Returns: mapper [T, T] and alphas [T], both float32.
    """
    mapper, alphas = _blank(source)
    pairs = aligned([source.ids[i] for i in source.content], [target.ids[i] for i in target.content])
    for place, partner in zip(target.content, pairs, strict=True):
        if partner < 0:
            alphas[place] = 0
        else:
            mapper[source.content[partner], place] = 1
    padding = source.padding
    for window, other in zip(target.windows, source.windows, strict=True):
        mapper[other.begin, window.begin] = mapper[other.end, window.end] = 1
        for place in window.padding:
            mapper[place, place] = float(legacy_tail or place in padding)
    return mapper, alphas


def span_mapper(spans: Sequence[Span], source: Layout, target: Layout) -> tuple[Tensor, Tensor]:
    """Replace: A_n = sum over w of A_source,w M[w, n], span by span (docs/methods.md, section 7.1).

    Tokens of spans of equal length are mapped one to one; in other spans each source token is divided equally over
    the target tokens. Every row of M sums to 1, so the attention of a pixel still sums to 1. Added tokens keep their own map.
    Removed tokens, which the paper does not cover, map to the begin token of their window, which receives the attention that
    no word takes. End and padding tokens are mapped in order; surplus source padding maps to the target's last padding token.

    Returns: mapper [T, T] and alphas [T], both float32.
    """
    mapper, alphas = _blank(source)
    for span in spans:
        _write(mapper, alphas, span)
        if not span.target:
            for place in span.source:
                mapper[place, _begin(source, place)] = 1
    for window, other in zip(source.windows, target.windows, strict=True):
        mapper[window.begin, other.begin] = mapper[window.end, other.end] = 1
        room = other.padding or (other.end,)
        for number, place in enumerate(window.padding):
            mapper[place, room[min(number, len(room) - 1)]] = 1
    return mapper, alphas


def published_mapper(spans: Sequence[Span], source: Layout, target: Layout) -> tuple[Tensor, Tensor]:
    """`span_mapper` with the official code's tail: after the last change target token j receives the map of source token j.

    Where a change alters the number of tokens, later words then receive the maps of other words (docs/methods.md, section 7.1,
    Bug).
    Raises: ParameterError for prompts of several windows, which the official code does not support.
    """
    if len(source.windows) > 1:
        raise ParameterError(
            f"legacy_tail is on but a prompt has {len(source.windows)} windows of tokens: shorten it or turn it off"
        )
    mapper, alphas = _blank(source)
    count = len(source.ids)
    i = 0
    j = 0
    for span in spans:
        if _same(span, source, target):
            continue
        while (i < span.source[0]) if span.source else (j < span.target[0]):
            mapper[i, j] = 1
            i, j = i + 1, j + 1
        _write(mapper, alphas, span)
        i, j = i + len(span.source), j + len(span.target)
    for column in range(j, count - max(i - j, 0)):
        mapper[column, column] = 1
    return mapper, alphas


def _blank(source: Layout) -> tuple[Tensor, Tensor]:
    count = len(source.ids)
    return torch.zeros(count, count), torch.ones(count)


def _write(mapper: Tensor, alphas: Tensor, span: Span) -> None:
    if not span.source:
        alphas[list(span.target)] = 0
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
    """A word, or a token of punctuation between words, with the key by which prompts are compared."""

    key: Hashable
    tokens: tuple[int, ...]
    word: bool


def changed_spans(source: Sequence[Item], target: Sequence[Item]) -> list[Span]:
    """Mode auto: equal items are aligned, and the items between two of them are replaced, added or removed.

    The same number of words is replaced word for word, another number as one long word.
    """
    pairs = aligned([item.key for item in source], [item.key for item in target])
    spans: list[Span] = []
    i = j = 0
    for index, partner in [*((n, p) for n, p in enumerate(pairs) if p >= 0), (len(target), len(source))]:
        spans += _replaced_stretch(source[i:partner], target[j:index])
        if index < len(target):
            spans.append(Span(source[partner].tokens, target[index].tokens))
        i, j = partner + 1, index + 1
    return spans


def _replaced_stretch(source: Sequence[Item], target: Sequence[Item]) -> Iterator[Span]:
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
    """Spans of two texts with the same number of words: word for word, and the punctuation between them."""
    spans: list[Span] = []
    for (before, word), (other, partner) in zip(_by_word(source), _by_word(target), strict=True):
        spans += _punctuation(before, other)
        if word is not None and partner is not None:
            spans.append(Span(word.tokens, partner.tokens))
    return spans


def _by_word(items: Sequence[Item]) -> Iterator[tuple[list[Item], Item | None]]:
    """Each word with the punctuation before it; at the end None with the remaining punctuation."""
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
