"""The alignment of two prompts word by word, read back from its mapper: for the report and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .prompt_edit import PromptEdit
from .words import Word

Kind = Literal["same", "replaced", "added", "removed"]


@dataclass(frozen=True)
class Group:
    """Neighbouring words of the two prompts that are aligned with each other and with no other word.

    Attributes:
        kind: same, replaced, added or removed.
        source, target: numbers of the words in `source_words` and `target_words`; one side is empty if added or removed.
        aligned: pairs (source word, target word) in which the target word receives the source word's maps.
    """

    kind: Kind
    source: tuple[int, ...]
    target: tuple[int, ...]
    aligned: tuple[tuple[int, int], ...]


def groups(edit: PromptEdit) -> list[Group]:
    """Every word of both prompts, once, in the order of the prompts."""
    sources_of = _aligned_sources(edit)
    targets_of: dict[int, list[int]] = {}
    for target, sources in enumerate(sources_of):
        for source in sources:
            targets_of.setdefault(source, []).append(target)
    found: list[Group] = []
    i = j = 0
    while i < len(edit.source_words) or j < len(sources_of):
        if i < len(edit.source_words) and i not in targets_of:
            found.append(Group("removed", (i,), (), ()))
            i += 1
        elif j < len(sources_of) and not sources_of[j]:
            found.append(Group("added", (), (j,), ()))
            j += 1
        else:
            found.append(_aligned_group(edit, sources_of, targets_of, i, j))
            i, j = i + len(found[-1].source), j + len(found[-1].target)
    return found


def report_lines(edit: PromptEdit) -> tuple[str, ...]:
    """One line for each run of words of a kind, then one for each word with options."""
    lines: list[str] = []
    last: Kind | None = None
    for group in groups(edit):
        before = " ".join(edit.source_words[i].text for i in group.source)
        after = " ".join(edit.target_words[j].text for j in group.target)
        if group.kind == last and group.kind != "replaced":
            lines[-1] += f" {after or before}"
        else:
            lines.append(f"{group.kind}: " + (f"{before} -> {after}" if group.kind == "replaced" else after or before))
        last = group.kind
    return (*lines, *_options(edit))


def word_notes(edit: PromptEdit, words: Sequence[Word], *, source: bool) -> list[tuple[str, ...]]:
    """For each word its weight ("x2"), its step range ("0-0.4"), and whether its region may change or stays."""
    blend = edit.blend_source if source else edit.blend_target
    keep = edit.keep_source if source else edit.keep_target
    notes = []
    for word in words:
        token = word.tokens[0]
        note = []
        if not source and (weight := float(edit.equalizer[token])) != 1:
            note.append(f"x{weight:g}")
        if not source and token in edit.step_ranges:
            first, last = edit.step_ranges[token]
            note.append(f"{first:g}-{last:g}")
        if token in blend:
            note.append("may change")
        if token in keep:
            note.append("stays")
        notes.append(tuple(note))
    return notes


def _options(edit: PromptEdit) -> Iterator[str]:
    for prompt, words in (("source", edit.source_words), ("target", edit.target_words)):
        for word, notes in zip(words, word_notes(edit, words, source=prompt == "source"), strict=True):
            if notes:
                yield f"{prompt} {word.label}: {', '.join(notes)}"


def _aligned_sources(edit: PromptEdit) -> list[list[int]]:
    """For each target word the source words whose maps it receives."""
    word_of = {token: number for number, word in enumerate(edit.source_words) for token in word.tokens}
    found = []
    for word in edit.target_words:
        receiving = [token for token in word.tokens if edit.alphas[token] > 0]
        source_tokens = edit.mapper[:, receiving].sum(dim=1).nonzero().flatten().tolist()
        found.append(sorted({word_of[token] for token in source_tokens if token in word_of}))
    return found


def _aligned_group(
    edit: PromptEdit, sources_of: list[list[int]], targets_of: Mapping[int, list[int]], i: int, j: int
) -> Group:
    """The smallest runs of words from source word i and target word j on that are aligned only with each other."""
    source_end, target_end = i + 1, j + 1
    while True:
        sources = {s for t in range(j, target_end) for s in sources_of[t]}
        targets = {t for s in range(i, source_end) for t in targets_of.get(s, ())}
        grown = max([source_end, *(s + 1 for s in sources)]), max([target_end, *(t + 1 for t in targets)])
        if grown == (source_end, target_end):
            break
        source_end, target_end = grown
    source, target = tuple(range(i, source_end)), tuple(range(j, target_end))
    aligned = tuple((s, t) for t in target for s in sources_of[t])
    same = len(source) == len(target) == 1 and edit.source_words[i].name == edit.target_words[j].name
    return Group("same" if same else "replaced", source, target, aligned)
