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
        about: its content, for the help text.
        trials: whether the first parameter of `main` is the number of trials of each claim.
        package: the package that holds `module`.
    """

    module: str
    about: str
    trials: bool = False
    package: str = HERE


TABLES = {
    "blended": Table("blended", "Blended Latent Diffusion: edits, ranking and background methods", trials=True),
    "thin-masks": Table("thin_masks", "thin strokes: progressive shrinking against its baselines", trials=True),
    "diffedit": Table("diffedit", "DiffEdit: masks, edits, inversion and null-text inversion", trials=True),
    "attention": Table("attention", "Prompt-to-Prompt and P2Plus: swaps, refinements, weights", trials=True),
    "style": Table("style", "StyleDiffusion: reconstructions and edits", trials=True),
    "layered": Table(
        "layered",
        "LayerDiffusion: edits of object and background, and the gain from each part of the method",
        trials=True,
    ),
}


def listing(tables: Mapping[str, Table] = TABLES) -> str:
    """The tables for a help text, one per line."""
    return "\n".join(["tables:", *(f"  {name:<16}{table.about}" for name, table in tables.items())])


def print_tables(names: Sequence[str], trials: int | None = None, tables: Mapping[str, Table] = TABLES) -> bool:
    """Print every table, also after a miss. True if every figure keeps its limit."""
    good = True
    for name in names:
        table = tables[name]
        main = import_module(f".{table.module}", table.package).main
        good &= main(trials) if table.trials and trials is not None else main()
    return good
