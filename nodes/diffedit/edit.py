"""DiffEdit's masked decode of an inverted image, and the whole method in one node."""

from __future__ import annotations

from ...hosts.embeddings import negative_in, opened_for
from ...hosts.host import batch_that_fits, open_denoiser, progress_bar, sampling_of
from ...hosts.latent import finished_out, unnoised_samples
from ...hosts.sockets import context_of, prompt_pair
from ...hosts.trajectory import trajectory_in, trajectory_rest
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.sigmas import executed_steps
from ...pipelines.diffedit.edit import DiffEditSettings, diffedit, masked_decode
from ...pipelines.diffedit.mask import MaskRule
from ...pipelines.inversion.ddim import MODES, InversionOptions
from .._api import MaskScheduleSocket, io, reproduction_switch, schema, show_text
from .._inputs import (
    cfg_input,
    edited_output,
    encoding_ratio_input,
    latent_input,
    model_input,
    negative_input,
    seed_input,
    steps_input,
    trajectory_input,
)
from ..blended.blending import as_schedule
from .mask_sockets import (
    mask_inputs,
    mask_outputs,
    mask_prompts,
    negative_inputs,
    negatives_in,
    prompts,
    rule_inputs,
    shown,
    size_of,
    vae_for_size,
)


def _encoding_ratio() -> io.Float.Input:
    return encoding_ratio_input(
        0.8, "Fraction of the steps to invert and decode, 0 to 1. Higher values change more; 1 starts from pure noise."
    )


def _legacy_offset() -> io.Boolean.Input:
    return reproduction_switch(
        io.Boolean,
        "legacy_offset",
        default=False,
        optional=True,
        tooltip="Put the source back one step too late, as diffusers does. The outside then differs from the source.",
    )


class MaskedDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_MaskedDecode",
            display_name="DiffEdit Masked Decode",
            category="EditKit/sampling",
            description=(
                "The last step of DiffEdit: denoises an inverted image with the prompt under the mask, and outside the mask "
                "puts its trajectory back after every step. The latent outside the mask ends exactly as the source."
            ),
            search_aliases=["diffedit", "decode", "masked sampling", "inpaint"],
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="The prompt of the edit."),
                negative_input(),
                cfg_input(),
                trajectory_input("From 'DDIM Inversion' with this model."),
                io.MultiType.Input(
                    "latent_mask",
                    types=[io.Mask, MaskScheduleSocket],
                    tooltip="A latent mask or a mask schedule, 1 = edit.",
                ),
                _encoding_ratio(),
                _legacy_offset(),
            ],
            outputs=[edited_output()],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, trajectory, latent_mask, encoding_ratio, legacy_offset=False
    ) -> io.NodeOutput:
        inverted, masks = trajectory_in(trajectory), as_schedule(latent_mask)
        prompt, negative_prompt = context_of(positive, "positive"), negative_in(negative)
        shape, like = (max(inverted.batch, masks.batch), *inverted.latents.shape[2:]), trajectory_rest(trajectory)
        opened = opened_for(prompt, negative_prompt, cfg)
        with open_denoiser(model, shape, opened, sigmas=inverted.sigmas) as denoiser:
            edited = masked_decode(
                denoiser,
                inverted,
                masks,
                EditPrompts(prompt, negative_prompt, cfg),
                ratio=encoding_ratio,
                legacy_offset=legacy_offset,
                progress=progress_bar(executed_steps(inverted.steps, encoding_ratio), model),
            )
        return io.NodeOutput(finished_out(edited, like=like))


class DiffEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DiffEdit",
            display_name="DiffEdit, Replace Object (All in One)",
            category="EditKit/sampling",
            description=(
                "Edits an image by two prompts, without drawing a mask: finds the mask, inverts the image, and decodes it with "
                "the target prompt under the mask. The latent outside the mask ends exactly as the source."
            ),
            search_aliases=["automatic mask edit", "text edit", "diffedit", "replace object"],
            inputs=[
                model_input(),
                latent_input(),
                *prompts(),
                negative_input(),
                cfg_input(),
                steps_input(),
                _encoding_ratio(),
                *mask_inputs(),
                seed_input("Seed of the mask's noises. Every image of the batch has its own."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="next",
                    optional=True,
                    tooltip="How to invert. next: fast, not for flow models. current: the paper's equation. implicit: exact, up "
                    "to 5 times the model calls.",
                ),
                *rule_inputs(),
                _legacy_offset(),
                io.Conditioning.Input(
                    "inversion",
                    optional=True,
                    tooltip="The inversion prompt. Without it: the source prompt. The paper uses an empty prompt.",
                ),
                vae_for_size(),
                *negative_inputs(),
            ],
            outputs=[edited_output(), *mask_outputs()],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        source,
        target,
        negative,
        cfg,
        steps,
        encoding_ratio,
        maps,
        strength,
        threshold,
        seed,
        mode="next",
        clip_ratio=3.0,
        smooth=1,
        smallest_island=0,
        legacy_offset=False,
        inversion=None,
        vae=None,
        source_negative=None,
        target_negative=None,
        mask_cfg=7.5,
    ) -> io.NodeOutput:
        clean, size = unnoised_samples(latent, "latent"), size_of(latent, vae)
        rule = MaskRule(clip_ratio, threshold, smooth, smallest_island)
        settings = DiffEditSettings(
            steps, encoding_ratio, maps, strength, cfg, legacy_offset, rule, InversionOptions(mode)
        )
        source_prompt, prompt = prompt_pair(source, target)
        inversion_prompt = source_prompt if inversion is None else context_of(inversion, "inversion")
        negative_prompt, negatives = negative_in(negative), negatives_in(source_negative, target_negative, mask_cfg)
        opened = [*opened_for(prompt, negative_prompt, cfg), source_prompt, inversion_prompt, *mask_prompts(negatives)]
        with open_denoiser(model, clean.shape, opened, sigmas=sampling_of(model).schedule(steps)) as denoiser:
            result = diffedit(
                denoiser,
                clean,
                source_prompt,
                prompt,
                negative_prompt,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                settings=settings,
                inversion=inversion_prompt,
                mask_negatives=negatives,
                max_batch=batch_that_fits(model, clean.shape),
                progress=progress_bar(maps + 2 * executed_steps(steps, encoding_ratio), model),
            )
        outputs, text = shown(result.mask, size)
        return io.NodeOutput(finished_out(result.latent, like=latent), *outputs, ui=show_text(cls, outputs[2], text))


NODES = [MaskedDecode, DiffEdit]
