"""The loop of a batch: edit every line that has no record, put its files in place, then append its record."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipelines.core.errors import EditError, ParameterError
from .manifest import Line
from .records import Records

log = logging.getLogger("editkit")

EDITS, DRAFT = "edits", ".draft"  # below the folder of a batch
# An edit writes its files below the folder that it is given, and returns more entries of the record.
Edit = Callable[[Line, Path], dict[str, Any]]


@dataclass
class Tally:
    """How far a batch is.

    Attributes:
        edited: lines with a result, made by this run.
        failed: lines without one, in this run.
        skipped: lines that an earlier run finished.
    """

    edited: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def done(self) -> int:
        """Lines with a record."""
        return self.edited + self.failed + self.skipped


def run_batch(
    lines: Iterable[Line],
    folder: Path,
    edit: Edit,
    *,
    workflow: str = "",
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Edit every line once.

    Args:
        lines: of the manifest, in its order; taken one at a time.
        folder: for `results.jsonl` and `edits/`; what an earlier run finished there is skipped.
        edit: makes the edit of a line.
        workflow: a text that changes with the workflow, so that the results of two workflows are not mixed.
        progress: called after each line.
    Returns: how many lines were edited, failed and skipped.
    Raises: LoadError where the folder holds the results of other lines, ParameterError where it cannot be written.
    """
    tally = Tally()
    with Records(folder, workflow) as records:
        for line in lines:
            if records.finished(line):
                tally.skipped += 1
            elif _edit_line(line, folder, edit, records):
                tally.edited += 1
            else:
                tally.failed += 1
            if progress is not None:
                progress(tally)
    return tally


def _edit_line(line: Line, folder: Path, edit: Edit, records: Records) -> bool:
    """Whether the line was edited; its files and its record are in place then."""
    begun = time.monotonic()
    draft = folder / DRAFT
    about: dict[str, Any] = {"ok": True, "error": None}
    entries: dict[str, Any] = {}
    files: list[str] = []
    try:
        _remove(draft)  # of a process that was killed
        draft.mkdir()
        entries = _attempt(line, draft, edit, about)
        if about["ok"]:
            files = _put_in_place(draft, folder / EDITS / f"{line.number:06d}", folder)
        _remove(draft)
        about |= {"seconds": round(time.monotonic() - begun, 3), "edit": _described(line), "files": files, **entries}
        records.append(line, about)
    except OSError as error:
        raise ParameterError(
            f"--out is {str(folder)!r}, which cannot be written ({error}): make room and run again"
        ) from error
    return bool(about["ok"])


def _attempt(line: Line, draft: Path, edit: Edit, about: dict[str, Any]) -> dict[str, Any]:
    """The entries of the edit; where it fails, `about` says why and nothing is raised."""
    try:
        return edit(line, draft)
    except EditError as error:
        reason = f"{type(error).__name__}: {error}"
    except Exception as error:  # one line of thousands must not stop the others
        log.exception("line %d failed unexpectedly", line.number)
        reason = f"{type(error).__name__}: {error}"
    about.update(ok=False, error=reason)
    return {}


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _described(line: Line) -> dict[str, Any] | None:
    """The line's fields for its record; None if it has none that can be read."""
    try:
        return line.fields()
    except ParameterError:
        return None


def _put_in_place(draft: Path, target: Path, folder: Path) -> list[str]:
    """Move the folder of a finished edit to its place in one step; its files, relative to `folder`."""
    found = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    _remove(target)  # of a process that was killed before it wrote the record
    if found:
        target.parent.mkdir(exist_ok=True)
        draft.rename(target)
    return [(target.relative_to(folder) / path).as_posix() for path in found]
