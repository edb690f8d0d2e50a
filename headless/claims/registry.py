"""The tables of claims that can be printed: `editkit claims NAME ...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

HERE = __package__ or ""


@dataclass(frozen=True)
class Table:
    """A module whose `main` prints a table and returns whether every figure keeps its limit.

    Attributes:
        module: its name in `package`.
        about: what it shows, for the help text.
        trials: whether `main` takes the number of trials of each claim.
        package: where it lies.
    """

    module: str
    about: str
    trials: bool = False
    package: str = HERE


TABLES = {
    "blended": Table("blended", "blended edits, ranking and background methods", trials=True),
    "diffedit": Table("diffedit", "masks, inversion and null-text", trials=True),
    "attention": Table("attention", "attention control: swaps, refinements, weights", trials=True),
    "style": Table("style", "StyleDiffusion: reconstructions and edits", trials=True),
    "layered": Table("layered", "LayerDiffusion: two-part edits, and what each part of the method adds", trials=True),
}


def print_tables(names: Sequence[str], trials: int | None = None, tables: Mapping[str, Table] = TABLES) -> bool:
    """Print every table, also after a miss. True if every figure keeps its limit."""
    good = True
    for name in names:
        table = tables[name]
        main = import_module(f".{table.module}", table.package).main
        good &= main(trials) if table.trials and trials is not None else main()
    return good
