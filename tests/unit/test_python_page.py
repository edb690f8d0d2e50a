"""Every example of docs/python.md runs on the bundled model."""

from __future__ import annotations

import re

import pytest

from editkit.tests.hygiene.sources import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^## (?P<title>.*)\n(?P<body>(?:(?!^## ).*\n?)*)", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, list[str]]:
    """The Python blocks below each heading."""
    return {found["title"]: BLOCK.findall(found["body"]) for found in EXAMPLE.finditer(PAGE)}


SET_UP, *TITLES = examples()


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What the first example defines and every other one uses."""
    namespace: dict[str, object] = {}
    exec(compile("".join(examples()[SET_UP]), "docs/python.md: Set up", "exec"), namespace)
    return namespace


def test_there_are_examples():
    assert SET_UP == "Set up" and len(TITLES) >= 10
    assert all(examples().values())


@pytest.mark.parametrize("title", TITLES)
def test_example(title, names):
    namespace = dict(names)
    for number, block in enumerate(examples()[title], 1):
        exec(compile(block, f"docs/python.md: {title}, {number}", "exec"), namespace)
