"""The page's code: its size, what it must not do, its sentences, and its own unit tests where Node is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from editkit.tests.hygiene.sources import ROOT, report

CODE = sorted((ROOT / "web" / "js").rglob("*.js"))
TESTS = sorted((ROOT / "tests" / "page").glob("*.test.mjs"))
BYTES = 60 * 1024
# Text from outside could become markup or code, and nothing may be fetched but from the server of the page.
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3\.org/2000/svg)|import\("
)


def test_the_code_is_small() -> None:
    assert sum(path.stat().st_size for path in CODE) <= BYTES


def test_no_markup_from_text_and_no_other_server() -> None:
    report(
        [
            f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}"
            for path in CODE
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if FORBIDDEN.search(line)
        ]
    )


def test_every_sentence_is_in_the_locale() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in CODE)
    written = json.loads((ROOT / "locales/en/main.json").read_text(encoding="utf-8"))["editkit"]
    said = set(re.findall(r"""\bsay\("([a-z.]+)\"""", code))
    assert said <= set(written)
    made = [re.escape(key) for key in re.findall(r"""say\(`([a-z.${}]+)`""", code)]
    patterns = [re.compile(re.sub(r"\\\$\\{\w+\\}", "[a-z]+", key)) for key in made]
    report(
        [
            f"{key} is said nowhere"
            for key in written
            if f'"{key}"' not in code and not any(pattern.fullmatch(key) for pattern in patterns)
        ]
    )


def test_units() -> None:
    """The functions without a page, under Node's own test runner."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the page's code is tested where it is")
    run = subprocess.run(
        [node, "--test", *map(str, TESTS)], capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
