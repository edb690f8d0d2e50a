"""Two prompts, word by word: what Prompt-to-Prompt needs to know before it edits (Hertz et al. 2022; methods.md, 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.errors import FamilyError, ParameterError
from ...core.protocols import Context, TextEncoder, Token
from .mappers import (
    Item,
    Layout,
    Span,
    changed_spans,
    layout,
    published_mapper,
    refine_mapper,
    replaced_spans,
    span_mapper,
)
from .prompt_edit import PromptEdit
from .report import report_lines
from .widget_syntax import check_weight, check_window
from .words import Word, listed, missing, occurrences, prompt_words

MODES = ("auto", "replace", "refine")
PROMPTS = ("source", "target")


@dataclass(frozen=True)
class Prompt:
    """One prompt as it goes into an alignment: text, tokens of whole windows, embedding of as many, words."""

    text: str
    tokens: tuple[Token, ...]
    context: Context
    words: tuple[Word, ...]

    @property
    def layout(self) -> Layout:
        return layout(self.tokens)


def align_prompts(
    encoder: TextEncoder,
    source_text: str,
    target_text: str,
    *,
    mode: str = "auto",
    weights: Mapping[str, float] | None = None,
    windows: Mapping[str, tuple[float, float]] | None = None,
    blend_words: Sequence[str] = (),
    keep_words: Sequence[str] = (),
    legacy_tail: bool = False,
) -> PromptEdit:
    """Encode two prompts, find out which word became which, and attach what is asked of single words.

    Args:
        mode: "replace" = word for word, both prompts have equally many words (methods.md, 7.1); "refine" = tokens that both
            have keep their map, new ones have their own (7.2); "auto" = the words that both have are matched, and each
            stretch between two matches is replaced, added or removed on its own.
        weights: strength of words of the target, -100 to 100, 1 = unchanged (7.3).
        windows: (first, last) part of the run in which words of the target take their attention from the source (7.4).
        blend_words: words of either prompt whose place may change; without any the whole picture may (7.5).
        keep_words: words of either prompt whose place must stay.
        legacy_tail: the official code's treatment of what follows the last change (see `published_mapper`) and of padding
            (see `refine_mapper`).
    Names are written as in `word_options`: "cat" is every cat, "cat#2" the second, "source:cat" those of one prompt.

    Returns: a PromptEdit whose two contexts have one token count: the shorter prompt is continued by empty windows.
    Raises: ParameterError, naming the option, for texts, modes, words and numbers that do not fit; FamilyError for text
        encoders that are not CLIP's.
    """
    if mode not in MODES:
        raise ParameterError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    source, target = _prompts(encoder, _checked(source_text, "source_text"), _checked(target_text, "target_text"))
    mapper, gate = _mapper(source, target, mode, legacy_tail)
    edit = PromptEdit(
        source.context,
        target.context,
        mapper,
        gate,
        _scale(target, weights or {}),
        _windows(target, windows or {}),
        source_words=source.words,
        target_words=target.words,
    )
    edit = _with_places(edit, blend_words, keep_words)
    return replace(edit, report=report_lines(edit))


def _checked(text: str, socket: str) -> str:
    try:
        text.encode("utf-8")
    except (AttributeError, UnicodeEncodeError) as error:
        raise ParameterError(f"{socket} is no readable text ({error}): write the prompt again") from error
    return text


# ---------------------------------------------------------------------------------------------------------- encoding
def _prompts(encoder: TextEncoder, source_text: str, target_text: str) -> tuple[Prompt, Prompt]:
    """Both prompts on one token count."""
    source = _encoded(encoder, source_text)
    target = source if target_text == source_text else _encoded(encoder, target_text)
    count = max(len(source.tokens), len(target.tokens))
    return _continued(encoder, source, count), _continued(encoder, target, count)


def _encoded(encoder: TextEncoder, text: str) -> Prompt:
    tokens, context = tuple(encoder.tokens(text)), encoder.encode(text)
    if context.tokens.shape[:2] != (1, len(tokens)):
        raise FamilyError(
            f"clip gives {len(tokens)} tokens but an embedding of {tuple(context.tokens.shape)}: words can be aligned where"
            " every token has its own place in the embedding, as with the CLIPs of SD 1.x, SD 2.x and SDXL"
        )
    return Prompt(text, tokens, context, prompt_words(text, tokens))


def _continued(encoder: TextEncoder, prompt: Prompt, count: int) -> Prompt:
    """Empty windows behind the prompt. Windows are encoded one by one, so that the words' embedding is as it was."""
    short = count - len(prompt.tokens)
    if not short:
        return prompt
    empty = _encoded(encoder, "")
    times, rest = divmod(short, len(empty.tokens))
    if rest:
        raise FamilyError(
            f"clip has windows of different lengths ({len(empty.tokens)} and {count}): use a CLIP encoder"
        )
    added = empty.context.tokens.to(prompt.context.tokens).repeat(1, times, 1)
    context = prompt.context.with_tokens(torch.cat([prompt.context.tokens, added], dim=1))
    return replace(prompt, tokens=prompt.tokens + empty.tokens * times, context=context)


# --------------------------------------------------------------------------------------------------------- alignment
def _mapper(source: Prompt, target: Prompt, mode: str, legacy_tail: bool) -> tuple[Tensor, Tensor]:
    layouts = source.layout, target.layout
    if mode == "refine":
        return refine_mapper(*layouts, legacy_tail=legacy_tail)
    return (published_mapper if legacy_tail else span_mapper)(_spans(source, target, mode), *layouts)


def _spans(source: Prompt, target: Prompt, mode: str) -> list[Span]:
    if mode == "auto":
        return changed_spans(_items(source), _items(target))
    counts = len(source.words), len(target.words)
    if counts[0] != counts[1]:
        raise ParameterError(
            f"mode is replace but source_text has {counts[0]} words and target_text {counts[1]}: give both equally many, or "
            "choose auto"
        )
    return replaced_spans(_items(source), _items(target))


def _items(prompt: Prompt) -> list[Item]:
    """Words, and single tokens of punctuation between them, in order."""
    owner = {place: word for word in prompt.words for place in word.tokens}
    items = {}
    for place, token in enumerate(prompt.tokens):
        if token.start >= 0:
            word = owner.get(place)
            item = Item(token.id, (place,), False) if word is None else Item(word.name, word.tokens, True)
            items[item.tokens] = item
    return list(items.values())


# ------------------------------------------------------------------------------------------------------ single words
def _scale(target: Prompt, weights: Mapping[str, float]) -> Tensor:
    scale = torch.ones(len(target.tokens))
    for name, places in _each(target, weights, "weights").items():
        scale[list(places)] = check_weight(name, weights[name])
    return scale


def _windows(target: Prompt, windows: Mapping[str, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    found = {}
    for name, places in _each(target, windows, "windows").items():
        found.update(dict.fromkeys(places, check_window(name, windows[name])))
    return found


def _each(target: Prompt, names: Mapping[str, object], socket: str) -> dict[str, tuple[int, ...]]:
    """The target tokens of each name. Raises ParameterError for unknown words, and for one that two names mean."""
    places: dict[str, tuple[int, ...]] = {}
    taken: dict[int, str] = {}
    for name in names:
        found = occurrences(target.words, name, socket)
        if not found:
            raise missing(target.words, name, socket, "target")
        places[name] = tuple(place for run in found for place in run)
        for place in places[name]:
            if taken.setdefault(place, name) != name:
                raise ParameterError(f"{socket}: {taken[place]!r} and {name!r} mean the same word: keep one of the two")
    return places


def _with_places(edit: PromptEdit, blend: Sequence[str], keep: Sequence[str]) -> PromptEdit:
    blends, keeps = _in_both(edit, blend, "blend_words"), _in_both(edit, keep, "keep_words")
    for prompt, may, must in zip(PROMPTS, blends, keeps, strict=True):
        both = [word.label for word in _words(edit, prompt) if {*may} & {*must} & {*word.tokens}]
        if both:
            raise ParameterError(f"{both[0]!r} of the {prompt} prompt is in blend_words and in keep_words: choose one")
    return replace(
        edit, blend_source=blends[0], blend_target=blends[1], keep_source=keeps[0], keep_target=keeps[1]
    )  # fmt: skip


def _in_both(edit: PromptEdit, names: Sequence[str], socket: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens in the source and in the target of words that at least one of them has."""
    found: dict[str, set[int]] = {prompt: set() for prompt in PROMPTS}
    for written in names:
        chosen, colon, name = written.strip().partition(":")
        asked = PROMPTS if not colon else (chosen.strip().lower(),)
        if asked[0] not in PROMPTS:
            raise ParameterError(f"{socket} has {written!r}: write a word, source:word or target:word")
        hits = {prompt: occurrences(_words(edit, prompt), name if colon else written, socket) for prompt in asked}
        if not any(hits.values()):
            prompts = " or ".join(f"the {prompt} prompt, {listed(_words(edit, prompt))}" for prompt in asked)
            raise ParameterError(f"{socket}: {(name or written).strip()!r} is not in {prompts}")
        for prompt, runs in hits.items():
            found[prompt].update(place for run in runs for place in run)
    return tuple(sorted(found["source"])), tuple(sorted(found["target"]))


def _words(edit: PromptEdit, prompt: str) -> tuple[Word, ...]:
    return edit.source_words if prompt == "source" else edit.target_words
