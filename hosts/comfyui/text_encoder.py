"""A native CLIP as a TextEncoder."""

from __future__ import annotations

from typing import Any

from comfy.sd1_clip import escape_important, parse_parentheses
from torch import Tensor

from ...pipelines.core.errors import FamilyError, ParameterError
from ...pipelines.core.protocols import Context, Token
from ..sockets import context_of

EMBEDDING = "embedding:"
KEYS = ("l", "h", "g")  # ComfyUI's names of CLIP towers; SDXL's two share one tokenization
SPECIAL = (-1, -1)


class NativeTextEncoder:
    """See `TextEncoder`.

    ComfyUI's prompt syntax holds: "(word:1.2)" weights a word (the brackets and the number become no tokens), "\\(" is a
    literal bracket. A prompt longer than one window is cut into windows of 77 tokens, each with its own start and end
    token; `encode` and `tokens` both return the windows one after another, so their positions agree.
    """

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def encode(self, text: str) -> Context:
        """See `TextEncoder.encode`."""
        conditioning = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
        for _, extras in conditioning:
            extras["editkit_text"] = text
        return context_of(conditioning, "clip")

    def encode_negative(self, text: str) -> Context:
        """See `TextEncoder.encode_negative`: as ComfyUI encodes it, where 'ConditioningZeroOut' gives zeros."""
        return self.encode(text)

    def tokens(self, text: str) -> list[Token]:
        """See `TextEncoder.tokens`.

        Raises: ParameterError for textual-inversion embeddings, which cover no word; FamilyError for T5 and other
            encoders whose tokens are not CLIP's.
        """
        windows = self.clip.tokenize(text, return_word_ids=True)
        key = next((key for key in KEYS if key in windows), None)
        tokenizer = getattr(getattr(self.clip.tokenizer, f"clip_{key}", None), "tokenizer", None)
        if tokenizer is None or len(windows) > 2 or any(name not in KEYS for name in windows):
            raise FamilyError(f"clip has the towers {', '.join(windows)}: word positions are known for CLIP only")
        words = iter(_word_tokens(text, tokenizer))
        found = [self._token(entry, words) for window in windows[key] for entry in window]
        if next(words, None) is not None:
            raise FamilyError("clip cuts this prompt in a way that word positions cannot follow")
        return found

    @staticmethod
    def _token(entry: tuple[Any, ...], words: Any) -> Token:
        number, _, word = entry
        if isinstance(number, Tensor):
            raise ParameterError(
                f"the prompt has a textual-inversion {EMBEDDING} that covers no word: write it in words"
            )
        if word == 0:
            return Token(int(number), *SPECIAL)
        token = next(words, None)
        if token is None or token.id != number:
            raise FamilyError("clip cuts this prompt in a way that word positions cannot follow")
        return token


def _word_tokens(text: str, tokenizer: Any) -> list[Token]:
    """The prompt's tokens without the special ones, in order."""
    if EMBEDDING in text:
        raise ParameterError(f"the prompt has a textual-inversion {EMBEDDING} that covers no word: write it in words")
    found = []
    for start, end in weighted_spans(escape_important(text)):
        segment, places = _unescaped(text, start, end)
        for number, (first, last) in _segment_tokens(segment, tokenizer):
            found.append(Token(number, places[first], places[last - 1] + 1))
    return found


def weighted_spans(escaped: str, start: int = 0) -> list[tuple[int, int]]:
    """Spans of the text without ComfyUI's weight syntax, in order: "a (red:1.2) cat" gives "a ", "red", " cat"."""
    spans = []
    for part in parse_parentheses(escaped):
        end = start + len(part)
        if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
            spans += weighted_spans(_without_weight(part[1:-1]), start + 1)
        else:
            spans.append((start, end))
        start = end
    return spans


def _without_weight(text: str) -> str:
    colon = text.rfind(":")
    if colon <= 0:
        return text
    try:
        float(text[colon + 1 :])
    except ValueError:
        return text
    return text[:colon]


def _unescaped(text: str, start: int, end: int) -> tuple[str, list[int]]:
    """text[start:end] with "\\(" and "\\)" as brackets, and the place of each character in `text`."""
    kept = []
    places = []
    i = start
    while i < end:
        if text[i] == "\\" and i + 1 < end and text[i + 1] in "()":
            i += 1
        kept.append(text[i])
        places.append(i)
        i += 1
    return "".join(kept), places


def _segment_tokens(segment: str, tokenizer: Any) -> list[tuple[int, tuple[int, int]]]:
    """Ids of a piece of text with their character spans in it."""
    if not getattr(tokenizer, "is_fast", False):
        return _walked(segment, tokenizer)
    encoded = tokenizer(segment, return_offsets_mapping=True, add_special_tokens=False)
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _walked(segment: str, tokenizer: Any) -> list[tuple[int, tuple[int, int]]]:
    """Spans for a tokenizer that gives none: its byte-level pieces, in order, cover the text without white space."""
    places = [i for i, char in enumerate(segment) if not char.isspace() for _ in char.lower().encode()]
    found, at = [], 0
    for number in tokenizer(segment, add_special_tokens=False)["input_ids"]:
        length = len(tokenizer.convert_ids_to_tokens(int(number)).removesuffix("</w>"))
        if at + length > len(places):
            raise FamilyError(
                f"clip reads {segment!r} in a way that word positions cannot follow: write it without accents"
            )
        found.append((int(number), (places[at], places[at + length - 1] + 1)))
        at += length
    return found
