"""Writes the workflow files: `python -m editkit.workflows.build [--thumbnails] [NAME ...]`.

Every workflow is described once, in `catalogue.py`, and written as "NN Title.json" for the page, whose templates have no
other name, and as api/NAME.json for the server and `editkit run`. The same description always gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .catalogue import WORKFLOWS, title

FOLDER = Path(__file__).parent
BLUEPRINTS_FOLDER = FOLDER.parent / "subgraphs"  # newer hosts read blueprints there
log = logging.getLogger("editkit")


def files(name: str) -> dict[Path, str]:
    """Both files of one workflow: path below this folder and text."""
    graph = WORKFLOWS[name]()
    return {Path(f"{title(name)}.json"): _text(graph.to_ui()), Path("api") / f"{name}.json": _text(graph.to_api())}


def checkpoint_files() -> dict[Path, str]:
    """Every template for a checkpoint: path below this folder and text. A server has no twin: its file may be missing."""
    from .checkpoints import TITLES, template

    return {Path(f"{shown}.json"): _text(template(shown).to_ui()) for shown in TITLES}


def copy_thumbnails() -> None:
    """The templates for checkpoints show what their method does with the bundled model."""
    from .checkpoints import SHOWN_BY, TITLES

    for shown, (_, method) in TITLES.items():
        shutil.copyfile(FOLDER / f"{title(SHOWN_BY[method])}.jpg", FOLDER / f"{shown}.jpg")


def blueprint_files() -> dict[Path, str]:
    """Every subgraph blueprint: path below `BLUEPRINTS_FOLDER` and text."""
    from .blueprints import BLUEPRINTS, blueprint

    return {Path(f"{name}.json"): _text(blueprint(name)) for name in BLUEPRINTS}


def _text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m editkit.workflows.build", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(WORKFLOWS)} (default: all)")
    parser.add_argument("--thumbnails", action="store_true", help="also run each workflow and draw its thumbnail")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(WORKFLOWS)
    if unknown:
        parser.error(f"no workflow {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in options.names or WORKFLOWS:
        for path, text in files(name).items():
            (FOLDER / path).parent.mkdir(exist_ok=True)
            (FOLDER / path).write_text(text, encoding="utf-8", newline="\n")
        if options.thumbnails:
            from .thumbnails import write_thumbnail

            write_thumbnail(name, FOLDER)
        log.info("%s", name)
    if options.thumbnails and not options.names:
        copy_thumbnails()
    if not options.names:
        for path, text in checkpoint_files().items():
            (FOLDER / path).write_text(text, encoding="utf-8", newline="\n")
        BLUEPRINTS_FOLDER.mkdir(exist_ok=True)
        for path, text in blueprint_files().items():
            (BLUEPRINTS_FOLDER / path).write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
