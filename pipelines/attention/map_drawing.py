"""Drawings of cross-attention maps: the chosen words, the chosen steps, and one labelled heat map for each word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError
from ..evaluation.drawing import sheet
from .prompts.widget_syntax import parse_words
from .prompts.words import Word, missing, occurrences
from .step_ranges import check_fraction

TILE = 256  # pixels


def chosen_words(words: Sequence[Word], names: str, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
    """Label and tokens of the words that `names` lists, separated by commas; of every word if it is empty.

    Args:
        prompt: what the prompt is called in messages.
    Raises: ParameterError for a word that the prompt does not have, or for a prompt without words.
    """
    if not words:
        raise ParameterError(f"the {prompt} prompt has no words to show maps of: choose the other prompt")
    if not names.strip():
        return [(word.label, word.tokens) for word in words]
    chosen = []
    for name in parse_words(names):
        places = occurrences(words, name, "words")
        if not places:
            raise missing(words, name, "words", prompt)
        chosen.append((name.strip(), tuple(token for place in places for token in place)))
    return chosen


def spread_steps(steps: int, count: int, start: float, end: float) -> list[int]:
    """At most `count` of `steps` steps, evenly spread from `start` to `end`, the first and the last included.

    Args:
        steps: the number of steps of the whole grid, at least 1.
        count: how many to choose, at least 1.
        start, end: fractions of the steps, 0 (the first step) to 1 (the last).
    Returns: numbers of steps from 0, rising; at most `count`, and fewer where the range has fewer steps.
    Raises: ParameterError for fractions outside 0 to 1, or a start after the end.
    """
    first = round(check_fraction("start", start) * (steps - 1))
    last = round(check_fraction("end", end) * (steps - 1))
    if last < first:
        raise ParameterError(f"start is {start} and end is {end}: start must not lie behind end")
    count = min(count, last - first + 1)
    return [first] if count == 1 else [first + round(i * (last - first) / (count - 1)) for i in range(count)]


def normalised(maps: Tensor) -> Tensor:
    """Each map [..., h, w] divided by its maximum."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12)


def picked_maps(maps: Tensor, labels: Sequence[str], picked: str, size: tuple[int, int]) -> Tensor:
    """A MASK [B, H, W] of one or several words: the largest of their maps, each divided by its peak.

    Args:
        maps: [B, words, h, w].
        labels: one per word.
        picked: labels separated by commas, without regard to case; empty = the first word.
        size: height and width of the mask, in pixels.
    Returns: float32 [B, H, W], 0 to 1.
    Raises: ParameterError for a label that no map has.
    """
    known = {label.casefold(): number for number, label in reversed(list(enumerate(labels)))}
    names = parse_words(picked) or (labels[0],)
    unknown = [name for name in names if name.casefold() not in known]
    if unknown:
        raise ParameterError(f"picked has {unknown[0]!r}, which has no map: choose from {', '.join(labels)}")
    chosen = normalised(maps)[:, [known[name.casefold()] for name in names]]
    mask = chosen.amax(1, keepdim=True)
    return F.interpolate(mask, size=size, mode="bilinear")[:, 0].clamp(0, 1)


def map_images(maps: Tensor, labels: Sequence[str], image: Tensor | None = None) -> Tensor:
    """An IMAGE [B * words, H, W, 3]: one labelled heat map per word, image by image.

    Args:
        maps: [B, words, h, w], shares of the attention.
        labels: one per word; the map's maximum is written behind it.
        image: IMAGE [B or 1, H, W, 3] under the heat.
    """
    pages = []
    for b, words in enumerate(maps.cpu()):
        under = None if image is None else image[b % len(image)].cpu()
        for label, heat in zip(labels, words, strict=True):
            tile = heat_over(normalised(heat), under)
            pages.append(sheet([(f"{label}   (at most {float(heat.max()):.1%})", tile)], columns=1, tile=TILE))
    return torch.cat(pages)


def heat_over(heat: Tensor, image: Tensor | None) -> Tensor:
    """Heat [h, w] from 0 to 1 in black, red, yellow and white, [h, w, 3]; or over a grey image, most opaque where hottest."""
    if image is None:
        return (heat[..., None] * 3 - torch.arange(3)).clamp(0, 1)
    heat = F.interpolate(heat[None, None], size=image.shape[:2], mode="bilinear")[0, 0]
    grey = image.mean(-1, keepdim=True).expand_as(image)
    return torch.lerp(grey, heat_over(heat, None), 0.8 * heat[..., None])
