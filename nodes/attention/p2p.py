"""Prompt-to-Prompt and P2Plus: a model patch for any sampler, and the whole edit in one node."""

from __future__ import annotations

from ...hosts.embeddings import negative_in, prompts_to_open
from ...hosts.host import open_denoiser, progress_bar
from ...hosts.latent import finished_out, unnoised_samples
from ...hosts.trajectory import trajectory_in, trajectory_rest
from ...pipelines.attention.local_blend import LocalBlendOptions
from ...pipelines.attention.p2p import P2PControl, P2POptions
from ...pipelines.attention.pair_loop import attention_edit
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.noise import image_seeds, noised_latents
from ...pipelines.core.sigmas import check_sigmas
from .._api import io, schema
from .._inputs import (
    AUTOMATIC_DIVISOR,
    attention_model_input,
    cfg_input,
    edit_input,
    layer_range_inputs,
    local_blend_inputs,
    negative_input,
    p2p_fraction_inputs,
    seed_input,
    sigmas_input,
    trajectory_input,
)
from .pairs import edit_in, pair_inputs, pair_outputs, patched


def local_blend(
    start: float,
    threshold: float,
    keep_threshold: float,
    pool: int,
    smooth: bool,
    divisor: int,
    edited_maps: bool,
) -> LocalBlendOptions:
    """The options of the inputs of `local_blend_inputs`, in their order."""
    return LocalBlendOptions(start, threshold, keep_threshold, pool, smooth, divisor or None, edited_maps)


class P2Plus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_P2Plus",
            display_name="Prompt-to-Prompt Model Patch (P2Plus)",
            category="EditKit/attention",
            description=(
                "Prompt-to-Prompt and P2Plus as a model patch: any sampler generates a source image and a target image with "
                "the same composition. Use a latent with batch size 2 and the conditioning from here as positive."
            ),
            search_aliases=["prompt-to-prompt", "p2p", "attention control", "word swap", "cross attention"],
            inputs=[
                attention_model_input(),
                edit_input(),
                *p2p_fraction_inputs(),
                *pair_inputs(),
                *local_blend_inputs(),
                *layer_range_inputs(),
            ],
            outputs=pair_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        edit,
        tau_c,
        tau_s,
        tau_u,
        sigmas=None,
        trajectory=None,
        share_noise=True,
        self_divisor=2,
        blend_start=0.2,
        blend_threshold=0.3,
        keep_threshold=0.3,
        blend_pool=3,
        blend_smooth=False,
        blend_divisor=AUTOMATIC_DIVISOR,
        edited_maps=False,
        from_layer=0.0,
        until_layer=1.0,
    ) -> io.NodeOutput:
        edit = edit_in(edit)
        blend = local_blend(
            blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth, blend_divisor, edited_maps
        )
        options = P2POptions(tau_c, tau_s, tau_u, self_divisor, blend, from_layer, until_layer)
        return io.NodeOutput(
            *patched(
                model,
                edit.source,
                edit.target,
                lambda grid: P2PControl(edit, grid, options),
                tokens=edit.token_count,
                sigmas=sigmas,
                trajectory=trajectory,
                share_noise=share_noise,
            )
        )


class P2PlusEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_P2PlusEdit",
            display_name="Prompt-to-Prompt Edit (P2P, P2Plus)",
            category="EditKit/attention",
            description=(
                "The whole Prompt-to-Prompt edit in one node. With the trajectory of an inverted image, it edits that image; "
                "the source branch runs only while its attention is used. Without one, it generates source and target from "
                "the same noise."
            ),
            search_aliases=[
                "prompt-to-prompt",
                "p2p",
                "edit real image",
                "null-text",
                "word swap",
                "attention control",
            ],
            inputs=[
                attention_model_input(patched=False),
                edit_input(),
                negative_input(
                    "The negative prompt, or the embeddings of null-text or negative-prompt inversion for a real image. Not "
                    "evaluated at cfg 1.",
                ),
                cfg_input(),
                *p2p_fraction_inputs(),
                trajectory_input("Inversion of a real image, made with the source prompt.", optional=True),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Without a trajectory: an Empty Latent Image for size and batch, or a clean latent to start from.",
                ),
                sigmas_input("Without a trajectory: falling sigmas that end at 0.", optional=True),
                seed_input(
                    "Without a trajectory: seed of the noise. Every image of the batch has its own noise.",
                    optional=True,
                ),
                *local_blend_inputs(),
                *layer_range_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "source_latent",
                    display_name="source",
                    tooltip="Clean latent of the source: the inverted image, or the image of the source prompt.",
                ),
                io.Latent.Output("edited_latent", display_name="edited", tooltip="Clean latent of the edited image."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        edit,
        negative,
        cfg,
        tau_c,
        tau_s,
        tau_u,
        trajectory=None,
        latent=None,
        sigmas=None,
        seed=0,
        self_divisor=2,
        blend_start=0.2,
        blend_threshold=0.3,
        keep_threshold=0.3,
        blend_pool=3,
        blend_smooth=False,
        blend_divisor=AUTOMATIC_DIVISOR,
        edited_maps=False,
        from_layer=0.0,
        until_layer=1.0,
    ) -> io.NodeOutput:
        edit, negative_prompt = edit_in(edit), negative_in(negative)
        blend = local_blend(
            blend_start, blend_threshold, keep_threshold, blend_pool, blend_smooth, blend_divisor, edited_maps
        )
        options = P2POptions(tau_c, tau_s, tau_u, self_divisor, blend, from_layer, until_layer)
        inverted = None if trajectory is None else trajectory_in(trajectory)
        like = trajectory_rest(trajectory) if inverted else latent
        sigma_grid, clean = _start(inverted, latent, sigmas)
        seeds = image_seeds(seed, len(clean), like.get("batch_index"))
        shape, contexts = (2 * len(clean), *clean.shape[1:]), prompts_to_open(edit.target, negative_prompt, edit.source)
        with open_denoiser(model, shape, contexts, sigmas=sigma_grid) as denoiser:
            start = inverted or noised_latents(denoiser, clean, [float(sigma_grid[0])], seeds)[0]
            result = attention_edit(
                denoiser,
                edit,
                negative_prompt,
                start,
                sigmas=sigma_grid,
                guidance_scale=cfg,
                options=options,
                progress=progress_bar(len(sigma_grid) - 1, model),
            )
            source = clean if inverted else denoiser.scale_out(result.source)
            edited = denoiser.scale_out(result.edited)
        return io.NodeOutput(finished_out(source, like=like), finished_out(edited, like=like))


def _start(inverted, latent, sigmas) -> tuple:
    """The sigmas, ending at 0, and the clean latent that gives size and batch."""
    if inverted is not None:
        if latent is not None:
            raise ParameterError("trajectory and latent are both connected: a trajectory brings its own latents")
        sigma_grid, clean = inverted.sigmas if sigmas is None else check_sigmas(sigmas), inverted.source_latent
    elif latent is None or sigmas is None:
        raise ParameterError("connect trajectory (to edit a real image), or latent and sigmas (to start from noise)")
    else:
        sigma_grid, clean = check_sigmas(sigmas), unnoised_samples(latent, "latent")
    if sigma_grid[-1] != 0:
        raise ParameterError(
            f"sigmas end at {float(sigma_grid[-1]):.4g}: this node returns finished images; end them at 0"
        )
    return sigma_grid, clean


NODES = [P2Plus, P2PlusEdit]
