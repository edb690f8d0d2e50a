"""Token spans follow the host's tokenizer through weights, brackets, long prompts and foreign letters."""

from __future__ import annotations

import random

import pytest
from comfy.sd1_clip import escape_important, token_weights

from editkit.hosts.comfyui import text_encoder as _host_text
from editkit.hosts.host import text_encoder_of
from editkit.hosts.sockets import conditioning_of
from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.protocols import TextEncoder

PROMPTS = (
    "a red circle on a gray background",
    "A  Red,circle!\n on 2 tiny dogs' backs",
    "a (red:1.3) circle ((on)) a (gray (striped:0.5) field) \\(new\\)",
    "(((nested))) (a:b:1.5) (no weight: here) :) (",
    "naïve café, 東京 and 🙂 emoji",
    "",
)


def pieces(encoder, text: str) -> list[tuple[int, str]]:
    return [(token.id, text[token.start : token.end]) for token in encoder.tokens(text) if token.start >= 0]


def vocabulary(clip) -> dict[int, str]:
    return clip.tokenizer.clip_l.inv_vocab


@pytest.mark.parametrize("text", PROMPTS)
def test_spans_spell_the_tokens(clip, text: str) -> None:
    encoder = text_encoder_of(clip)
    assert isinstance(encoder, TextEncoder)
    found = encoder.tokens(text)
    assert len(found) % 77 == 0
    windows = clip.tokenize(text)["l"]
    assert [token.id for token in found] == [number for window in windows for number, _ in window]
    for number, spelled in pieces(encoder, text):
        if spelled.isascii():
            assert spelled.lower().replace("\\", "") == vocabulary(clip)[number].removesuffix("</w>")


def test_weights_are_no_tokens(clip) -> None:
    text = "a (red:1.3) circle"
    spans = [text[token.start : token.end] for token in text_encoder_of(clip).tokens(text) if token.start >= 0]
    assert spans == ["a", "red", "circle"]


def test_windows_of_a_long_prompt(clip) -> None:
    encoder = text_encoder_of(clip)
    text = "red circle and " * 40
    found, encoded = encoder.tokens(text), encoder.encode(text)
    assert len(found) == encoded.tokens.shape[1] == 154
    words = [token for token in found if token.start >= 0]
    assert len(words) == 120
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))
    assert encoded.text == text


def test_walking_equals_the_offsets(clip) -> None:
    tokenizer = clip.tokenizer.clip_l.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        pytest.skip("this transformers has no fast CLIP tokenizer to compare with")
    for text in ("a red circle on a GRAY background, isn't it?", "unbelievable xqzwv 12345"):
        assert _host_text._walked(text, tokenizer) == _host_text._segment_tokens(text, tokenizer)


def test_spans_of_weights_equal_the_hosts_reading() -> None:
    """On random brackets, colons, numbers and escapes: the same segments in the same order."""
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(
            rng.choice(["a", "b ", "(", ")", ":", "1.2", "\\(", "\\)", "-"]) for _ in range(rng.randint(0, 12))
        )
        escaped = escape_important(text)
        theirs = [segment for segment, _ in token_weights(escaped, 1.0)]
        assert [escaped[start:end] for start, end in _host_text.weighted_spans(escaped)] == theirs


def test_embeddings_are_refused(clip) -> None:
    with pytest.raises(ParameterError, match="embedding"):
        text_encoder_of(clip).tokens("a embedding:thing on a table")


def test_encode_is_the_hosts_own(clip) -> None:
    import torch

    import nodes as stock_nodes

    ours = text_encoder_of(clip).encode("a (red:1.3) circle")
    theirs = stock_nodes.CLIPTextEncode().encode(clip, "a (red:1.3) circle")[0]
    assert torch.equal(ours.tokens, theirs[0][0])
    assert torch.equal(conditioning_of(ours)[0][0], theirs[0][0])
