"""`python -m editkit.benchmarks NAME ...`: exit code 0 if every figure keeps its limit."""

from __future__ import annotations

import argparse
import sys

from ..headless.claims.registry import print_tables
from .registry import TABLES


def main() -> int:
    about = "; ".join(f"{name}: {table.about}" for name, table in TABLES.items())
    parser = argparse.ArgumentParser(prog="python -m editkit.benchmarks", description=__doc__, epilog=about)
    parser.add_argument("what", choices=[*TABLES, "all"], nargs="*", default=["all"], metavar="NAME")
    parser.add_argument("--trials", type=int, help="trials of each claim (default: the table's own)")
    options = parser.parse_args()
    names = list(TABLES) if "all" in options.what else options.what
    return 0 if print_tables(names, options.trials, TABLES) else 1


if __name__ == "__main__":
    sys.exit(main())
