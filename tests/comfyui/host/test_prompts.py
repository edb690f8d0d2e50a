"""Prompts aligned through a native CLIP: the same as headless, with the host's weights, long prompts, and its refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy.sdxl_clip import SDXLTokenizer

from editkit.hosts.diffusers.loading import load_bundled as load_headless
from editkit.hosts.diffusers.text_encoder import ClipBpe
from editkit.hosts.host import text_encoder_of
from editkit.hosts.loading import load_bundled
from editkit.hosts.sockets import conditioning_of
from editkit.nodes._api import io
from editkit.nodes.attention.prompts import AlignPrompts
from editkit.pipelines.attention.prompts.align import MODES, align_prompts
from editkit.pipelines.attention.prompts.mappers import layout
from editkit.pipelines.core.errors import EditError, FamilyError, ParameterError

PROMPTS = (
    "a red circle on a gray background",
    "A  Red,circle!\n on 2 tiny dogs' backs",
    "naïve café, 東京 and 🙂 emoji 🙂🙂",
    "dog's don’t 3.5 c++, +,+ İstanbul x",
    "ﬁne ½ a\u200db &amp; <b> tigerlily",
    "",
    "red circle and " * 40,
    "word " * 75,
    "word " * 76,
)
PAIRS = (
    ("a red circle, on a gray background", "a green circle on a gray background"),
    ("a cat on a mat", "a tigerlily on a mat, at night"),
    ("a small red ring", "a ring"),
    ("red circle and " * 30, "red ring and " * 20),
)


@pytest.mark.parametrize("text", PROMPTS)
def test_both_hosts_cut_a_prompt_alike(clip, text: str) -> None:
    theirs = [token for token in text_encoder_of(clip).tokens(text) if token.start >= 0]
    assert ClipBpe().split(text) == theirs


@pytest.mark.parametrize("texts", PAIRS)
@pytest.mark.parametrize("mode", ["auto", "refine"])
def test_both_hosts_align_alike(texts, mode) -> None:
    """On the bundled model, whose embeddings then agree too."""
    _, clip, _ = load_bundled()
    with torch.inference_mode(False):
        headless = align_prompts(load_headless().text, *texts, mode=mode)
    native = align_prompts(text_encoder_of(clip), *texts, mode=mode)
    assert torch.equal(native.mapper, headless.mapper) and torch.equal(native.alphas, headless.alphas)
    assert native.source_words == headless.source_words and native.target_words == headless.target_words
    assert native.report == headless.report
    for ours, theirs in ((native.source, headless.source), (native.target, headless.target)):
        assert (ours.tokens - theirs.tokens).abs().max() <= 1e-4 * theirs.tokens.abs().max()


def test_the_hosts_weights_are_no_words(clip) -> None:
    encoder = text_encoder_of(clip)
    plain = align_prompts(encoder, "a red circle on gray", "a green circle on gray")
    weighted = align_prompts(encoder, "a (red:1.3) circle on gray", "a ((green)) circle on (gray:0.5)")
    assert [word.text for word in weighted.target_words] == ["a", "green", "circle", "on", "gray"]
    assert torch.equal(weighted.mapper, plain.mapper) and weighted.report == plain.report
    assert not torch.equal(weighted.source.tokens, plain.source.tokens)
    escaped = align_prompts(encoder, "a \\(red\\) circle", "a \\(green\\) circle")
    assert escaped.report == ("same: a", "replaced: red -> green", "same: circle")


def test_weighted_parts_that_move_to_the_next_window(clip) -> None:
    """The host keeps a short weighted part whole: the first window then ends with padding in mid-prompt."""
    encoder = text_encoder_of(clip)
    text = "red " * 73 + "(green ring on gray:1.2) and (blue square:1.1)"
    tokens = encoder.tokens(text)
    assert len(tokens) == 154 and [place for place, t in enumerate(tokens[:77]) if t.start < 0] == [0, 74, 75, 76]
    for mode in MODES:
        edit = align_prompts(encoder, text, text, mode=mode)
        assert torch.equal(edit.mapper, torch.eye(154)) and edit.alphas.all()
    swapped = align_prompts(encoder, text, text.replace("square", "disc"))
    assert swapped.report == (
        "same: " + " ".join(["red"] * 73 + ["green ring on gray and blue"]), "replaced: square -> disc",
    )  # fmt: skip


def test_a_shorter_prompt_is_continued_by_what_the_host_gives_for_an_empty_window(clip) -> None:
    short, long = "a red circle", "red circle and " * 40
    edit = align_prompts(text_encoder_of(clip), short, long)
    assert edit.source.tokens.shape == edit.target.tokens.shape == (1, 154, 128)
    windows = clip.tokenize(short)["l"] + clip.tokenize("")["l"]
    together = clip.encode_from_tokens({"l": windows})
    torch.testing.assert_close(edit.source.tokens, together, atol=1e-5, rtol=1e-5)
    rebuilt = conditioning_of(edit.source)
    assert torch.equal(rebuilt[0][0], edit.source.tokens) and edit.source.text == short
    assert "pooled_output" in rebuilt[0][1]


def test_the_node(clip) -> None:
    assert issubclass(AlignPrompts, io.ComfyNode)
    options = {"mode": "auto", "weights": "circle: 2", "windows": "green: 0-0.5", "blend_words": "circle"}
    output = AlignPrompts.execute(clip, "a red circle", "a green circle", **options, keep_words="", legacy_tail=False)
    edit, image, report = output.result
    assert report.splitlines()[:3] == ["same: a", "replaced: red -> green", "same: circle"]
    assert image.shape[0] == 1 and output.ui["text"] == [report]
    assert (
        edit.equalizer[3] == 2
        and edit.step_ranges == {2: (0.0, 0.5)}
        and edit.blend_source == edit.blend_target == (3,)
    )


def test_encoders_that_cannot_be_aligned_are_refused_by_name(clip) -> None:
    t5 = SimpleNamespace(
        tokenize=lambda text, **_: {"l": [[(0, 1.0, 0)]], "t5xxl": [[(0, 1.0, 0)]]}, tokenizer=SimpleNamespace()
    )
    with pytest.raises(FamilyError, match="t5xxl"):
        align_prompts(text_encoder_of(t5), "a", "b")
    with pytest.raises(ParameterError, match="embedding"):
        align_prompts(text_encoder_of(clip), "a cat", "a embedding:thing")
    with pytest.raises(EditError, match="clip is empty"):
        AlignPrompts.execute(None, "a", "b", "auto", "", "", "", "", False)


@pytest.mark.parametrize("text", PROMPTS)
def test_one_mapper_serves_both_towers_of_sdxl(clip, text: str) -> None:
    """Their tokens stand in the same places; only the padding has another id."""
    tokenizer = SDXLTokenizer()
    xl = SimpleNamespace(tokenize=tokenizer.tokenize_with_weights, tokenizer=tokenizer)
    found = text_encoder_of(xl).tokens(text)
    assert found == text_encoder_of(clip).tokens(text)
    second = [number for window in tokenizer.tokenize_with_weights(text)["g"] for number, _ in window]
    assert len(second) == len(found)
    padding = layout(found).padding
    for place in set(range(len(found))) - padding:
        assert second[place] == found[place].id
