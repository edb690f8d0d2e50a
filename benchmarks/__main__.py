"""`python -m editkit.benchmarks NAME ...`: exit code 0 if every figure keeps its limit."""

from __future__ import annotations

import argparse
import sys

from ..headless.claims.registry import listing, print_tables
from .registry import TABLES


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m editkit.benchmarks",
        description="Print timings and claims, measured on this machine. Exit code 0 if every figure keeps its limit.",
        epilog=listing(TABLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", choices=[*TABLES, "all"], nargs="*", default=["all"], metavar="NAME", help="tables (default: all)"
    )
    parser.add_argument("--trials", type=int, help="trials of each claim (default: the table's own number)")
    options = parser.parse_args()
    names = list(TABLES) if "all" in options.names else options.names
    return 0 if print_tables(names, options.trials, TABLES) else 1


if __name__ == "__main__":
    sys.exit(main())
