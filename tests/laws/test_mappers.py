"""Mappers against their published vectors (T8, T9) and laws: rows that sum to 1, identity, one source per token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.attention.prompts.align import MODES, align_prompts
from editkit.pipelines.attention.prompts.mappers import MOST_ITEMS, aligned, layout
from editkit.pipelines.core.errors import FamilyError, ParameterError
from editkit.pipelines.core.protocols import Token
from editkit.tests.toy_prompts import PieceTokenizer, ToyTextEncoder

LILY = {"tigerlily": ("tiger", "li", "ly")}
IDS = st.lists(st.integers(0, 4), max_size=9)
LINES = st.lists(st.sampled_from(["a", "cat", "dog", "tigerlily", ",", "on", "!", "Cat"]), max_size=12).map(" ".join)
QUICK = settings(max_examples=60, deadline=None)


def encoder(**kwargs) -> ToyTextEncoder:
    return ToyTextEncoder(PieceTokenizer(LILY, **kwargs))


def ones(mapper: torch.Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in (mapper == 1).nonzero()}


# ------------------------------------------------------------------------------------------------------------ vectors
@pytest.mark.parametrize("mode", ["replace", "auto"])
def test_t8_replace(mode):
    texts = "a cat on mat", "a tigerlily on mat"
    mapper = align_prompts(encoder(), *texts, mode=mode).mapper
    expected = torch.zeros(77, 77)
    expected[0, 0] = expected[1, 1] = 1
    expected[2, 2:5] = 1 / 3
    expected[[3, 4, 5], [5, 6, 7]] = 1  # on, mat, end
    expected[torch.arange(6, 75), torch.arange(8, 77)] = 1
    expected[75:, 76] = 1  # padding that there is no room for
    torch.testing.assert_close(mapper, expected)

    published = align_prompts(encoder(), *texts, mode=mode, legacy_tail=True).mapper
    expected = torch.eye(77)
    expected[2:5] = 0
    expected[2, 2:5] = 1 / 3
    torch.testing.assert_close(published, expected)
    assert not published[3:5].any() and published[5, 5] == published[6, 6] == 1


def test_t8_turned_round():
    """Three tokens become one: it gets all their attention. As published, the tail is then served twice."""
    texts = "a tigerlily on mat", "a cat on mat"
    mapper = align_prompts(encoder(), *texts, mode="replace").mapper
    assert ones(mapper) == {
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 2),
        (5, 3),
        (6, 4),
        (7, 5),
        *((i, i - 2) for i in range(8, 77)),
    }
    published = align_prompts(encoder(), *texts, mode="replace", legacy_tail=True).mapper
    assert ones(published) == {(0, 0), (1, 1), (2, 2), (3, 2), (4, 2), *((j, j) for j in range(3, 75))}


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ([0, 1, 2, 9], [0, 1, 7, 2, 9], [0, 1, -1, 2, 3]),
        ([0, 1, 2, 3, 9], [0, 1, 5, 3, 9], [0, 1, -1, 3, 4]),
        ([5], [5, 5], [0, -1]),  # what comes twice is matched as early as can be
        ([5, 5], [5], [0]),
        ([1, 2], [2, 1], [1, -1]),
        ([], [3], [-1]),
    ],
)
def test_t9_alignment(source, target, found):
    assert aligned(source, target) == found


@pytest.mark.parametrize(
    ("texts", "found", "alphas"),
    [
        (("a cat", "a red cat"), [0, 1, -1, 2, 3], [1, 1, 0, 1, 1]),
        (("a cat on", "a dog on"), [0, 1, -1, 3, 4], [1, 1, 0, 1, 1]),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_t9_refine(texts, found, alphas, legacy):
    """A swapped word is new: only replace hands it the old one's place. Padding keeps its own place."""
    edit = align_prompts(encoder(), *texts, mode="refine", legacy_tail=legacy)
    expected = torch.zeros(77, 77)
    for column, row in enumerate([*found, *range(5, 77)]):
        if row >= 0:
            expected[row, column] = 1
    assert torch.equal(edit.mapper, expected)
    assert edit.alphas.tolist() == alphas + [1] * 72


def test_refine_of_a_shorter_target_serves_no_map_twice():
    """At the place of the target's first padding the source still has its end token; published, that counts twice."""
    texts = "a big cat", "a cat"
    edit, published = (align_prompts(encoder(), *texts, mode="refine", legacy_tail=tail) for tail in (False, True))
    assert ones(edit.mapper) == {(0, 0), (1, 1), (3, 2), (4, 3), *((i, i) for i in range(5, 77))}
    assert ones(published.mapper) - ones(edit.mapper) == {(4, 4)}
    assert published.mapper.sum(dim=1).max() == 2


# --------------------------------------------------------------------------------------------------------------- laws
def common_length(a, b) -> int:
    """Length of the longest common subsequence, by its textbook recursion."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def needleman_wunsch(source: list[int], target: list[int]) -> list[int]:
    """The published table, entry by entry (gap 0, match 1, mismatch -1)."""
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if a == b else -1))
    i, j, found = len(source), len(target), [-1] * len(target)
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found


@given(IDS, IDS)
@settings(max_examples=300, deadline=None)
def test_alignment_equals_the_published_table(source, target):
    assert aligned(source, target) == needleman_wunsch(source, target)


def test_thousands_of_words_are_aligned_and_more_are_refused_by_name():
    words = [number * number % 997 for number in range(3000)]
    assert aligned(words, [-1, *words]) == [-1, *range(3000)]
    long = list(range(MOST_ITEMS + 1))
    assert aligned(long, [*long, 5])[:-1] == long
    with pytest.raises(ParameterError, match=r"source_text and target_text differ in 12001 and 12002 words or tokens"):
        aligned(long, [-1, *long])


@QUICK
@given(IDS, IDS)
def test_alignment_is_the_longest_common_part_in_order(source, target):
    found = aligned(source, target)
    pairs = [(i, j) for j, i in enumerate(found) if i >= 0]
    assert all(source[i] == target[j] for i, j in pairs)
    assert [i for i, _ in pairs] == sorted({i for i, _ in pairs})
    assert len(pairs) == common_length(source, target)
    begun = aligned([-5, *source, -6], [-5, *target, -6])  # begin and end tokens change nothing
    assert begun == [0, *(i + 1 if i >= 0 else -1 for i in found), len(source) + 1]


@QUICK
@given(LINES, LINES, st.sampled_from(["auto", "replace"]), st.integers(6, 12))
def test_replaced_attention_is_neither_lost_nor_made(source, target, mode, length):
    """Any window length, so that prompts of several windows are met too."""
    try:
        edit = align_prompts(encoder(length=length), source, target, mode=mode)
    except ParameterError as error:
        assert "the same number" in str(error)
        return
    torch.testing.assert_close(edit.mapper.sum(dim=1), torch.ones(edit.token_count))
    assert (edit.mapper >= 0).all() and set(edit.alphas.tolist()) <= {0.0, 1.0}
    assert not edit.mapper[:, edit.alphas == 0].any()
    for side in (edit.source, edit.target):
        assert side.tokens.shape[:2] == (1, edit.token_count)


@QUICK
@given(LINES, LINES, st.integers(6, 12))
def test_refine_gives_each_token_one_source_or_its_own(source, target, length):
    toy = encoder(length=length)
    edit = align_prompts(toy, source, target, mode="refine")
    assert set(edit.mapper.unique().tolist()) <= {0.0, 1.0}
    columns, rows = edit.mapper.sum(dim=0), edit.mapper.sum(dim=1)
    assert columns.max() <= 1 and rows.max() <= 1
    content = [place for place, token in enumerate(toy.tokens(target)) if token.start >= 0]
    assert torch.equal(columns[content], edit.alphas[content])
    ids = edit.source.tokens[0, :, 0], edit.target.tokens[0, :, 0]
    assert all(ids[0][i] == ids[1][j] for i, j in ones(edit.mapper))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("text", ["", "a cat", "a cat, a cat and a tigerlily!", "a " * 74])
def test_identical_prompts_are_left_alone(mode, legacy, text):
    edit = align_prompts(encoder(), text, text, mode=mode, legacy_tail=legacy)
    assert torch.equal(edit.mapper, torch.eye(77))
    assert edit.alphas.min() == edit.equalizer.min() == 1 and not edit.step_ranges


@QUICK
@given(LINES)
def test_identical_prompts_of_several_windows_are_left_alone(text):
    for mode in MODES:
        edit = align_prompts(encoder(length=5), text, text, mode=mode)
        assert torch.equal(edit.mapper, torch.eye(edit.token_count))
        assert edit.alphas.all() and torch.equal(edit.source.tokens, edit.target.tokens)


# ------------------------------------------------------------------------------------------------------------ windows
def test_words_are_followed_from_one_window_to_another():
    """Three words in front push the rest into the second window; the source is continued by an empty one."""
    edit = align_prompts(encoder(length=6), "cat on mat here", "a big red cat on mat here")
    # Windows of 4 words: source [b cat on mat here e] [b e e e e e]; target [b a big red cat e] [b on mat here e e].
    assert edit.token_count == 12
    assert ones(edit.mapper) >= {(0, 0), (1, 4), (2, 7), (3, 8), (4, 9), (5, 5), (6, 6), (7, 10), (8, 11)}
    assert edit.alphas.tolist() == [1, 0, 0, 0] + [1] * 8
    assert torch.equal(edit.source.tokens[:, 6:], encoder(length=6).encode("").tokens)
    assert edit.source.text == "cat on mat here"


def test_the_published_tail_has_one_window():
    with pytest.raises(ParameterError, match="legacy_tail is on but a prompt has 2 windows"):
        align_prompts(encoder(), "a " * 80, "a " * 80, mode="replace", legacy_tail=True)


def test_other_orders_of_tokens_are_refused():
    word, special = Token(7, 0, 1), Token(1, -1, -1)
    for tokens in ([word, special], [special, word], [], [special, word, Token(2, -1, -1), word]):
        with pytest.raises(FamilyError, match="clip has no"):
            layout(tokens)
