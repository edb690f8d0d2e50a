"""StyleDiffusion's edit and style transfer."""

from __future__ import annotations

from ...hosts.embeddings import negative_in, prompts_to_open, value_embeddings_in, value_embeddings_rest
from ...hosts.host import open_denoiser, progress_bar
from ...hosts.latent import finished_out
from ...hosts.sockets import context_of
from ...hosts.trajectory import trajectory_in, trajectory_rest
from ...pipelines.attention.p2p import P2POptions
from ...pipelines.attention.plug_and_play import PlugAndPlayOptions
from ...pipelines.core.noise import image_seeds
from ...pipelines.stylediffusion.edit import NoisedStart, StyleEditOptions, style_edit, style_transfer
from .._api import io, schema
from .._inputs import (
    AUTOMATIC_BLOCK,
    AUTOMATIC_DIVISOR,
    attention_model_input,
    cfg_input,
    edit_input,
    embeddings_input,
    fraction_input,
    injection_block_inputs,
    injection_fraction_inputs,
    local_blend_inputs,
    negative_input,
    p2p_fraction_inputs,
    prompt_pair_inputs,
    seed_input,
    trajectory_input,
)
from ..attention.p2p import local_blend
from ..attention.pairs import edit_in
from .inversion import CATEGORY


def _negative() -> io.MultiType.Input:
    return negative_input("The negative prompt of the inversion, usually empty. Not evaluated at cfg 1.")


class StyleEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_StyleEdit",
            display_name="StyleDiffusion Edit",
            category=CATEGORY,
            description=(
                "Edits an image by its words after StyleDiffusion Inversion. Prompt-to-Prompt and P2Plus control the layout; "
                "tau_v decides how much of the original appearance stays. Image and image encoder are not needed any more."
            ),
            search_aliases=["StyleDiffusion", "P2Plus", "edit real image", "attention control"],
            inputs=[
                attention_model_input(patched=False, joint=False),
                embeddings_input("From 'StyleDiffusion Inversion' or loaded: the value embeddings and the trajectory."),
                edit_input(),
                _negative(),
                cfg_input(7.5, "CFG scale: the one the value embeddings were learned for."),
                fraction_input(
                    "tau_v",
                    0.5,
                    "Fraction of the steps that use the learned value embeddings. Lower values change the appearance more; "
                    "0.2 for large changes.",
                    label="value embeddings (tau_v)",
                ),
                *p2p_fraction_inputs(0.6, 0.6),
                io.Float.Input(
                    "sdedit_strength",
                    display_name="SDEdit strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Above 0: start from the noised image (SDEdit) instead of the inversion, usually 0.5 to 0.8. 1 ignores "
                    "the layout. 0 = use the inversion.",
                ),
                seed_input("Seed of the SDEdit noise. Every image of the batch has its own noise.", optional=True),
                *local_blend_inputs(),
            ],
            outputs=[
                io.Latent.Output("source_latent", display_name="source", tooltip="Clean latent of the source image."),
                io.Latent.Output("edited_latent", display_name="edited", tooltip="Clean latent of the edited image."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        embeddings,
        edit,
        negative,
        cfg,
        tau_v,
        tau_c,
        tau_s,
        tau_u,
        sdedit_strength=0.0,
        seed=0,
        self_divisor=2,
        blend_start=0.2,
        blend_threshold=0.3,
        keep_threshold=0.3,
        blend_pool=3,
        blend_smooth=False,
        blend_divisor=AUTOMATIC_DIVISOR,
        edited_maps=False,
    ) -> io.NodeOutput:
        edit = edit_in(edit)
        negative_prompt = negative_in(negative)
        values = value_embeddings_in(embeddings)
        blend = local_blend(
            blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth, blend_divisor, edited_maps
        )
        attention = P2POptions(tau_c, tau_s, tau_u, self_divisor, blend)
        inverted, rest = values.trajectory, value_embeddings_rest(embeddings)
        seeds = image_seeds(seed, inverted.batch, rest.get("batch_index"))
        start = NoisedStart(sdedit_strength, seeds) if sdedit_strength > 0 else None
        shape = (2 * inverted.batch, *inverted.source.shape[1:])
        contexts = prompts_to_open(edit.target, negative_prompt, edit.source)
        with open_denoiser(model, shape, contexts, sigmas=inverted.sigmas) as denoiser:
            edited = style_edit(
                denoiser,
                values,
                edit,
                negative_prompt,
                guidance_scale=cfg,
                options=StyleEditOptions(tau_v, attention),
                start=start,
                progress=progress_bar(len(inverted.latents) - 1, model),
            ).edited
            edited = denoiser.scale_out(edited)
        return io.NodeOutput(finished_out(inverted.source_latent, like=rest), finished_out(edited, like=rest))


class StyleTransfer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_StyleTransfer",
            display_name="StyleDiffusion Style Transfer",
            category=CATEGORY,
            description=(
                "Renders one image in the style of another: it starts from the inverted content image, uses the value "
                "embeddings learned from the style image, and injects the content's features (Plug-and-Play)."
            ),
            search_aliases=["StyleDiffusion", "style transfer", "restyle", "plug and play"],
            inputs=[
                attention_model_input(patched=False, joint=False),
                embeddings_input(
                    "Value embeddings of the style image, learned on the sigmas of the content's inversion."
                ),
                trajectory_input("Inversion of the content image on the same sigmas."),
                *prompt_pair_inputs(
                    "The inversion prompt of the content image.",
                    "The prompt of the result. The prompt of the content image is a good start.",
                ),
                _negative(),
                cfg_input(7.5, "CFG scale: the one the value embeddings were learned for."),
                *injection_fraction_inputs(),
                *injection_block_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "styled_latent", display_name="styled", tooltip="Clean latent of the content in the new style."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        embeddings,
        trajectory,
        source,
        target,
        negative,
        cfg,
        features_until,
        attention_until,
        last_step="inclusive",
        feature_block=AUTOMATIC_BLOCK,
        attention_from=AUTOMATIC_BLOCK,
    ) -> io.NodeOutput:
        blocks = (None if block == AUTOMATIC_BLOCK else block for block in (feature_block, attention_from))
        options = PlugAndPlayOptions(features_until, attention_until, last_step == "inclusive", *blocks)
        values = value_embeddings_in(embeddings)
        inverted = trajectory_in(trajectory)
        negative_prompt = negative_in(negative)
        before, after = context_of(source, "source"), context_of(target, "target")
        shape = (2 * inverted.batch, *inverted.source.shape[1:])
        contexts = prompts_to_open(after, before, negative_prompt)
        with open_denoiser(model, shape, contexts, sigmas=inverted.sigmas) as denoiser:
            styled = style_transfer(
                denoiser,
                values,
                inverted,
                before,
                after,
                negative_prompt,
                guidance_scale=cfg,
                options=options,
                progress=progress_bar(len(inverted.latents) - 1, model),
            ).edited
            styled = denoiser.scale_out(styled)
        return io.NodeOutput(finished_out(styled, like=trajectory_rest(trajectory)))


NODES = [StyleEdit, StyleTransfer]
