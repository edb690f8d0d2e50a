"""Every node of the pack, and the extension that hands them to ComfyUI."""

from __future__ import annotations

from . import (
    attention,
    attention_maps,
    background,
    blending,
    diffedit,
    embedding_files,
    images,
    inversion,
    layered,
    layered_tune,
    loaders,
    masks,
    metrics,
    prompts,
    ranking,
    reconstruction,
    relatives,
    style,
    style_edits,
)
from ._api import ComfyExtension, io

NODES: list[type[io.ComfyNode]] = [
    *loaders.NODES,
    *images.NODES,
    *masks.NODES,
    *blending.NODES,
    *background.NODES,
    *ranking.NODES,
    *inversion.NODES,
    *reconstruction.NODES,
    *embedding_files.NODES,
    *diffedit.NODES,
    *prompts.NODES,
    *attention.NODES,
    *relatives.NODES,
    *attention_maps.NODES,
    *metrics.NODES,
    *style.NODES,
    *style_edits.NODES,
    *layered.NODES,
    *layered_tune.NODES,
]


class EditKitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
