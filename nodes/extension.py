"""All nodes of the pack, and the extension that registers them in ComfyUI."""

from __future__ import annotations

from ..hosts.host import serve_page, show_warnings
from . import imagic, masks, sdedit
from ._api import ComfyExtension, io
from .attention import cross_attention_maps, kv_edit, masactrl, p2p, plug_and_play, prompts
from .blended import all_in_one, background, blending, window
from .diffedit import edit as diffedit_edit
from .diffedit import mask as diffedit_mask
from .evaluation import clip_rank, measure
from .inversion import ddim, embedding_files, null_text
from .inversion import flow as flow_inversion
from .layerdiffusion import embeddings as layered_embeddings
from .layerdiffusion import finetune as layered_finetune
from .loading import images, models
from .stylediffusion import edits as style_edits
from .stylediffusion import inversion as style_inversion

MODULES = (
    models,
    images,
    masks,
    all_in_one,
    blending,
    background,
    clip_rank,
    ddim,
    sdedit,
    null_text,
    embedding_files,
    diffedit_mask,
    diffedit_edit,
    prompts,
    p2p,
    masactrl,
    plug_and_play,
    kv_edit,
    cross_attention_maps,
    measure,
    style_inversion,
    style_edits,
    layered_embeddings,
    layered_finetune,
    imagic,
    flow_inversion,
    window,
)
NODES: list[type[io.ComfyNode]] = [node for module in MODULES for node in module.NODES]


class EditKitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        show_warnings()
        serve_page()
        return NODES
