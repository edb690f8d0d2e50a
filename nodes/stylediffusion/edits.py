"""StyleDiffusion's edits: a learned picture by its words, and its style for another picture."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.attention.plug_and_play import PlugAndPlayOptions
from ...pipelines.core.noise import image_seeds
from ...pipelines.stylediffusion.edit import NoisedStart, StyleEditOptions, style_edit, style_transfer
from .._api import EmbeddingsSocket, TrajectorySocket, io, schema
from ..attention.p2p import AUTOMATIC, blend_inputs, p2p_inputs, p2p_options
from ..attention.pairs import MAX_SEED, edit_in, edit_input, fraction_input, model_input
from .inversion import CATEGORY, cfg_input

INJECTED = -1  # a block chosen by the size of the network


def _values_input(tooltip: str) -> EmbeddingsSocket.Input:
    return EmbeddingsSocket.Input("embeddings", tooltip=tooltip)


def _negative() -> io.MultiType.Input:
    return io.MultiType.Input(
        "negative",
        types=[io.Conditioning, EmbeddingsSocket],
        tooltip="The negative prompt that the values were learned with, usually empty. Not evaluated at cfg 1.",
    )


class StyleEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_StyleEdit",
            display_name="Edit a learned picture by prompt (StyleDiffusion)",
            category=CATEGORY,
            description=(
                "Edits a picture whose values were learned: its words by Prompt-to-Prompt and P2Plus, and as much of its looks "
                "as tau_v keeps. Neither the picture nor the image encoder is needed any more."
            ),
            search_aliases=["StyleDiffusion", "P2Plus", "edit real image", "attention control"],
            inputs=[
                model_input(patched=False),
                _values_input(
                    "From 'Learn a picture's values', or loaded: the picture's values and its path up to noise."
                ),
                edit_input(),
                _negative(),
                cfg_input("Guidance scale; the one that the values were learned for."),
                fraction_input(
                    "tau_v",
                    0.5,
                    "Part of the run in which the edited picture has the picture's values, 0 to 1. Lower = further from its "
                    "looks; 0.2 for large changes.",
                ),
                *p2p_inputs(0.6, 0.6),
                io.Float.Input(
                    "sdedit_strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Above 0: begin with the picture noised to this part of the grid (SDEdit) instead of inverted; 0.5 to "
                    "0.8 are usual, 1 forgets its layout. 0 = the inversion.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    optional=True,
                    tooltip="Seed of SDEdit's noise; image b of the batch uses seed + b. The inversion draws none.",
                ),
                *blend_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "source_latent", display_name="source", tooltip="The picture itself, as the VAE gave it."
                ),
                io.Latent.Output("edited_latent", display_name="edited", tooltip="The edited picture's clean latent."),
            ],
        )

    @classmethod
    def execute(
        cls, model, embeddings, edit, negative, cfg, tau_v, tau_c, tau_s, tau_u, sdedit_strength=0.0, seed=0, self_divisor=2,
        blend_start=0.2, blend_threshold=0.3, keep_threshold=0.3, blend_pool=3, blend_smooth=False, blend_divisor=AUTOMATIC,
    ) -> io.NodeOutput:  # fmt: skip
        edit, against, values = edit_in(edit), _host.negative_in(negative), _host.value_embeddings_in(embeddings)
        attention = p2p_options(
            tau_c, tau_s, tau_u, self_divisor, blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth,
            blend_divisor,
        )  # fmt: skip
        path, rest = values.trajectory, _host.value_embeddings_rest(embeddings)
        seeds = image_seeds(seed, path.batch, rest.get("batch_index"))
        start = NoisedStart(sdedit_strength, seeds) if sdedit_strength > 0 else None
        shape, contexts = (
            (2 * path.batch, *path.source.shape[1:]),
            _host.prompts_to_open(edit.target, against, edit.source),
        )
        with _host.open_denoiser(model, shape, contexts, sigmas=path.sigmas) as denoiser:
            edited = style_edit(
                denoiser, values, edit, against, guidance_scale=cfg, options=StyleEditOptions(tau_v, attention), start=start,
                progress=_host.progress(len(path.latents) - 1, model),
            ).edited  # fmt: skip
            edited = denoiser.scale_out(edited)
        return io.NodeOutput(_host.finished_out(path.source_latent, like=rest), _host.finished_out(edited, like=rest))


class StyleTransfer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_StyleTransfer",
            display_name="Style of a learned picture (StyleDiffusion)",
            category=CATEGORY,
            description=(
                "Draws one picture in the style of another: it starts from the content's inverted noise, with the values that "
                "were learned from the style, and takes the content's features in the decoder."
            ),
            search_aliases=["StyleDiffusion", "style transfer", "restyle", "plug and play"],
            inputs=[
                model_input(patched=False),
                _values_input("The values of the style picture, learned on the sigmas of the content's inversion."),
                TrajectorySocket.Input("trajectory", tooltip="The content picture's inversion, on the same sigmas."),
                io.Conditioning.Input("source", tooltip="The prompt of the content's inversion: what it shows."),
                io.Conditioning.Input(
                    "target", tooltip="What the result shows; the prompt of the content is a good start."
                ),
                _negative(),
                cfg_input("Guidance scale; the one that the values were learned for."),
                fraction_input(
                    "features_until", 0.8, "Part of the run with the content's residual features, 0 to 1; 0 = none."
                ),
                fraction_input(
                    "attention_until", 0.5, "Part of the run with the content's self-attention maps, 0 to 1."
                ),
                io.Combo.Input(
                    "last_step",
                    options=["inclusive", "exclusive"],
                    default="inclusive",
                    optional=True,
                    tooltip="inclusive: as Plug-and-Play was published, the step at which a part ends still belongs to it.",
                ),
                io.Int.Input(
                    "feature_block",
                    default=INJECTED,
                    min=-1,
                    max=63,
                    optional=True,
                    tooltip="Index of the output block whose features are taken, from 0; -1 = a third of the way, 4 of 12.",
                ),
                io.Int.Input(
                    "attention_from",
                    default=INJECTED,
                    min=-1,
                    max=63,
                    optional=True,
                    tooltip="Index of the first output block whose self-attention is taken, from 0; -1 = the same place.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "styled_latent", display_name="styled", tooltip="The content in the other picture's style."
                )
            ],
        )

    @classmethod
    def execute(
        cls, model, embeddings, trajectory, source, target, negative, cfg, features_until, attention_until,
        last_step="inclusive", feature_block=INJECTED, attention_from=INJECTED,
    ) -> io.NodeOutput:  # fmt: skip
        blocks = (None if block == INJECTED else block for block in (feature_block, attention_from))
        options = PlugAndPlayOptions(features_until, attention_until, last_step == "inclusive", *blocks)
        values, path, against = (
            _host.value_embeddings_in(embeddings),
            _host.trajectory_in(trajectory),
            _host.negative_in(negative),
        )
        before, after = _host.context(source, "source"), _host.context(target, "target")
        shape, contexts = (2 * path.batch, *path.source.shape[1:]), _host.prompts_to_open(after, before, against)
        with _host.open_denoiser(model, shape, contexts, sigmas=path.sigmas) as denoiser:
            styled = style_transfer(
                denoiser, values, path, before, after, against, guidance_scale=cfg, options=options,
                progress=_host.progress(len(path.latents) - 1, model),
            ).edited  # fmt: skip
            styled = denoiser.scale_out(styled)
        return io.NodeOutput(_host.finished_out(styled, like=_host.trajectory_rest(trajectory)))


NODES = [StyleEdit, StyleTransfer]
