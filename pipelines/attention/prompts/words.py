"""The words of a prompt and the tokens that carry them; finding words by name (docs/methods.md, section 7.5, pitfalls).

A word is a run of letters and digits, with hyphens and apostrophes between them, or a run of other signs such as emoji.
Punctuation belongs to no word, so "dog," is the word "dog". Case does not matter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...core.errors import ParameterError
from ...core.protocols import Token

JOINERS = "-'’"
NUMBERED = re.compile(r"(?P<words>.*?)(?:#(?P<number>\d{1,6}))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Word:
    """One word of a prompt.

    Attributes:
        text: as it is written.
        name: the normalised form by which words are compared.
        tokens: its places in the padded sequence of tokens.
        label: `text`, followed by "#2" for the second occurrence of a repeated word.
    """

    text: str
    name: str
    tokens: tuple[int, ...]
    label: str


def word_name(text: str) -> str:
    """The normalised form by which words are compared: NFKC, without case, with plain apostrophes."""
    return unicodedata.normalize("NFKC", text).casefold().replace("’", "'")


def word_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the words of `text`, in order."""
    spans: list[tuple[int, int]] = []
    last = ""
    for start, kind in enumerate(_kinds(text)):
        if not kind:
            continue
        if spans and kind == last and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + 1)
        else:
            spans.append((start, start + 1))
        last = kind
    return spans


def _kinds(text: str) -> Iterator[str]:
    """For each character "L" in a word of letters, "S" in a word of signs, "" between words."""
    previous = ""
    for at, char in enumerate(text):
        category = unicodedata.category(char)
        if category[0] in "LN":
            kind = "L"
        elif category[0] == "M" or category == "Cf":  # accents and joiners belong to what is before them
            kind = previous
        elif category[0] == "S" and not char.isascii():
            kind = "S"
        else:
            joins = (
                char in JOINERS and previous == "L" and unicodedata.category(text[at + 1 : at + 2] or " ")[0] in "LN"
            )
            kind = "L" if joins else ""
        yield kind
        previous = kind


def prompt_words(text: str, tokens: Sequence[Token]) -> tuple[Word, ...]:
    """The words of a prompt that have tokens. The brackets and numbers of a host's weights have none and are left out.

    Args:
        tokens: of the padded sequence, as `TextEncoder.tokens` gives them.
    """
    spans = word_spans(text)
    word_at = [-1] * len(text)
    for number, (start, end) in enumerate(spans):
        word_at[start:end] = [number] * (end - start)
    places: list[list[int]] = [[] for _ in spans]
    for place, token in enumerate(tokens):
        if token.start >= 0:
            covered = [number for number in word_at[token.start : max(token.end, token.start + 1)] if number >= 0]
            if covered:
                places[covered[0]].append(place)
    found = [(text[start:end], tuple(taken)) for (start, end), taken in zip(spans, places, strict=True) if taken]
    names = [word_name(written) for written, _ in found]
    return tuple(
        Word(written, name, taken, _label(written, name, names[:index], names))
        for index, ((written, taken), name) in enumerate(zip(found, names, strict=True))
    )


def _label(text: str, name: str, before: Sequence[str], names: Sequence[str]) -> str:
    return text if names.count(name) == 1 else f"{text}#{before.count(name) + 1}"


def occurrences(words: Sequence[Word], name: str, socket: str) -> list[tuple[int, ...]]:
    """The tokens of every occurrence of a word or phrase; for "cat#2" of the second only.

    Returns: one tuple per occurrence, in order; empty if the prompt lacks it, or does not repeat it that often.
    Raises: ParameterError if `name` contains no word.
    """
    match = NUMBERED.fullmatch(name)
    written, number = (match["words"], match["number"]) if match else (name, None)
    names = [word_name(written[start:end]) for start, end in word_spans(written)]
    if not names or (number is not None and int(number) < 1):
        raise ParameterError(f"{socket} has {name.strip()!r}: write a word of the prompt, or cat#2 for the second cat")
    found = []
    for first in range(len(words) - len(names) + 1):
        run = words[first : first + len(names)]
        if [word.name for word in run] == names:
            found.append(tuple(place for word in run for place in word.tokens))
    return found if number is None else found[int(number) - 1 : int(number)]


def missing(words: Sequence[Word], name: str, socket: str, prompt: str) -> ParameterError:
    """The error for a word that a prompt does not have.

    Args:
        words: the words that the prompt has; the message lists them.
        name: the word that was asked for.
        socket: the input that asked for it.
        prompt: "source" or "target".
    Returns: the error, for the caller to raise.
    """
    return ParameterError(f"{socket}: {name.strip()!r} is not in the {prompt} prompt, {listed(words)}")


def listed(words: Sequence[Word]) -> str:
    """A prompt's words for a message."""
    return f"which has the words {', '.join(word.label for word in words)}" if words else "which has no words"
