"""The tables that can be printed: `python -m editkit.benchmarks NAME` and `editkit claims NAME ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Table:
    """A module of this folder whose `main` prints a table and returns whether every figure keeps its limit.

    Attributes:
        module: its name.
        about: what it shows, for the help text.
        trials: whether `main` takes the number of trials of each claim.
    """

    module: str
    about: str
    trials: bool = False


TABLES = {
    "cost": Table("cost", "a blended edit against its bare network rows"),
    "blended": Table("blended", "blended edits, ranking and background methods", trials=True),
    "photographs": Table("photographs", "whole photographs through the headless chain"),
    "diffedit": Table("diffedit", "masks, inversion and null-text", trials=True),
    "diffedit-cost": Table(
        "diffedit_cost", "DiffEdit and inversion against their bare network rows and the published flow"
    ),
    "attention": Table("attention", "attention control: swaps, refinements, weights", trials=True),
    "attention-cost": Table("attention_cost", "memory and time of P2Plus on a U-Net of Stable Diffusion 1.5's size"),
    "style": Table("style", "StyleDiffusion: reconstructions and edits", trials=True),
    "layered": Table("layered", "LayerDiffusion: two-part edits, and what each part of the method adds", trials=True),
    "style-cost": Table("style_cost", "StyleDiffusion's learning against its floor and the published scheme"),
}


def print_tables(names: Sequence[str], trials: int | None = None) -> bool:
    """Print every table, also after a miss. True if every figure keeps its limit."""
    good = True
    for name in names:
        table = TABLES[name]
        main = import_module(f".{table.module}", __package__).main
        good &= main(trials) if table.trials and trials is not None else main()
    return good
