"""What an alignment does to each word, read back from its mapper: for the report and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .prompt_edit import PromptEdit
from .words import Word

Kind = Literal["same", "replaced", "added", "removed"]


@dataclass(frozen=True)
class Group:
    """Words of the two prompts that belong together, in the order of the prompts.

    Attributes:
        kind: what became of them.
        source, target: numbers of the words in `source_words` and `target_words`; one side is empty if added or removed.
        links: pairs of such numbers whose maps serve each other.
    """

    kind: Kind
    source: tuple[int, ...]
    target: tuple[int, ...]
    links: tuple[tuple[int, int], ...]


def groups(edit: PromptEdit) -> list[Group]:
    """Every word of both prompts, once; what replaced what is one group."""
    served = _served(edit)
    used = {i for partners in served for i in partners}
    found: list[Group] = []
    i = j = 0
    while i < len(edit.source_words) or j < len(served):
        if i < len(edit.source_words) and i not in used:
            found.append(Group("removed", (i,), (), ()))
            i += 1
        elif j < len(served) and not served[j]:
            found.append(Group("added", (), (j,), ()))
            j += 1
        else:
            found.append(_linked(edit, served, i, j))
            i, j = i + len(found[-1].source), j + len(found[-1].target)
    return found


def report_lines(edit: PromptEdit) -> tuple[str, ...]:
    """One line for each run of words of a kind, then one for each option of a word."""
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
    """For each word its weight ("x2"), its window ("0-0.4"), and whether its place may change or must stay."""
    blend, keep = (
        (edit.blend_source, edit.keep_source) if source else (edit.blend_target, edit.keep_target)
    )  # fmt: skip
    notes = []
    for word in words:
        first = word.tokens[0]
        scale, window = (1.0, None) if source else (float(edit.scale[first]), edit.windows.get(first))
        note = [] if scale == 1 else [f"x{scale:g}"]
        note += [] if window is None else [f"{window[0]:g}-{window[1]:g}"]
        note += ["may change"] * (first in blend) + ["stays"] * (first in keep)
        notes.append(tuple(note))
    return notes


def _options(edit: PromptEdit) -> Iterator[str]:
    for prompt, words in (("source", edit.source_words), ("target", edit.target_words)):
        for word, notes in zip(words, word_notes(edit, words, source=prompt == "source"), strict=True):
            if notes:
                yield f"{prompt} {word.label}: {', '.join(notes)}"


def _served(edit: PromptEdit) -> list[list[int]]:
    """For each target word the source words whose maps it gets."""
    owner = {place: number for number, word in enumerate(edit.source_words) for place in word.tokens}
    found = []
    for word in edit.target_words:
        open_tokens = [place for place in word.tokens if edit.gate[place] > 0]
        rows = edit.mapper[:, open_tokens].sum(dim=1).nonzero().flatten().tolist()
        found.append(sorted({owner[row] for row in rows if row in owner}))
    return found


def _linked(edit: PromptEdit, served: list[list[int]], i: int, j: int) -> Group:
    """The smallest runs of words from i and j on that nothing links with a word outside."""
    ends = [i + 1, j + 1]
    while True:
        source = {s for t in range(j, ends[1]) for s in served[t]}
        target = {t for t, partners in enumerate(served) if any(i <= s < ends[0] for s in partners)}
        grown = [max([ends[0], *(s + 1 for s in source)]), max([ends[1], *(t + 1 for t in target)])]
        if grown == ends:
            break
        ends = grown
    first, second = tuple(range(i, ends[0])), tuple(range(j, ends[1]))
    links = tuple((s, t) for t in second for s in served[t])
    same = len(first) == len(second) == 1 and edit.source_words[i].name == edit.target_words[j].name
    return Group("same" if same else "replaced", first, second, links)
