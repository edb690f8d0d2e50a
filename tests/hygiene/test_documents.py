"""What README, CONTRIBUTING.md, CHANGELOG.md and docs/ promise: their links lead somewhere, and README stays short."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from editkit.tests.hygiene.sources import ROOT, committed, report

PAGES = [
    path
    for path in committed()
    if path.suffix == ".md" and path.parent in (ROOT, ROOT / "docs", ROOT / "hosts" / "bundled")
]
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
SECTION = re.compile(r"methods\.md, (?:sections? )?(\d+(?:\.\d+)?)")
README_WORDS = 1100
IMAGE_BYTES, IMAGES_BYTES = 60_000, 1_000_000


def anchor(heading: str) -> str:
    """GitHub's id of a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    problems = []
    for found in LINK.finditer(re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))):
        target, _, heading = (found[1] or found[2]).partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.is_file():
            problems.append(f"{page.name}: {target} does not exist")
        elif heading and heading not in {anchor(line.lstrip("#")) for line in file.read_text("utf-8").splitlines()}:
            problems.append(f"{page.name}: {target} has no heading {heading}")
    report(problems)


def test_readme_is_short_and_shows_images():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= README_WORDS
    assert text.count("<img ") >= 10


def test_images_of_the_documents_are_small_and_used():
    images = [
        path for path in committed() if path.parent in (ROOT / "docs" / "images", ROOT / "web" / "docs" / "images")
    ]
    pages = [*PAGES, *(ROOT / "web" / "docs").glob("*/en.md")]
    texts = "".join(page.read_text(encoding="utf-8") for page in pages)
    report([f"{path.name} is shown nowhere" for path in images if path.name not in texts])
    assert all(path.stat().st_size < IMAGE_BYTES for path in images)
    assert sum(path.stat().st_size for path in images) < IMAGES_BYTES


def test_drawings_are_well_formed():
    drawings = [path for path in committed() if path.suffix == ".svg"]
    assert drawings
    for path in drawings:
        assert ElementTree.parse(path).getroot().tag.endswith("svg"), path


def test_cited_sections_exist():
    """ "docs/methods.md, section 7.1" in a docstring points at a heading."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^##+ (\d+(?:\.\d+)?)", text, re.MULTILINE))
    texts = {path: path.read_text(encoding="utf-8") for path in committed() if path.suffix == ".py"}
    cited = [(path.name, found[1]) for path, text in texts.items() for found in SECTION.finditer(text)]
    assert len(cited) > 20
    report([f"{path} cites section {number}" for path, number in cited if number not in headings])


def test_contributing_names_every_file_of_a_new_method():
    from editkit.docs.new_method import changed_files, names, new_files

    values = names("edict")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    report([path for path in (*new_files(values), *changed_files(values)) if f"`{path}`" not in text])


def test_every_make_target_is_in_contributing():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    report([f"make {name}" for name in targets[1].split() if name != "install" and f"`make {name}" not in text])
