"""The results file of a batch: one record per finished line of the manifest, in the manifest's order.

A record is appended after the line's files are in place, so a process that is killed has finished all lines up to the last
whole record. The order makes resuming a walk along both files, which keeps nothing in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ...pipelines.core.errors import LoadError, ParameterError
from ..edit_folder import finite
from .manifest import Line

RESULTS = "results.jsonl"
BLOCK = 65536  # bytes read at once while the end of the last whole record is sought


class Records:
    """The records of a folder; a context manager that holds the folder's lock."""

    def __init__(self, folder: Path, workflow: str) -> None:
        """Prepare the records of `folder`; `workflow` is the text that digests are made with."""
        self.path = folder / RESULTS
        self.workflow = workflow
        self._earlier: Iterator[dict[str, Any]] = iter(())

    def __enter__(self) -> Records:
        """Lock the file, cut off a torn record, and begin to read. Raises ParameterError where that is impossible."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
            lock(self._file)
            self._file.truncate(whole_records(self._file))
        except OSError as error:
            raise ParameterError(f"--out is {str(self.path.parent)!r}, which cannot be written ({error})") from error
        self._earlier = read_records(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finished(self, line: Line) -> bool:
        """Whether the next earlier record is that of `line`. Raises LoadError if it belongs to another line."""
        record = next(self._earlier, None)
        if record is None:
            return False
        if (record.get("line"), record.get("digest")) != (line.number, line.digest(self.workflow)):
            raise LoadError(
                f"{self.path} has a record of line {record.get('line')} where the manifest has line {line.number}, or the"
                " line or the workflow has changed: give another folder to --out"
            )
        return True

    def append(self, line: Line, about: Mapping[str, Any]) -> None:
        """Write the record of a line, all of it or a torn end that the next run cuts off. Raises OSError."""
        record = {"line": line.number, "digest": line.digest(self.workflow), **about}
        text = json.dumps(finite(record), ensure_ascii=True, allow_nan=False) + "\n"
        self._file.write(text.encode())
        self._file.flush()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a results file, one at a time. Raises LoadError for a line that is none."""
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                record = json.loads(content)
            except ValueError as error:
                raise LoadError(f"{path}, line {number}, is no record ({error}): remove the line") from error
            if not isinstance(record, dict):
                raise LoadError(f"{path}, line {number}, is no record: remove the line")
            yield record


def whole_records(file: BinaryIO) -> int:
    """The bytes up to the last newline: a record without one was torn by the end of its process."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - BLOCK)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def lock(file: BinaryIO) -> None:
    """Refuse a second process on the same file; where the system has no such locks, there is none. Raises ParameterError."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ParameterError(f"another batch is writing {file.name}: wait for it, or give another folder") from error
    except OSError:  # a file system without locks
        return
