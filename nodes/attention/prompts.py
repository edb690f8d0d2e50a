"""Prompt nodes: which word of one prompt became which word of another."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.attention.prompts.align import MODES, align_prompts
from ...pipelines.attention.prompts.figure import alignment_figure
from ...pipelines.attention.prompts.widget_syntax import parse_weights, parse_windows, parse_words
from .._api import PromptEditSocket, io, schema, show_text


class AlignPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_AlignPrompts",
            display_name="Align prompts (Prompt-to-Prompt)",
            category="EditKit/attention",
            description=(
                "Finds out which word of the source prompt became which word of the target prompt, so that each takes its "
                "place in the picture from the other, and shows it. Also gives single words a strength, a part of the run, "
                "and a say in what may change."
            ),
            search_aliases=["p2p", "prompt to prompt", "word swap", "reweight", "equalizer", "local blend", "refine"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of the model: CLIP of SD 1.x, SD 2.x or SDXL."),
                io.String.Input("source_text", multiline=True, default="", tooltip="What the source picture shows."),
                io.String.Input(
                    "target_text",
                    multiline=True,
                    default="",
                    tooltip="What the edited picture should show: the source prompt with some words changed.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="auto: words that both have are matched, and each stretch between is replaced, added or removed. "
                    "replace: word for word, equally many words. refine: what is new looks where it likes.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="Strength of target words, -100 to 100, 1 = unchanged: circle: 2, red#2: 0.5 "
                    "(#2 = the second of that word).",
                ),
                io.String.Input(
                    "windows",
                    default="",
                    tooltip="Part of the run, 0 to 1, in which target words take the source's attention: red: 0-0.4. "
                    "Other words follow the edit node.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip="Words of either prompt whose place may change (LocalBlend): circle, target:square. "
                    "Empty = the whole picture may.",
                ),
                io.String.Input(
                    "keep_words",
                    default="",
                    tooltip="Words of either prompt whose place must stay, taken out of that of blend_words.",
                ),
                io.Boolean.Input(
                    "legacy_tail",
                    default=False,
                    tooltip="As the official code: words after a change in the number of tokens get their neighbours' places. "
                    "Only to reproduce published pictures.",
                ),
            ],
            outputs=[
                PromptEditSocket.Output(
                    "prompt_edit", display_name="prompt edit", tooltip="Both prompts and which word became which."
                ),
                io.Image.Output(
                    "picture", display_name="alignment", tooltip="Source words over target words, joined where matched."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was matched, replaced, added and removed, line by line.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip, source_text, target_text, mode, weights, windows, blend_words, keep_words, legacy_tail
    ) -> io.NodeOutput:
        edit = align_prompts(
            _host.text_encoder(clip),
            source_text,
            target_text,
            mode=mode,
            weights=parse_weights(weights),
            windows=parse_windows(windows),
            blend_words=parse_words(blend_words),
            keep_words=parse_words(keep_words),
            legacy_tail=legacy_tail,
        )
        image, report = _host.to_host(alignment_figure(edit)), "\n".join(edit.report)
        return io.NodeOutput(edit, image, report, ui=show_text(cls, image, report))


NODES = [AlignPrompts]
