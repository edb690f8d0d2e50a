"""`python -m editkit.benchmarks blended|cost|all`: exit code 0 if every figure keeps its limit."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m editkit.benchmarks", description=__doc__)
    parser.add_argument("what", choices=["blended", "cost", "all"], nargs="?", default="all")
    parser.add_argument("--trials", type=int, default=64, help="trials of each claim (%(default)s)")
    options = parser.parse_args()
    from . import blended, cost

    good = True
    if options.what in ("cost", "all"):
        good &= cost.main()
    if options.what in ("blended", "all"):
        good &= blended.main(options.trials)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
