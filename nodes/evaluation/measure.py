"""Measuring node: what an edit did, in numbers and a picture."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.evaluation.report import measure_edit
from .._api import RankerSocket, io, schema, show_text


class MeasureEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_MeasureEdit",
            display_name="Measure edit (PSNR, SSIM, CLIP)",
            category="EditKit/measure",
            description=(
                "Compares edited pictures with their source: PSNR and SSIM, inside and outside the mask, the largest change "
                "outside, the seam, and the agreement with a text in the three usual scales."
            ),
            search_aliases=["psnr", "ssim", "clip score", "metrics", "compare", "quality"],
            inputs=[
                io.Image.Input(
                    "source", tooltip="The picture before the edit; one for all, or one per edited picture."
                ),
                io.Image.Input("edited", tooltip="The pictures after the edit, of the source's size."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the edit was allowed, 1 = edit; one, or one per picture."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What the edited picture should show, taken as it is; needs a ranker.",
                ),
                RankerSocket.Input("ranker", optional=True, tooltip="From 'Load ranker'; needs a text."),
            ],
            outputs=[
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="One measure per line, tab-separated; '-' = nothing to measure.",
                ),
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="Source, edited, mask and change over the numbers; one page each.",
                ),
            ],
        )

    @classmethod
    def execute(cls, source, edited, mask=None, text="", ranker=None) -> io.NodeOutput:
        measures = measure_edit(source, edited, mask=mask, text=text, ranker=ranker)
        table, report = measures.table(), _host.to_host(measures.report())
        return io.NodeOutput(table, report, ui=show_text(cls, report, table))


NODES = [MeasureEdit]
