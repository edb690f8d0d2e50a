"""What may not stand in a committed file, whatever its kind."""

from __future__ import annotations

import re

import pytest

from editkit.tests.hygiene.sources import ROOT, committed, report

TEXT = {".cfg", ".css", ".html", ".js", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}
# Somebody's own folders: they exist on one machine only.
OWN_PATH = re.compile(r"(?<![\w./:*-])(?:/(?:home|root|Users|work|mnt|opt|tmp)/[\w.-]+|[A-Z]:\\{1,2}Users\\)")
CONFLICT = re.compile(r"^(?:<{7} |>{7} |={7}$)", re.MULTILINE)
UNSAFE_WEIGHTS = {".bin", ".ckpt", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth"}
BUNDLED_BYTES = 28_000_000


def texts() -> list[tuple[str, str]]:
    files = [path for path in committed() if path.suffix in TEXT]
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def test_there_are_texts():
    assert len(texts()) > 50


@pytest.mark.parametrize("pattern", [OWN_PATH, CONFLICT], ids=["own path", "merge conflict"])
def test_no(pattern):
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1} {match.group()!r}"
        for name, text in texts()
        for match in pattern.finditer(text)
    ]
    report(found)


def test_own_paths_are_noticed():
    for text in ("open('" + "/ho" + "me/someone/x.png')", "at " + "/wo" + "rk/main", "C:" + "\\Users\\x"):
        assert OWN_PATH.search(text), text
    for text in ("/usr/share/common-licenses", "https://host/home/page", "web/root/x", "src/tmp/file"):
        assert not OWN_PATH.search(text), text


def test_texts_end_with_one_line_break_and_have_no_others():
    wrong = [
        name for name, text in texts() if text and (not text.endswith("\n") or text.endswith("\n\n") or "\r" in text)
    ]
    report([name for name in wrong if not name.endswith(".json")])


def test_weights_are_safetensors():
    report([str(path) for path in committed() if path.suffix in UNSAFE_WEIGHTS])


def test_bundled_files_are_at_most_28_mb():
    bundled = [path for path in committed() if path.is_relative_to(ROOT / "hosts" / "bundled")]
    assert any(path.suffix == ".safetensors" for path in bundled)
    assert sum(path.stat().st_size for path in bundled) <= BUNDLED_BYTES


def test_no_cache_or_output_is_committed():
    forbidden = {"__pycache__", "build", "dist", "output", ".venv", ".hypothesis", ".mypy_cache", ".pytest_cache"}
    report([str(path) for path in committed() if set(path.relative_to(ROOT).parts) & forbidden])
