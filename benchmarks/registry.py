"""The tables that can be printed: `python -m editkit.benchmarks NAME ...`; the claims of the product are among them."""

from __future__ import annotations

from ..headless.claims.registry import TABLES as CLAIMS
from ..headless.claims.registry import Table

HERE = __package__ or ""

TABLES = {
    **CLAIMS,
    "cost": Table("cost", "a blended edit against its bare network rows", package=HERE),
    "photographs": Table("photographs", "whole photographs through the headless chain", package=HERE),
    "diffedit-cost": Table("diffedit_cost", "DiffEdit and inversion against their bare network rows", package=HERE),
    "attention-cost": Table("attention_cost", "memory and time of P2Plus on a U-Net of SD 1.5's size", package=HERE),
    "style-cost": Table("style_cost", "StyleDiffusion's learning against its floor", package=HERE),
}
