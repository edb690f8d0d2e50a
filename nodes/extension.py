"""Every node of the pack, and the extension that hands them to ComfyUI."""

from __future__ import annotations

from . import diffedit, images, loaders, masks
from ._api import ComfyExtension, io
from .attention import cross_attention_maps as attention_maps
from .attention import masactrl as relatives
from .attention import p2p as attention
from .attention import prompts
from .blended import background, blending
from .evaluation import clip_rank as ranking
from .evaluation import measure as metrics
from .inversion import ddim as inversion
from .inversion import embedding_files
from .inversion import null_text as reconstruction
from .layerdiffusion import embeddings as layered
from .layerdiffusion import finetune as layered_tune
from .stylediffusion import edits as style_edits
from .stylediffusion import inversion as style

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
