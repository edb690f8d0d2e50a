"""The alignment of source and target prompt."""

from __future__ import annotations

import logging

from ...hosts.host import text_encoder_of, to_host
from ...pipelines.attention.prompts.align import MODES, align_prompts
from ...pipelines.attention.prompts.figure import alignment_figure
from ...pipelines.attention.prompts.widget_syntax import parse_weights, parse_windows, parse_words
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.guidance import EQUAL_PROMPTS
from .._api import PromptEditSocket, for_page, io, reproduction_switch, schema, show_text

log = logging.getLogger("editkit")


class AlignPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_AlignPrompts",
            display_name="Align Prompts (P2P, Word Swap)",
            category="EditKit/attention",
            description=(
                "Matches the words of the source prompt with the words of the target prompt for Prompt-to-Prompt, and shows "
                "the match. Sets word weights, per-word step ranges and the words that may change (LocalBlend)."
            ),
            search_aliases=["p2p", "prompt to prompt", "word swap", "reweight", "equalizer", "local blend", "refine"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of an SD 1.x, SD 2.x or SDXL model."),
                io.String.Input(
                    "source_text", multiline=True, default="", tooltip="The source prompt: what the source image shows."
                ),
                io.String.Input(
                    "target_text",
                    multiline=True,
                    default="",
                    tooltip="The target prompt: the source prompt with some words changed.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="auto: match equal words, and replace, add or remove the words between them. replace: word for word "
                    "(word swap), for equally many words. refine: keep equal words, new words attend freely.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="Attention weight of target words, -100 to 100, 1 = unchanged. For example: circle: 2, red#2: 0.5 "
                    "(#2 = the second 'red').",
                ),
                io.String.Input(
                    "windows",
                    default="",
                    tooltip="Range of the steps, 0 to 1, in which a target word uses the source's cross-attention map. For "
                    "example: red: 0-0.4. Other words follow tau_c.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip="LocalBlend: only the region of these words may change, for example: circle, target:square. "
                    "Empty = the whole image.",
                ),
                io.String.Input(
                    "keep_words",
                    default="",
                    tooltip="LocalBlend: the region of these words stays. It is removed from the region of blend_words.",
                ),
                reproduction_switch(
                    io.Boolean,
                    "legacy_tail",
                    display_name="legacy alignment",
                    default=False,
                    tooltip="Align like the official code: after a change in the number of tokens, words get the maps of their "
                    "neighbours.",
                ),
            ],
            outputs=[
                PromptEditSocket.Output(
                    "prompt_edit", display_name="prompt edit", tooltip="Both prompts and their word alignment."
                ),
                io.Image.Output(
                    "picture",
                    display_name="alignment",
                    tooltip="Source words above target words, with lines between matches.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Matched, replaced, added and removed words, one per line.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip, source_text, target_text, mode, weights, windows, blend_words, keep_words, legacy_tail
    ) -> io.NodeOutput:
        if not target_text.strip():
            raise ParameterError("target_text is empty: write the source prompt with some words changed")
        if not source_text.strip():
            log.warning("source_text is empty, so no word is aligned: describe the source image")
        if source_text.split() == target_text.split() and not weights.strip():
            log.warning("source_text and target_text are the same prompt: %s or set weights", EQUAL_PROMPTS)
        edit = align_prompts(
            text_encoder_of(clip),
            source_text,
            target_text,
            mode=mode,
            weights=parse_weights(weights),
            windows=parse_windows(windows),
            blend_words=parse_words(blend_words),
            keep_words=parse_words(keep_words),
            legacy_tail=legacy_tail,
        )
        image, report = to_host(alignment_figure(edit)), "\n".join(edit.report)
        texts = {"source_text": source_text, "target_text": target_text}
        shown = for_page(show_text(cls, image, report), "words", lambda: texts)
        return io.NodeOutput(edit, image, report, ui=shown)


NODES = [AlignPrompts]
