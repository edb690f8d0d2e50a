"""The folder of an edit holds the files of one run, also where several runs write to it at once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from editkit.headless import edit_folder


def files_of(run: int) -> edit_folder.Files:
    """The files of a run with run + 1 candidates, each with the run's number in it."""
    names = ["result.png", *(f"candidate_{index:02d}.png" for index in range(1, run + 2))]
    report = json.dumps({"run": run, "files": [*names, edit_folder.REPORT]})
    files: edit_folder.Files = {name: lambda path: path.write_text(str(run), encoding="utf-8") for name in names}
    return {**files, edit_folder.REPORT: lambda path: path.write_text(report, encoding="utf-8")}


def test_runs_into_one_folder_do_not_mix_their_files(tmp_path, monkeypatch):
    """The second run comes while the first has moved half of its files."""
    replace, half, done = Path.replace, threading.Event(), threading.Event()

    def stopping(path: Path, target: Path) -> Path:
        if path.name == "candidate_02.png" and path.read_text(encoding="utf-8") == "3":
            half.set()
            done.wait(0.5)  # the second run is done before, unless it has to wait for the first
        return replace(path, target)

    def second() -> None:
        half.wait()
        edit_folder._write(tmp_path, files_of(5))
        done.set()

    monkeypatch.setattr(Path, "replace", stopping)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(edit_folder._write, tmp_path, files_of(3)), pool.submit(second)]
        assert [run.result() for run in runs] == [None, None]
    report = json.loads((tmp_path / edit_folder.REPORT).read_text(encoding="utf-8"))
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert set(written) == set(report["files"])
    assert {text for name, text in written.items() if name != edit_folder.REPORT} == {str(report["run"])}
