"""CLIP ranking of candidates."""

from __future__ import annotations

from ...hosts.host import to_host
from ...hosts.latent import reordered
from ...pipelines.evaluation.clip_ranking import REGIONS, rank_by_text
from .._api import RankerSocket, io, schema, show_text


class RankByText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_RankByText",
            display_name="CLIP Rank",
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
                    "text", multiline=True, default="", tooltip="What the masked region should show. Used as it is."
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
        )

    @classmethod
    def execute(cls, images, ranker, text, region, keep, mask=None, latent=None) -> io.NodeOutput:
        ranking = rank_by_text(images, text, ranker, mask=mask, region=region, keep=keep)
        ranked = None if latent is None else reordered(latent, ranking)
        scores = "\n".join(f"{score:.4f}" for score in ranking.scores.tolist())
        order = ",".join(str(i) for i in ranking.order.tolist())
        shown = to_host(ranking.images)
        return io.NodeOutput(shown, ranked, scores, order, ui=show_text(cls, shown, scores))


NODES = [RankByText]
