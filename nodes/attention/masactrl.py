"""Relatives of Prompt-to-Prompt that share its hook: MasaCtrl and Plug-and-Play, for native samplers."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.attention.masactrl import MasaCtrl as MasaCtrlControl
from ...pipelines.attention.masactrl import MasaCtrlOptions
from ...pipelines.attention.plug_and_play import FeatureInjection as PlugAndPlayControl
from ...pipelines.attention.plug_and_play import PlugAndPlayOptions
from .._api import PromptEditSocket, io, schema
from .pairs import edit_in, fraction_input, model_input, pair_inputs, pair_outputs, patched, prompt_inputs

AUTOMATIC = -1


class MasaCtrl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_MasaCtrl",
            display_name="Same object, other pose (MasaCtrl)",
            category="EditKit/attention",
            description=(
                "Patches a model so that any native sampler draws pairs: the target takes its looks from the source (keys and "
                "values of self-attention) but its layout from its own prompt. Give the sampler a latent batch of 2 and the "
                "conditioning from here as positive."
            ),
            search_aliases=["mutual self-attention", "consistent character", "non-rigid edit", "pose"],
            inputs=[
                model_input(),
                *prompt_inputs(),
                io.Int.Input(
                    "from_step",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="First step, counted from 0, at which the target looks at the source; the layout is its own before.",
                ),
                fraction_input(
                    "from_layer",
                    0.625,
                    "Part of the network's layers that stay as they are, 0 to 1; 0.625 as published (10 of 16).",
                ),
                *pair_inputs(),
                PromptEditSocket.Input(
                    "object",
                    optional=True,
                    tooltip="Its blend words name the object in both prompts: object then looks at object only, background at "
                    "background. Connect the prompts that it was aligned on.",
                ),
                io.Float.Input(
                    "object_threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="With object: what exceeds this share of its words' map belongs to it, 0 to 1.",
                ),
            ],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls, model, source, target, from_step, from_layer, sigmas=None, trajectory=None, share_noise=True, object=None,
        object_threshold=0.1,
    ) -> io.NodeOutput:  # fmt: skip
        options = MasaCtrlOptions(from_step, from_layer, object_threshold)
        named = None if object is None else edit_in(object, "object")
        return io.NodeOutput(
            *patched(
                model, _host.context(source, "source"), _host.context(target, "target"),
                lambda grid: MasaCtrlControl(grid, options, named), tokens=None if named is None else named.token_count,
                sigmas=sigmas, trajectory=trajectory, share_noise=share_noise,
            )
        )  # fmt: skip


class FeatureInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_FeatureInjection",
            display_name="Same structure, other looks (Plug-and-Play)",
            category="EditKit/attention",
            description=(
                "Patches a model so that any native sampler draws pairs: the target takes its structure from the source "
                "(residual features and self-attention's queries and keys) and its looks from its own prompt. Give the sampler "
                "a latent batch of 2 and the conditioning from here as positive."
            ),
            search_aliases=["plug and play", "pnp", "feature injection", "image to image translation", "restyle"],
            inputs=[
                model_input(),
                *prompt_inputs(),
                fraction_input(
                    "features_until", 0.8, "Part of the run with the source's residual features, 0 to 1; 0 = none."
                ),
                fraction_input(
                    "attention_until", 0.5, "Part of the run with the source's self-attention maps, 0 to 1; 0 = none."
                ),
                *pair_inputs(),
                io.Combo.Input(
                    "last_step",
                    options=["inclusive", "exclusive"],
                    default="inclusive",
                    optional=True,
                    tooltip="inclusive: as published, the step at which a part ends still belongs to it (41 and 26 of 50 steps).",
                ),
                io.Int.Input(
                    "feature_block",
                    default=AUTOMATIC,
                    min=-1,
                    max=63,
                    optional=True,
                    tooltip="Index of the output block whose features are taken, from 0; -1 = a third of the way, 4 of 12.",
                ),
                io.Int.Input(
                    "attention_from",
                    default=AUTOMATIC,
                    min=-1,
                    max=63,
                    optional=True,
                    tooltip="Index of the first output block whose self-attention is taken, from 0; -1 = the same place.",
                ),
            ],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls, model, source, target, features_until, attention_until, sigmas=None, trajectory=None, share_noise=True,
        last_step="inclusive", feature_block=AUTOMATIC, attention_from=AUTOMATIC,
    ) -> io.NodeOutput:  # fmt: skip
        chosen = (None if block == AUTOMATIC else block for block in (feature_block, attention_from))
        options = PlugAndPlayOptions(features_until, attention_until, last_step == "inclusive", *chosen)
        return io.NodeOutput(
            *patched(
                model, _host.context(source, "source"), _host.context(target, "target"),
                lambda grid: PlugAndPlayControl(grid, options), sigmas=sigmas, trajectory=trajectory,
                share_noise=share_noise,
            )
        )  # fmt: skip


NODES = [MasaCtrl, FeatureInjection]
