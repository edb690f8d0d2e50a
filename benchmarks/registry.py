"""Every table of `python -m editkit.benchmarks NAME ...`: the timings, and the claims that `editkit claims` prints."""

from __future__ import annotations

from ..headless.claims.registry import TABLES as CLAIMS
from ..headless.claims.registry import Table

HERE = __package__ or ""

TABLES = {
    **CLAIMS,
    "cost": Table("cost", "a blended edit against its bare forward passes", package=HERE),
    "photographs": Table("photographs", "whole photographs through the headless chain", package=HERE),
    "diffedit-cost": Table("diffedit_cost", "DiffEdit and inversion against their bare forward passes", package=HERE),
    "attention-cost": Table("attention_cost", "memory and time of P2Plus on a U-Net of SD 1.5's size", package=HERE),
    "batch-cost": Table("batch_cost", "what `editkit batch` adds to each edit", package=HERE),
    "decoder-cost": Table(
        "decoder_cost", "the decoder's fine-tune, published and fast, on the same edits", package=HERE
    ),
    "elimination": Table(
        "elimination", "best result of a batch of 24, all run to the end or the best third", package=HERE
    ),
    "style-cost": Table("style_cost", "StyleDiffusion's inversion against its bare passes", package=HERE),
}
