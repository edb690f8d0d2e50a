"""Words: which are found, matched, replaced, added and removed, and what is said, drawn and asked of single ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.attention.prompts.align import MODES, align_prompts
from editkit.pipelines.attention.prompts.figure import COLOURS, WIDTH, alignment_figure
from editkit.pipelines.attention.prompts.report import groups
from editkit.pipelines.attention.prompts.widget_syntax import parse_weights, parse_windows, parse_words
from editkit.pipelines.attention.prompts.words import prompt_words
from editkit.pipelines.core.errors import EditError, FamilyError, ParameterError
from editkit.tests.toy_prompts import ToyTextEncoder

ENCODER = ToyTextEncoder()


def align(source: str, target: str, **kwargs):
    return align_prompts(ENCODER, source, target, **kwargs)


# -------------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('A red dog, on "grass".', ["A", "red", "dog", "on", "grass"]),
        ("red-haired dog's 85mm lens", ["red-haired", "dog's", "85mm", "lens"]),
        ("Don’t - well-", ["Don’t", "well"]),
        ("naïve café, 東京🙂 c++ 3.5", ["naïve", "café", "東京", "🙂", "c", "3", "5"]),
        ("cafe\u0301 tigerlily", ["cafe\u0301", "tigerlily"]),
        (" \n,;", []),
    ],
)
def test_words_of_a_prompt(text, words):
    tokens = ENCODER.tokens(text)
    found = prompt_words(text, tokens)
    assert [word.text for word in found] == words
    for word in found:
        covered = [text[tokens[place].start : tokens[place].end] for place in word.tokens]
        assert all(piece in word.text for piece in covered)
        assert list(word.tokens) == sorted(word.tokens)


def test_case_and_kinds_of_letters_do_not_matter_and_repeated_words_are_numbered():
    found = prompt_words("Cat’s cat CAT's", ENCODER.tokens("Cat’s cat CAT's"))
    assert [word.name for word in found] == ["cat's", "cat", "cat's"]
    assert [word.label for word in found] == ["Cat’s#1", "cat", "CAT's#2"]


# ---------------------------------------------------------------------------------------------------------- alignment
@pytest.mark.parametrize(
    ("source", "target", "report"),
    [
        ("a red circle", "a green circle", ["same: a", "replaced: red -> green", "same: circle"]),
        ("a dog, running", "A dog running!", ["same: A dog running"]),
        ("a cat sits", "a small white dog sits", ["same: a", "replaced: cat -> small white dog", "same: sits"]),
        ("a big red dog", "a dog", ["same: a", "removed: big red", "same: dog"]),
        ("a dog", "a dog in the snow", ["same: a dog", "added: in the snow"]),
        (
            "a cat and a dog",
            "a dog and a cat",
            ["same: a", "replaced: cat -> dog", "same: and a", "replaced: dog -> cat"],
        ),
        ("red cat, blue cat", "red cat, blue dog", ["same: red cat blue", "replaced: cat -> dog"]),
        ("", "a dog", ["added: a dog"]),
    ],
)
def test_auto_says_what_became_of_each_word(source, target, report):
    assert list(align(source, target).report) == report


def test_refine_and_replace_say_what_they_do():
    texts = "a cat sits", "a dog sits"
    assert align(*texts, mode="refine").report == ("same: a", "removed: cat", "added: dog", "same: sits")
    assert align(*texts, mode="replace").report == ("same: a", "replaced: cat -> dog", "same: sits")
    with pytest.raises(ParameterError, match="source_text has 3 words and target_text 2"):
        align("a cat sits", "a cat", mode="replace")


def test_punctuation_moves_no_word():
    """The comma of one prompt has its own map in the other, and its attention has a place to go."""
    edit = align("a dog on grass", "a dog, on grass")
    assert edit.alphas[:8].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert [int(edit.mapper[:, n].argmax()) for n in (1, 2, 4, 5, 6)] == [1, 2, 3, 4, 5]
    edit = align("a dog, on grass", "a cat on grass", mode="replace")
    assert edit.alphas.all() and edit.mapper[3, 0] == 1  # the comma's, at the begin token
    assert [int(edit.mapper[:, n].argmax()) for n in range(6)] == [0, 1, 2, 4, 5, 6]


def test_removed_words_leave_their_attention_at_the_begin_token():
    edit = align("a big red dog", "a dog")
    assert edit.mapper[:6, 0].tolist() == [1, 0, 1, 1, 0, 0]


def test_words_of_several_tokens():
    edit = align("a dog", "a tigerlily")
    (word,) = [word for word in edit.target_words if word.name == "tigerlily"]
    assert word.tokens == (2, 3)
    assert edit.mapper[2, 2:4].tolist() == [0.5, 0.5] and edit.mapper[3, 4] == 1


@settings(max_examples=80, deadline=None)
@given(
    *[st.text(st.sampled_from("ab cA,.#:’-é🙂()1\n\u0301\u200d"), max_size=30)] * 2,
    st.sampled_from([*MODES, "other"]),
    st.text(st.sampled_from("ab c:,#.-01"), max_size=12),
    st.booleans(),
)
def test_any_text_is_aligned_or_refused(source, target, mode, option, legacy):
    try:
        edit = align(
            source,
            target,
            mode=mode,
            weights=parse_weights(option),
            windows=parse_windows(option),
            blend_words=parse_words(option),
            legacy_tail=legacy,
        )
    except EditError as error:
        assert len(str(error)) > 20
        return
    check(edit)
    assert torch.equal(alignment_figure(edit), alignment_figure(edit))


@settings(max_examples=40, deadline=None)
@given(*[st.lists(st.sampled_from(["a", "cat", "dog,", "tigerlily", "Cat", "-"]), max_size=30).map(" ".join)] * 2)
def test_every_word_is_in_one_group(source, target):
    for mode in ("auto", "refine"):
        check(align(source, target, mode=mode))


def check(edit) -> None:
    count = edit.token_count
    assert edit.mapper.shape == (count, count) and edit.alphas.shape == edit.equalizer.shape == (count,)
    assert torch.isfinite(edit.mapper).all() and edit.mapper.min() >= 0
    assert set(edit.alphas.tolist()) <= {0.0, 1.0}
    assert edit.source.tokens.shape == edit.target.tokens.shape == (1, count, 2)
    assert all(0 <= place < count for place in (*edit.step_ranges, *edit.blend_source, *edit.blend_target))
    found = groups(edit)
    assert [i for group in found for i in group.source] == list(range(len(edit.source_words)))
    assert [j for group in found for j in group.target] == list(range(len(edit.target_words)))
    for group in found:
        assert bool(group.aligned) == (group.kind in ("same", "replaced"))


# ------------------------------------------------------------------------------------------------------------ options
def test_weights_and_windows_reach_the_tokens_of_their_words():
    edit = align(
        "a cat and a tigerlily",
        "a cat and a tigerlily and a cat",
        weights=parse_weights("tigerlily: -2.5\ncat#2: 0,"),
        windows=parse_windows("cat: 0.2-0.4, tigerlily: .5"),
    )
    assert {n: value for n, value in enumerate(edit.equalizer.tolist()) if value != 1} == {5: -2.5, 6: -2.5, 9: 0}
    assert edit.step_ranges == {2: (0.2, 0.4), 9: (0.2, 0.4), 5: (0.0, 0.5), 6: (0.0, 0.5)}
    assert edit.report[-3:] == (
        "target cat#1: 0.2-0.4",
        "target tigerlily: x-2.5, 0-0.5",
        "target cat#2: x0, 0.2-0.4",
    )


def test_blend_and_keep_words_are_looked_for_in_both_prompts():
    edit = align(
        "a cat near a cat",
        "a dog near a big cat",
        blend_words=("source:cat#1", "dog"),
        keep_words=("source:CAT#2", "big cat"),
    )
    assert (edit.blend_source, edit.blend_target) == ((2,), (2,))
    assert (edit.keep_source, edit.keep_target) == ((5,), (5, 6))
    both = align("a cat", "a cat, a cat", blend_words=("cat",))
    assert (both.blend_source, both.blend_target) == ((2,), (2, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(weights={"bird": 2.0}),
            "weights: 'bird' is not in the target prompt, which has the words a, dog, on, mat",
        ),
        (dict(weights={"cat": 2.0}), "not in the target prompt"),
        (dict(windows={"dog#2": (0, 1)}), "windows: 'dog#2' is not in the target prompt"),
        (dict(weights={"dog on": 2.0, "on": 1.0}), "'dog on' and 'on' mean the same word"),
        (dict(weights={",": 2.0}), "weights has ','"),
        (dict(weights={"dog#0": 2.0}), "weights has 'dog#0'"),
        (dict(weights={"dog": float("nan")}), "'dog' has nan: give a number from -100 to 100"),
        (dict(weights={"dog": 1e9}), "-100 to 100"),
        (dict(windows={"dog": (0.5, 0.2)}), "'dog' has 0.5-0.2"),
        (dict(windows={"dog": (0.5, 1.2)}), "from 0 to 1"),
        (
            dict(blend_words=("bird",)),
            "'bird' is not in the source prompt, which has the words a, cat, on, mat or the target",
        ),
        (dict(blend_words=("source:dog",)), "'dog' is not in the source prompt, which has the words a, cat"),
        (dict(blend_words=("middle:dog",)), "source:word or target:word"),
        (dict(keep_words=("!",)), "keep_words has '!'"),
        (
            dict(blend_words=("mat",), keep_words=("target:mat",)),
            "'mat' of the target prompt is in blend_words and in keep",
        ),
        (dict(mode="swap"), "mode is 'swap': choose one of auto, replace, refine"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(ParameterError) as error:
        align("a cat on mat", "a dog on mat", **options)
    assert message in str(error.value)


def test_the_text_of_the_widgets():
    assert parse_words(" circle, blue  background\ncat#2,, ") == ("circle", "blue  background", "cat#2")
    assert parse_weights("circle: 2, red#2:-.5\n blue  background : +1. ") == {
        "circle": 2,
        "red#2": -0.5,
        "blue background": 1,
    }
    assert parse_windows("red: 0-0.4, a: 0.2 - .8, b:1") == {"red": (0, 0.4), "a": (0.2, 0.8), "b": (0, 1)}
    assert parse_weights(" ,\n") == parse_windows("") == {}
    for text in ("circle", ": 2", "circle: two", "circle: 1e3", "circle: 2 3", "circle: inf", "circle:"):
        with pytest.raises(ParameterError, match="weights has"):
            parse_weights(text)
    for text in ("red: 0-", "red: 0..1", "red: 0-0.4-1", "red: early"):
        with pytest.raises(ParameterError, match="windows has"):
            parse_windows(text)
    with pytest.raises(ParameterError, match="weights names 'red' twice"):
        parse_weights("red: 1, red: 2")


# ----------------------------------------------------------------------------------------------------------- encoders
def test_an_encoder_whose_tokens_and_embedding_differ_is_refused():
    class Other(ToyTextEncoder):
        def tokens(self, text):
            return super().tokens(text)[:-1]

    with pytest.raises(FamilyError, match="76 tokens but an embedding"):
        align_prompts(Other(), "a", "b")


def test_texts_that_are_no_text_are_refused():
    for text in (None, 3, "\ud800"):
        with pytest.raises(ParameterError, match="target_text is not readable text"):
            align("a", text)


def test_equal_prompts_are_encoded_once():
    encoder = ToyTextEncoder()
    align_prompts(encoder, "a cat", "a cat")
    assert encoder.encoded == 1


# ----------------------------------------------------------------------------------------------------------- figure
def colours(image: torch.Tensor) -> set[str]:
    """Kinds whose colour is drawn above the legend."""
    pixels = (image[0, :-40] * 255).round().int()
    return {kind for kind, colour in COLOURS.items() if (pixels == torch.tensor(colour)).all(-1).any()}


def test_the_figure_shows_every_kind_in_its_colour():
    for texts in (
        ("a cat", "a dog"),
        ("a cat", "a cat now"),
        ("a cat now", "a cat"),
        ("a", "a"),
        ("big cat now", "small cat"),
    ):
        edit = align(*texts)
        assert colours(alignment_figure(edit)) == {group.kind for group in groups(edit)}


def test_lines_join_what_is_matched():
    """Between the two rows of boxes there is ink for every pair, and none for a word that is alone."""
    joined, alone = (alignment_figure(align(*texts)) for texts in (("cat", "dog"), ("cat", "")))
    middle = slice(14 + 58 + 5, 14 + 58 + 40)
    assert (joined[0, middle] < 0.9).any() and not (alone[0, middle] < 0.9).any()


@pytest.mark.parametrize(
    "texts",
    [
        ("a cat " * 90, "a dog " * 90),
        ("cat", "every word of it is new and so are all of these that follow here"),
        ("x" * 900, "y"),
        ("", ""),
    ],
)
def test_figures_of_long_prompts_are_wrapped(texts):
    image = alignment_figure(align(*texts))
    assert image.shape[0] == 1 and image.shape[2] <= WIDTH and image.shape[3] == 3
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert (image[0, :, -13:] == 1).all()  # nothing is cut at the right
