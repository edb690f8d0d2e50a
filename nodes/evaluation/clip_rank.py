"""CLIP ranking of candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hosts.host import to_host
from ...hosts.latent import reordered, samples_of
from ...hosts.workflow_prompt import upstream_prompt
from ...pipelines.core.shapes import refuse_nan
from ...pipelines.evaluation.clip_ranking import BEST, REGIONS, Ranking, rank_by_text
from .._api import RankerSocket, for_page, io, schema, show_text, thumbnails


class RankByText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_RankByText",
            display_name="CLIP Rank (Best of N by Score)",
            category="EditKit/evaluation",
            description=(
                "Best of N: sorts a batch of images by their CLIP score with a text inside the mask, best first, together with "
                "their latents. Equal scores keep their order."
            ),
            search_aliases=["clip score", "best of", "sort batch", "rank by text"],
            inputs=[
                io.Image.Input("images", tooltip="The decoded candidates."),
                RankerSocket.Input("ranker", tooltip="From 'Load CLIP Ranker'."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip="What the masked region should show, used as it is. Empty = the prompt of the edit.",
                ),
                io.Combo.Input(
                    "region",
                    options=list(REGIONS),
                    default="masked",
                    tooltip="masked: black outside the mask, as in the paper. crop: the bounding box of the mask, better for "
                    "small masks. blur: blurred outside. keep: the whole image.",
                ),
                io.Int.Input(
                    "keep", default=0, min=0, max=4096, tooltip="How many of the best images to keep. 0 = all, sorted."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Pixel mask of the edit, 1 = edit: one, or one per image."
                ),
                io.Latent.Input("latent", optional=True, tooltip="The candidates' latents, sorted the same way."),
                io.Int.Input(
                    "pick",
                    display_name="picked image",
                    optional=True,
                    default=BEST,
                    min=BEST,
                    max=4095,
                    tooltip="Number of the image that comes first whatever its score, from 0 in the order of images. "
                    "-1 = the best. After a run, click an image below to pick it.",
                ),
            ],
            outputs=[
                io.Image.Output("ranked", display_name="images", tooltip="Best first."),
                io.Latent.Output(
                    "ranked_latent",
                    display_name="latent",
                    tooltip="In the same order. Empty if no latent is connected.",
                ),
                io.String.Output(
                    "scores", display_name="scores", tooltip="Cosine similarities, -1 to 1, best first, one per line."
                ),
                io.String.Output(
                    "order", display_name="order", tooltip="Index of each result in the input, from 0, comma-separated."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, ranker, text, region, keep, mask=None, latent=None, pick=BEST) -> io.NodeOutput:
        if not text.strip() and cls.hidden is not None:
            text = upstream_prompt(cls.hidden.prompt, cls.hidden.unique_id)
        if latent is not None:
            refuse_nan(samples_of(latent), "latent")
        ranking = rank_by_text(images, text, ranker, mask=mask, region=region, keep=keep, pick=pick)
        ranked = None if latent is None else reordered(latent, ranking)
        scores = "\n".join(f"{score:.4f}" for score in ranking.scores.tolist())
        order = ",".join(str(i) for i in ranking.order.tolist())
        shown = to_host(ranking.images)
        below = for_page(
            show_text(cls, shown, scores), "ranking", lambda: _gallery(images, mask, region, ranking, pick)
        )
        return io.NodeOutput(shown, ranked, scores, order, ui=below)


def _gallery(images: Tensor, mask: Tensor | None, region: str, ranking: Ranking, pick: int) -> dict[str, Any]:
    """What the page's gallery shows: every candidate with its score, and the mask that was compared."""
    compared = None if mask is None or region == "keep" else (mask >= 0.5).float()[..., None].expand(-1, -1, -1, 3)
    best = torch.sort(ranking.all_scores, descending=True, stable=True).indices
    return {
        "images": thumbnails(images),
        "masks": [] if compared is None else thumbnails(compared),
        "scores": [round(score, 4) for score in ranking.all_scores.tolist()],
        "order": best.tolist(),
        "pick": pick,
    }


NODES = [RankByText]
