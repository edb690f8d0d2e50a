"""What `editkit batch` adds to each edit: its time and memory over a manifest whose edits do nothing.

`python -m editkit.benchmarks batch-cost` prints it.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from pathlib import Path

from ..headless.batch.loop import Edit, Tally, run_batch
from ..headless.batch.manifest import Line, read_lines

LINES, FEW = 10_000, 1000
MOST_MS, MOST_BYTES = 20.0, 100_000


def main() -> bool:
    """Print the table; True if the overhead of a line and the growth of memory keep their limits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "manifest.jsonl"
        path.write_text("".join(f'{{"id": {number}, "seed": {number}}}\n' for number in range(LINES)), encoding="utf-8")
        bare = _timed(path, folder / "no_files", lambda line, draft: {})
        written = _timed(path, folder / "files", _one_file)
        again = _timed(path, folder / "files", _one_file)
        few, many = _held(path, folder / "held")
    print(f"editkit batch, {LINES} lines, an edit that does nothing")
    print(f"  per line, no file             {bare:8.3f} ms")
    print(f"  per line, one file of a byte  {written:8.3f} ms (at most {MOST_MS:g})")
    print(f"  per line that is done already {again:8.3f} ms")
    print(f"  memory that is held           {few / 1000:8.1f} kB after {FEW} lines, {many / 1000:.1f} kB after {LINES}")
    return written <= MOST_MS and many - few <= MOST_BYTES


def _one_file(line: Line, draft: Path) -> dict[str, object]:
    (draft / "image.png").write_bytes(b"x")
    return {}


def _timed(path: Path, out: Path, edit: Edit) -> float:
    """Milliseconds per line."""
    begun = time.perf_counter()
    run_batch(read_lines(path), out, edit)
    return 1000 * (time.perf_counter() - begun) / LINES


def _held(path: Path, out: Path) -> tuple[int, int]:
    """The bytes of Python objects of the loop after a few lines, and after all."""
    held: dict[int, int] = {}

    def note(tally: Tally) -> None:
        if tally.done in (FEW, LINES):
            held[tally.done] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    run_batch(read_lines(path), out, lambda line, draft: {}, progress=note)
    tracemalloc.stop()
    return held[FEW], held[LINES]
