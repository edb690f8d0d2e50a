"""`editkit batch`: its arguments, its checks and its progress."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.core.errors import LoadError, ParameterError

if TYPE_CHECKING:
    from .loop import Tally

SHIPPED = Path(__file__).resolve().parents[2] / "workflows" / "api"
ABOUT = """\
Run a workflow once for every line of a manifest. A line is a JSON object; every key may be left out:

  image, mask            files below the manifest's folder (or --input); bright or transparent pixels are the mask
  prompt, source_prompt, negative
                         texts of the nodes "Target prompt", "Source prompt", "Negative prompt", or of Align Prompts
  seed                   of every node that draws noise
  overrides              {"title or id of a node": {"input": value}}
  id                     a text or number of yours, copied into the record

Each line has one record in results.jsonl: its files, its metrics, or why it failed. An interrupted run continues with the
same command. Put lines of one image next to each other: they share its encoding and inversion.
"""
CLEARED = "        "  # what is left of a longer line of progress
EVERY = 20.0  # seconds between two lines of progress where standard error is not a terminal


def add_batch(commands: Any) -> None:
    """Add `editkit batch` to the commands of a parser."""
    parser = commands.add_parser(
        "batch",
        help="run a workflow for every line of a manifest; resumable",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, help="a file of JSON lines")
    parser.add_argument(
        "--workflow", required=True, help="a shipped workflow, for example blended_edit, or an API-format JSON file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and edits/")
    parser.add_argument("--input", type=Path, help="folder of images and masks (default: the manifest's folder)")
    parser.set_defaults(run=batch_command)


def batch_command(options: argparse.Namespace) -> int:
    """`editkit batch`: exit code 0 if every line has a record, also of a failure. Raises EditError."""
    from ..arguments import check_input
    from ..runner import load_host, read_workflow
    from .loop import run_batch
    from .manifest import read_lines
    from .workflow_edit import WorkflowEdit

    workflow = read_workflow(workflow_path(options.workflow))
    check_input(options.input)
    progress = Progress(sum(1 for _ in read_lines(options.manifest)))
    load_host()
    edit = WorkflowEdit(workflow, options.input or options.manifest.parent)
    tally = run_batch(read_lines(options.manifest), options.out, edit, workflow=_identity(workflow), progress=progress)
    progress.end(tally)
    print(f"{tally.edited} edited, {tally.failed} failed, {tally.skipped} done before: {options.out / 'results.jsonl'}")
    return 0


def workflow_path(name: str) -> Path:
    """The file of a shipped workflow's name, or the path itself. Raises ParameterError for another name."""
    path = Path(name)
    if path.suffix == ".json":
        return path
    names = sorted(found.stem for found in SHIPPED.glob("*.json"))
    if name not in names:
        raise ParameterError(f"--workflow is {name!r}: give a JSON file or one of {', '.join(names)}")
    return SHIPPED / f"{name}.json"


def _identity(workflow: Mapping[str, Any]) -> str:
    return json.dumps(workflow, sort_keys=True)


class Progress:
    """How many lines are done, and the time left at the pace of this run, on standard error."""

    def __init__(self, total: int) -> None:
        """Begin to count towards `total` lines. Raises LoadError if there are none."""
        if total == 0:
            raise LoadError("the manifest has no lines: give one JSON object per line")
        self.total = total
        self.begun = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else EVERY):
            return
        self.shown = now
        print(self.line(tally, now - self.begun), end="" if self.live else "\n", file=sys.stderr, flush=True)

    def line(self, tally: Tally, seconds: float) -> str:
        """The progress after `seconds` of this run."""
        worked = tally.edited + tally.failed
        left = f", {_duration(seconds / worked * (self.total - tally.done))} left" if worked else ""
        failed = f", {tally.failed} failed" if tally.failed else ""
        return f"{chr(13) if self.live else ''}batch: {tally.done}/{self.total}{failed}{left}" + CLEARED * self.live

    def end(self, tally: Tally) -> None:
        """Close the line of a terminal and say how long the run took."""
        spent = _duration(time.monotonic() - self.begun)
        print(f"{chr(10) if self.live else ''}batch: {tally.done}/{self.total} in {spent}", file=sys.stderr)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
