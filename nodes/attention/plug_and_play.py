"""Plug-and-Play injection as a model patch, for any sampler."""

from __future__ import annotations

from ...hosts.sockets import prompt_pair
from ...pipelines.attention.plug_and_play import PlugAndPlay as PlugAndPlayControl
from ...pipelines.attention.plug_and_play import PlugAndPlayOptions
from .._api import io, schema
from .._inputs import AUTOMATIC_BLOCK, attention_model_input, injection_block_inputs, injection_fraction_inputs
from .pairs import pair_inputs, pair_outputs, pair_prompt_inputs, patched


class FeatureInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_FeatureInjection",
            display_name="Plug-and-Play, Keep Structure (PnP)",
            category="EditKit/attention",
            description=(
                "Restyles and keeps the structure: a model patch that injects the source's residual features and self-attention "
                "into the target. Use a latent with batch size 2 and the conditioning from here as positive."
            ),
            search_aliases=["plug and play", "pnp", "feature injection", "image to image translation", "restyle"],
            inputs=[
                attention_model_input(joint=False),
                *pair_prompt_inputs(),
                *injection_fraction_inputs(),
                *pair_inputs(),
                *injection_block_inputs(),
            ],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        source,
        target,
        features_until,
        attention_until,
        sigmas=None,
        trajectory=None,
        share_noise=True,
        last_step="inclusive",
        feature_block=AUTOMATIC_BLOCK,
        attention_from=AUTOMATIC_BLOCK,
    ) -> io.NodeOutput:
        chosen = (None if block == AUTOMATIC_BLOCK else block for block in (feature_block, attention_from))
        options = PlugAndPlayOptions(features_until, attention_until, last_step == "inclusive", *chosen)
        return io.NodeOutput(
            *patched(
                model,
                *prompt_pair(source, target),
                lambda grid: PlugAndPlayControl(grid, options),
                sigmas=sigmas,
                trajectory=trajectory,
                share_noise=share_noise,
            )
        )


NODES = [FeatureInjection]
