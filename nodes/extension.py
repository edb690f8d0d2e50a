"""Every node of the pack, and the extension that hands them to ComfyUI."""

from __future__ import annotations

from . import background, blending, images, loaders, masks, ranking
from ._api import ComfyExtension, io

NODES: list[type[io.ComfyNode]] = [
    *loaders.NODES,
    *images.NODES,
    *masks.NODES,
    *blending.NODES,
    *background.NODES,
    *ranking.NODES,
]


class EditKitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
