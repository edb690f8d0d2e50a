"""The workflows that ship with EditKit, in the order of the page's templates. All use the bundled model."""

from __future__ import annotations

import re
from collections.abc import Callable

from . import attention, blended, flow, inversion, layered, style
from .graph import Graph

WORKFLOWS: dict[str, Callable[[], Graph]] = {
    make.__name__: make for module in (blended, inversion, attention, layered, style, flow) for make in module.WORKFLOWS
}
NAMES = {
    "diffedit": "DiffEdit",
    "sdedit": "SDEdit",
    "p2p": "P2P",
    "p2plus": "P2Plus",
    "masactrl": "MasaCtrl",
    "differential diffusion": "Differential Diffusion",
    "flow edit": "FlowEdit",
}


def title(name: str) -> str:
    """What the page calls a template, which is its file's name: a number for the order, then words."""
    number = list(WORKFLOWS).index(name) + 1
    words = name.replace("_", " ")
    for written, shown in NAMES.items():
        words = re.sub(rf"\b{written}\b", shown, words)
    return f"{number:02d} {words[0].upper()}{words[1:]}"
