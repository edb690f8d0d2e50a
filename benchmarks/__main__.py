"""`python -m editkit.benchmarks cost|blended|photographs|all`: exit code 0 if every figure keeps its limit."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m editkit.benchmarks", description=__doc__)
    parser.add_argument("what", choices=["cost", "blended", "photographs", "all"], nargs="?", default="all")
    parser.add_argument("--trials", type=int, default=64, help="trials of each claim of `blended` (%(default)s)")
    options = parser.parse_args()
    from . import blended, cost, photographs

    runs = {"cost": cost.main, "blended": lambda: blended.main(options.trials), "photographs": photographs.main}
    chosen = list(runs) if options.what == "all" else [options.what]
    results = [runs[name]() for name in chosen]  # every table is printed, also after a miss
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
