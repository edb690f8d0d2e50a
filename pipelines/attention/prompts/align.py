"""Align two prompts word by word for Prompt-to-Prompt (Hertz et al. 2022, section 3.2; docs/methods.md, section 7)."""

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
    """One prompt of an alignment.

    Attributes:
        tokens: every token of the padded text, in whole windows.
        context: the embedding, with one entry per token.
        words: the words and their tokens.
    """

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
    """Encode two prompts, align their words, and attach the options of single words.

    Words are written as in `widget_syntax`: "cat" is every cat, "cat#2" the second, "source:cat" those of one prompt.
    Section numbers are those of docs/methods.md.

    Args:
        encoder: a CLIP text encoder.
        source_text: the prompt of the source.
        target_text: the prompt of the target.
        mode: "replace" = word for word, both prompts have the same number of words (section 7.1); "refine" = tokens that
            both have receive the source's maps, new ones keep their own (7.2); "auto" = words that both have are aligned,
            and each stretch between two of them is replaced, added or removed.
        weights: factors of the target's words, -100 to 100, 1 = unchanged (7.3).
        windows: step ranges (first, last) in which words of the target use the source's maps, fractions of the steps (7.4).
        blend_words: words of either prompt whose region may change; none = the whole image may (7.5).
        keep_words: words of either prompt whose region must stay.
        legacy_tail: the official code's treatment of the words after the last change (see `published_mapper`) and of padding
            (see `refine_mapper`).
    Returns: a PromptEdit whose contexts have the same token count; the shorter prompt is padded with empty windows.
    Raises: ParameterError, naming the option, for texts, modes, words and numbers that do not fit; FamilyError for text
        encoders that are not CLIP's.
    """
    if mode not in MODES:
        raise ParameterError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    source, target = _prompts(encoder, _checked(source_text, "source_text"), _checked(target_text, "target_text"))
    mapper, alphas = _mapper(source, target, mode, legacy_tail)
    edit = PromptEdit(
        source.context,
        target.context,
        mapper,
        alphas,
        _equalizer(target, weights or {}),
        _step_ranges(target, windows or {}),
        source_words=source.words,
        target_words=target.words,
    )
    edit = _with_regions(edit, blend_words, keep_words)
    return replace(edit, report=report_lines(edit))


def _checked(text: str, socket: str) -> str:
    try:
        text.encode("utf-8")
    except (AttributeError, UnicodeEncodeError) as error:
        raise ParameterError(f"{socket} is not readable text ({error}): write the prompt again") from error
    return text


# ---------------------------------------------------------------------------------------------------------- encoding
def _prompts(encoder: TextEncoder, source_text: str, target_text: str) -> tuple[Prompt, Prompt]:
    """Both prompts with the same token count."""
    source = _encoded(encoder, source_text)
    target = source if target_text == source_text else _encoded(encoder, target_text)
    count = max(len(source.tokens), len(target.tokens))
    return _padded(encoder, source, count), _padded(encoder, target, count)


def _encoded(encoder: TextEncoder, text: str) -> Prompt:
    tokens, context = tuple(encoder.tokens(text)), encoder.encode(text)
    if context.tokens.shape[:2] != (1, len(tokens)):
        raise FamilyError(
            f"clip gives {len(tokens)} tokens but an embedding of {tuple(context.tokens.shape)}: words can only be aligned if"
            " every token has one entry of the embedding, as with the CLIPs of SD 1.x, SD 2.x and SDXL"
        )
    return Prompt(text, tokens, context, prompt_words(text, tokens))


def _padded(encoder: TextEncoder, prompt: Prompt, count: int) -> Prompt:
    """The prompt with empty windows up to `count` tokens. Windows are encoded one by one, so the words' embedding stays."""
    lacking = count - len(prompt.tokens)
    if not lacking:
        return prompt
    empty = _encoded(encoder, "")
    times, rest = divmod(lacking, len(empty.tokens))
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
            f"mode is replace but source_text has {counts[0]} words and target_text {counts[1]}: give both the same number, "
            "or choose auto"
        )
    return replaced_spans(_items(source), _items(target))


def _items(prompt: Prompt) -> list[Item]:
    """The words, and the single tokens of punctuation between them, in order."""
    word_of = {place: word for word in prompt.words for place in word.tokens}
    items = {}
    for place, token in enumerate(prompt.tokens):
        if token.start >= 0:
            word = word_of.get(place)
            item = Item(token.id, (place,), False) if word is None else Item(word.name, word.tokens, True)
            items[item.tokens] = item
    return list(items.values())


# ------------------------------------------------------------------------------------------------------ single words
def _equalizer(target: Prompt, weights: Mapping[str, float]) -> Tensor:
    equalizer = torch.ones(len(target.tokens))
    for name, places in _tokens_of(target, weights, "weights").items():
        equalizer[list(places)] = check_weight(name, weights[name])
    return equalizer


def _step_ranges(target: Prompt, windows: Mapping[str, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    ranges = {}
    for name, places in _tokens_of(target, windows, "windows").items():
        ranges.update(dict.fromkeys(places, check_window(name, windows[name])))
    return ranges


def _tokens_of(target: Prompt, names: Mapping[str, object], socket: str) -> dict[str, tuple[int, ...]]:
    """The target tokens of each name. Raises ParameterError for unknown words, and for a word with two names."""
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


def _with_regions(edit: PromptEdit, blend_words: Sequence[str], keep_words: Sequence[str]) -> PromptEdit:
    blend = _tokens_in_both(edit, blend_words, "blend_words")
    keep = _tokens_in_both(edit, keep_words, "keep_words")
    for prompt, blended, kept in zip(PROMPTS, blend, keep, strict=True):
        both = [word.label for word in _words(edit, prompt) if {*blended} & {*kept} & {*word.tokens}]
        if both:
            raise ParameterError(f"{both[0]!r} of the {prompt} prompt is in blend_words and in keep_words: choose one")
    return replace(edit, blend_source=blend[0], blend_target=blend[1], keep_source=keep[0], keep_target=keep[1])


def _tokens_in_both(edit: PromptEdit, names: Sequence[str], socket: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of the named words in source and target. Raises ParameterError for words that neither prompt has."""
    found: dict[str, set[int]] = {prompt: set() for prompt in PROMPTS}
    for written in names:
        prefix, colon, name = written.strip().partition(":")
        searched = PROMPTS if not colon else (prefix.strip().lower(),)
        if searched[0] not in PROMPTS:
            raise ParameterError(f"{socket} has {written!r}: write a word, source:word or target:word")
        hits = {prompt: occurrences(_words(edit, prompt), name if colon else written, socket) for prompt in searched}
        if not any(hits.values()):
            prompts = " or ".join(f"the {prompt} prompt, {listed(_words(edit, prompt))}" for prompt in searched)
            raise ParameterError(f"{socket}: {(name or written).strip()!r} is not in {prompts}")
        for prompt, runs in hits.items():
            found[prompt].update(place for run in runs for place in run)
    return tuple(sorted(found["source"])), tuple(sorted(found["target"]))


def _words(edit: PromptEdit, prompt: str) -> tuple[Word, ...]:
    return edit.source_words if prompt == "source" else edit.target_words
