"""The syntax of the word widgets: entries with commas or new lines between them.

    words     circle, blue background, cat#2, source:cat
    weights   circle: 2, red: 0.5
    windows   red: 0-0.4, circle: 0.2-1, cat: 0.5

A word means each of its occurrences, cat#2 only the second cat; several words are a phrase. Where words of either prompt are
accepted, source: and target: choose one prompt. A window is a range of steps in fractions, and 0.5 is short for 0-0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ...core.errors import ParameterError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
WINDOW = re.compile(rf"(?:(?P<first>{NUMBER})\s*[-–]\s*)?(?P<last>{NUMBER})")
LARGEST_WEIGHT = 100.0


def parse_words(text: str) -> tuple[str, ...]:
    """Names with commas or new lines between them."""
    return tuple(_entries(text))


def parse_weights(text: str) -> dict[str, float]:
    """Entries such as "circle: 2". Raises ParameterError for anything else, and for a word that comes twice."""
    weights: dict[str, float] = {}
    for entry in _entries(text):
        name, value = _pair(entry, "weights", "circle: 2", weights)
        if not re.fullmatch(NUMBER, value):
            raise ParameterError(f"weights has {entry!r}: write the word, a colon and a number, as in circle: 2")
        weights[name] = float(value)
    return weights


def parse_windows(text: str) -> dict[str, tuple[float, float]]:
    """Entries such as "red: 0-0.4". Raises ParameterError for anything else, and for a word that comes twice."""
    windows: dict[str, tuple[float, float]] = {}
    for entry in _entries(text):
        name, value = _pair(entry, "windows", "red: 0-0.4", windows)
        match = WINDOW.fullmatch(value)
        if not match:
            raise ParameterError(
                f"windows has {entry!r}: write the word, a colon and two fractions of the steps, as in red: 0-0.4"
            )
        windows[name] = (float(match["first"] or 0), float(match["last"]))
    return windows


def check_weight(name: str, weight: float) -> float:
    """Raises ParameterError for a weight that is not a number from -100 to 100."""
    if not math.isfinite(weight) or abs(weight) > LARGEST_WEIGHT:
        raise ParameterError(
            f"weights: {name.strip()!r} has {weight}: give a number from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, 1 = unchanged"
        )
    return float(weight)


def check_window(name: str, window: tuple[float, float]) -> tuple[float, float]:
    """Raises ParameterError unless 0 <= first <= last <= 1."""
    first, last = window
    if not 0 <= first <= last <= 1:
        raise ParameterError(
            f"windows: {name.strip()!r} has {first:g}-{last:g}: give two fractions of the steps from 0 to 1, the smaller first"
        )
    return float(first), float(last)


def _entries(text: str) -> Iterator[str]:
    return (entry.strip() for entry in re.split(r"[,\n]", text) if entry.strip())


def _pair(entry: str, socket: str, example: str, known: dict) -> tuple[str, str]:
    name, colon, value = entry.rpartition(":")
    name = " ".join(name.split())
    if not colon or not name:
        raise ParameterError(f"{socket} has {entry!r}: write it as {example}")
    if name in known:
        raise ParameterError(f"{socket} names {name!r} twice: keep one of the two")
    return name, value.strip()
