"""The node that aligns prompts, as a graph calls it: widgets in, edit, image and report out, or an error that names them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editkit.pipelines.attention.prompts.align import MODES, align_prompts
from editkit.pipelines.attention.prompts.prompt_edit import PromptEdit
from editkit.pipelines.core.errors import EditError, ParameterError
from editkit.tests.nodes.graph import call
from editkit.tests.toy_prompts import ToyTextEncoder

TEXTS = dict(source_text="a red circle on a gray background", target_text="a green circle on a gray background")
WORDS = st.lists(st.sampled_from(["a", "cat", "dog,", "tigerlily", "(red:1.2)"]), max_size=90).map(" ".join)
OPTIONS = st.sampled_from(["", "cat", "cat: 2", "dog: 0-0.5", "cat#2: 1", "source:cat", "bird", "a:1, a:2", ":,:", "a"])


@pytest.fixture(scope="module")
def clip():
    return call("LoadModel", model="bundled")[1]


def toy():
    from editkit.hosts.host import HeadlessClip

    return HeadlessClip(ToyTextEncoder())


def test_the_node_gives_what_the_function_gives(clip):
    edit, image, report = call(
        "AlignPrompts", clip=clip, **TEXTS, mode="refine", weights="circle: 2, green: .5", windows="green: 0.1-0.4",
        blend_words="circle\nsource:red", keep_words="background",
    )  # fmt: skip
    expected = align_prompts(
        clip.text_encoder, *TEXTS.values(), mode="refine", weights={"circle": 2, "green": 0.5},
        windows={"green": (0.1, 0.4)}, blend_words=("circle", "source:red"), keep_words=("background",),
    )  # fmt: skip
    assert isinstance(edit, PromptEdit)
    for name in ("mapper", "alphas", "equalizer"):
        assert torch.equal(getattr(edit, name), getattr(expected, name))
    assert (edit.blend_source, edit.blend_target) == ((2, 3), (3,)) == (expected.blend_source, expected.blend_target)
    assert edit.keep_source == edit.keep_target == (7,)
    assert edit.step_ranges == {2: (0.1, 0.4)}
    assert report.splitlines() == list(edit.report) and report.startswith("same: a\nremoved: red\nadded: green")
    assert image.shape[0] == 1 and image.shape[-1] == 3 and image.device.type == "cpu"


def test_modes_and_the_published_tail_differ(clip):
    texts = dict(source_text="a red circle on gray", target_text="a tigerlily circle on gray")
    mappers = [
        call("AlignPrompts", clip=clip, **texts, mode=mode, legacy_tail=tail)[0].mapper
        for mode, tail in (("replace", False), ("replace", True), ("refine", False))
    ]
    assert not torch.equal(mappers[0], mappers[1]) and not torch.equal(mappers[0], mappers[2])
    assert torch.equal(mappers[0], call("AlignPrompts", clip=clip, **texts)[0].mapper)


@pytest.mark.parametrize(
    ("widget", "text", "message"),
    [
        ("weights", "square: 2", "which has the words a#1, green, circle, on, a#2, gray, background"),
        ("weights", "circle 2", "as circle: 2"),
        ("windows", "circle: late", "two fractions of the steps"),
        ("blend_words", "square", "not in the source prompt"),
        ("keep_words", "square", "keep_words: 'square'"),
    ],
)
def test_errors_name_the_widget(clip, widget, text, message):
    with pytest.raises(ParameterError) as error:
        call("AlignPrompts", clip=clip, **TEXTS, **{widget: text})
    assert widget in str(error.value) and message in str(error.value)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WORDS, WORDS, st.sampled_from(MODES), OPTIONS, OPTIONS, OPTIONS, st.booleans())
def test_anything_may_be_written(source, target, mode, weights, windows, places, tail):
    try:
        edit, image, report = call(
            "AlignPrompts", clip=toy(), source_text=source, target_text=target, mode=mode, weights=weights, windows=windows,
            blend_words=places, keep_words="", legacy_tail=tail,
        )  # fmt: skip
    except EditError as error:
        assert str(error)
        return
    assert torch.isfinite(edit.mapper).all() and torch.isfinite(image).all()
    assert edit.source.tokens.shape[1] == edit.target.tokens.shape[1] == edit.token_count
    assert bool(report) == bool(edit.source_words or edit.target_words)
