"""Metrics of an edit, as a table and an image."""

from __future__ import annotations

from ...hosts.host import to_host
from ...pipelines.evaluation.report import measure_edit
from .._api import RankerSocket, io, schema, show_text


class MeasureEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_MeasureEdit",
            display_name="Measure Edit (PSNR, CLIP Score)",
            category="EditKit/evaluation",
            description=(
                "Compares edited images with their source: PSNR and SSIM inside and outside the mask, the largest change "
                "outside, the seam, and the CLIP score with a text."
            ),
            search_aliases=["psnr", "ssim", "clip score", "metrics", "compare", "quality"],
            inputs=[
                io.Image.Input("source", tooltip="The image before the edit: one, or one per edited image."),
                io.Image.Input("edited", tooltip="The images after the edit, at the size of the source."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the edit was allowed, 1 = edit: one, or one per image."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What the edited image should show. Used as it is; needs a ranker.",
                ),
                RankerSocket.Input("ranker", optional=True, tooltip="From 'Load CLIP Ranker'; needs a text."),
            ],
            outputs=[
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="One metric per line, tab-separated. '-' = nothing to measure.",
                ),
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="Source, edited image, mask and difference above the numbers, one page per image.",
                ),
            ],
        )

    @classmethod
    def execute(cls, source, edited, mask=None, text="", ranker=None) -> io.NodeOutput:
        measures = measure_edit(source, edited, mask=mask, text=text, ranker=ranker)
        table, report = measures.table(), to_host(measures.report())
        return io.NodeOutput(table, report, ui=show_text(cls, report, table))


NODES = [MeasureEdit]
