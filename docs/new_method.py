"""Templates of everything that a new method needs: `python -m editkit.docs.new_method NAME`, or `make new METHOD=NAME`.

CONTRIBUTING.md, "Add a method in a day", lists the files. The templates run and pass all tests as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ..locales.build import HEADINGS

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "templates"
NEW_FILES = {
    "pipelines/@method@.py": "pipeline.py.txt",
    "nodes/@method@.py": "node.py.txt",
    "workflows/@method@.py": "workflow.py.txt",
    "tests/laws/test_@method@.py": "law.py.txt",
}
HELP = "web/docs/EditKit_@Method@/en.md"


class Refused(Exception):
    """Nothing was written, and why."""


def names(method: str) -> dict[str, str]:
    """What the placeholders of the templates become. Raises Refused for a name that cannot be a module's."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", method):
        raise Refused(f"METHOD is {method!r}: give a name in small letters, such as edict or constant_negative")
    words = method.split("_")
    return {
        "@method@": method,
        "@Method@": "".join(word.capitalize() for word in words),
        "@title@": " ".join(word.capitalize() for word in words),
        "@section@": f"11.{len(re.findall(r'^### 11[.]', read('docs/methods.md'), re.MULTILINE)) + 1}",
    }


def filled(text: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def template(name: str, values: Mapping[str, str]) -> str:
    return filled((TEMPLATES / name).read_text(encoding="utf-8"), values)


def new_files(values: Mapping[str, str]) -> dict[str, str]:
    """Path and text of every file that is created. Raises Refused if one exists."""
    files = {filled(path, values): template(name, values) for path, name in NEW_FILES.items()}
    body = {"Paper": "Authors: *Title*, year.\n", "Inputs": "", "Outputs": ""}
    sections = (f"## {heading}\n\n{body.get(heading, f'To be written.{chr(10)}')}" for heading in HEADINGS)
    files[filled(HELP, values)] = f"# {values['@title@']}\n\n" + "\n".join(sections)
    for path in files:
        if (ROOT / path).exists():
            raise Refused(f"{path} exists: choose another METHOD")
    return files


def replaced(path: str, pattern: str, change: Callable[[re.Match[str]], str]) -> str:
    """The file's text with the first match changed. Raises Refused where there is none."""
    text, count = re.subn(pattern, change, read(path), count=1, flags=re.MULTILINE | re.DOTALL)
    if not count:
        raise Refused(f"{path} has no place for the method ({pattern!r}): add it by hand, as CONTRIBUTING.md says")
    return text


def public_names(method: str, camel: str) -> str:
    """`pipelines/__init__.py` with the function and its options; ruff sorts them afterwards."""
    text = read("pipelines/__init__.py")
    text = text.replace(
        "if TYPE_CHECKING:\n", f"if TYPE_CHECKING:\n    from .{method} import {camel}Options, {method}\n"
    )
    text = text.replace("__all__ = [\n", f'__all__ = [\n    "{camel}Options",\n    "{method}",\n')
    return text.replace("_HOMES = {\n", f'_HOMES = {{\n    ".{method}": "{camel}Options {method}",\n')


def changed_files(values: Mapping[str, str]) -> dict[str, str]:
    """Path and new text of every file that registers the method."""
    method, title = values["@method@"], values["@title@"]
    return {
        "pipelines/__init__.py": public_names(method, values["@Method@"]),
        "nodes/extension.py": replaced(
            "nodes/extension.py", r"^from \. import ([^\n]*)(.*?^MODULES = \(.*?)^\)",
            lambda found: f"from . import {found[1]}, {method}{found[2]}    {method},\n)",
        ),
        "workflows/catalogue.py": replaced(
            "workflows/catalogue.py", r"^from \. import ([^\n]*)(.*?for module in \([^)]*)\)",
            lambda found: f"from . import {found[1]}, {method}{found[2]}, {method})",
        ),
        "tests/workflows/test_files.py": replaced(
            "tests/workflows/test_files.py", r"^(PROMISED = \{.*?)^\}", lambda found: f'{found[1]}    "{method}",\n}}'
        ),
        "docs/methods.md": replaced(
            "docs/methods.md", r"^## 12\. ", lambda found: template("section.md.txt", values) + "\n" + found[0]
        ),
        "docs/python.md": read("docs/python.md") + template("example.md.txt", values),
        "CHANGELOG.md": replaced(
            "CHANGELOG.md", r"^## \[Unreleased\]\n.*?^### Added\n", lambda found: f"{found[0]}- {title}: what it is for.\n"
        ),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Write everything, or nothing; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        values = names(given[0] if given else "")
        created = new_files(values)
        files = created | changed_files(values)
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for path, text in files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8", newline="\n")
        sys.stdout.write(f"{'new    ' if path in created else 'changed'} {path}\n")
    python = [str(ROOT / path) for path in files if path.endswith(".py")]
    for command in (["format", "--quiet"], ["check", "--quiet", "--fix"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *python], check=True, cwd=ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
