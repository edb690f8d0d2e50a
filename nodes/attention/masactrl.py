"""MasaCtrl as a model patch, for any sampler."""

from __future__ import annotations

from ...hosts.sockets import prompt_pair
from ...pipelines.attention.masactrl import MasaCtrl as MasaCtrlControl
from ...pipelines.attention.masactrl import MasaCtrlOptions
from .._api import PromptEditSocket, io, schema
from .._inputs import attention_model_input, fraction_input
from .pairs import edit_in, pair_inputs, pair_outputs, pair_prompt_inputs, patched


class MasaCtrl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_MasaCtrl",
            display_name="MasaCtrl (Change Pose)",
            category="EditKit/attention",
            description=(
                "Changes pose or layout and keeps the object: a model patch in which the target uses the keys and values of "
                "the source's self-attention. Use a latent with batch size 2 and the conditioning from here as positive."
            ),
            search_aliases=["mutual self-attention", "consistent character", "non-rigid edit", "pose", "same object"],
            inputs=[
                attention_model_input(),
                *pair_prompt_inputs(),
                io.Int.Input(
                    "from_step",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="First step, from 0, in which the target attends to the source. Earlier steps set the new layout.",
                ),
                fraction_input(
                    "from_layer",
                    0.625,
                    "Fraction of the self-attention layers that stay unchanged, counted from the input, 0 to 1.",
                ),
                *pair_inputs(),
                PromptEditSocket.Input(
                    "object",
                    optional=True,
                    tooltip="An alignment of the same prompts whose blend words name the object: object then attends only to "
                    "object, background only to background.",
                ),
                fraction_input(
                    "object_threshold",
                    0.1,
                    "With object: pixels above this share of the map's peak belong to the object, 0 to 1.",
                    optional=True,
                ),
            ],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        source,
        target,
        from_step,
        from_layer,
        sigmas=None,
        trajectory=None,
        share_noise=True,
        object=None,
        object_threshold=0.1,
    ) -> io.NodeOutput:
        options = MasaCtrlOptions(from_step, from_layer, object_threshold)
        named = None if object is None else edit_in(object, "object")
        return io.NodeOutput(
            *patched(
                model,
                *prompt_pair(source, target),
                lambda grid: MasaCtrlControl(grid, options, named),
                tokens=None if named is None else named.token_count,
                sigmas=sigmas,
                trajectory=trajectory,
                share_noise=share_noise,
            )
        )


NODES = [MasaCtrl]
