"""DiffEdit nodes: the mask from two prompts, the masked decode of an inverted image, and the whole method."""

from __future__ import annotations

from typing import Any

from ..hosts.embeddings import negative_in, opened_for, prompts_to_open
from ..hosts.host import batch_that_fits, codec_of, open_denoiser, progress_bar, sampling_of, to_host
from ..hosts.latent import finished_out, image_size, unnoised_samples
from ..hosts.sockets import context_of
from ..hosts.trajectory import trajectory_in, trajectory_rest
from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.noise import image_seeds
from ..pipelines.core.sigmas import executed_steps
from ..pipelines.diffedit import (
    DiffEditMask,
    DiffEditSettings,
    MaskRule,
    diffedit,
    diffedit_mask,
    heat_image,
    mask_in_pixels,
    masked_decode,
    strength_sigma,
)
from ..pipelines.inversion.ddim import MODES, InversionOptions
from ._api import MaskScheduleSocket, io, reproduction_switch, schema, show_text
from ._inputs import (
    cfg_input,
    edited_output,
    encoding_ratio_input,
    latent_input,
    model_input,
    negative_input,
    prompt_pair_inputs,
    seed_input,
    steps_input,
    strength_input,
    trajectory_input,
)
from .blended.blending import as_schedule


def _prompts() -> list:
    return prompt_pair_inputs(
        "The source prompt: what the image shows. An empty prompt works less precisely.",
        "The target prompt: the source prompt with the words of the edit changed.",
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


def _mask_inputs() -> list:
    return [
        io.Int.Input("maps", default=10, min=1, max=100, tooltip="How many noise draws are averaged, 1 to 100."),
        strength_input(0.5, 0.02, "Noise strength of the comparison, 0.02 to 1."),
        io.Float.Input(
            "threshold",
            default=0.5,
            min=0.01,
            max=0.99,
            step=0.01,
            tooltip="Share of the ceiling above which a latent pixel is edited. Lower values give a larger mask.",
        ),
    ]


def _rule_inputs() -> list:
    return [
        io.Float.Input(
            "clip_ratio",
            default=3.0,
            min=0.1,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="The ceiling of the difference map, 0.1 to 100 times its mean. Larger differences are clipped.",
        ),
        io.Int.Input(
            "smooth",
            default=1,
            min=1,
            max=31,
            step=2,
            optional=True,
            tooltip="Side of the averaging window in latent pixels, odd, 1 to 31. 1 = no smoothing.",
        ),
        io.Int.Input(
            "smallest_island",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="Remove connected regions smaller than this many latent pixels. 0 keeps all.",
        ),
    ]


def _vae_for_size() -> io.Vae.Input:
    return io.Vae.Input(
        "vae",
        optional=True,
        tooltip="The VAE, for its scale factor. Needed only for a latent from ComfyUI's VAE Encode.",
    )


def _mask_outputs() -> list:
    return [
        io.Mask.Output("mask", display_name="mask", tooltip="The mask at the size of the image, [B, H, W], 1 = edit."),
        io.Mask.Output(
            "latent_mask", display_name="latent mask", tooltip="The mask on the latent grid, [B, h, w], 1 = edit."
        ),
        io.Image.Output(
            "heat_map",
            display_name="heat map",
            tooltip="The difference between the two prompts, from black (none) to white (the ceiling).",
        ),
    ]


def _image_size(latent: Any, vae: Any) -> tuple[int, int, int]:
    return image_size(latent, None if vae is None else codec_of(vae))


def _shown(found: DiffEditMask, size: tuple[int, int, int]) -> tuple:
    """The three mask outputs and the line of text below the node."""
    mask, heat = to_host(mask_in_pixels(found.mask, *size)), to_host(heat_image(found.heat, *size))
    shares = ", ".join(f"{share:.0%}" for share in found.mask.mean(dim=(1, 2)).tolist())
    text = f"to edit: {shares} of the image"
    if found.empty:
        text += f". Nothing found in image {', '.join(map(str, found.empty))}: do the prompts differ?"
    return (mask, to_host(found.mask), heat), text


class DiffEditMaskNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DiffEditMask",
            display_name="DiffEdit Mask",
            category="EditKit/mask",
            description=(
                "Finds the mask of an edit from two prompts. The image is noised; where the model predicts different noise for "
                "the two prompts, the image must change. Equal prompts give an empty mask and a warning."
            ),
            search_aliases=["automatic mask", "text mask", "prompt difference", "segmentation"],
            inputs=[
                model_input(),
                latent_input(),
                *_prompts(),
                *_mask_inputs(),
                seed_input("Seed of the noises. Every image of the batch has its own."),
                *_rule_inputs(),
                io.Float.Input(
                    "sigma",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    optional=True,
                    tooltip="Compare at this sigma instead of the one given by strength. 0 = use strength.",
                ),
                reproduction_switch(
                    io.Boolean,
                    "batch_mean",
                    default=False,
                    optional=True,
                    tooltip="Use one ceiling for the whole batch, as in diffusers. Images of a batch then affect each other.",
                ),
                _vae_for_size(),
            ],
            outputs=[
                *_mask_outputs(),
                io.Mask.Output(
                    "change",
                    display_name="soft map",
                    tooltip="The difference on the latent grid, 0 to 1. Use it in 'Soft Mask Schedule'.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        source,
        target,
        maps,
        strength,
        threshold,
        seed,
        clip_ratio=3.0,
        smooth=1,
        smallest_island=0,
        sigma=0.0,
        batch_mean=False,
        vae=None,
    ) -> io.NodeOutput:
        clean, size = unnoised_samples(latent, "latent"), _image_size(latent, vae)
        rule = MaskRule(clip_ratio, threshold, smooth, smallest_island, batch_mean)
        contexts = [context_of(source, "source"), context_of(target, "target")]
        with open_denoiser(model, clean.shape, contexts) as denoiser:
            found = diffedit_mask(
                denoiser,
                clean,
                *contexts,
                maps=maps,
                rule=rule,
                sigma=sigma if sigma > 0 else strength_sigma(denoiser, strength),
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                max_batch=batch_that_fits(model, clean.shape),
                progress=progress_bar(maps),
            )
        outputs, text = _shown(found, size)
        return io.NodeOutput(*outputs, to_host(found.heat), ui=show_text(cls, outputs[2], text))


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
            display_name="DiffEdit (All in One)",
            category="EditKit/sampling",
            description=(
                "Edits an image by two prompts, without drawing a mask: finds the mask, inverts the image, and decodes it with "
                "the target prompt under the mask. The latent outside the mask ends exactly as the source."
            ),
            search_aliases=["automatic mask edit", "text edit", "diffedit", "replace object"],
            inputs=[
                model_input(),
                latent_input(),
                *_prompts(),
                negative_input(),
                cfg_input(),
                steps_input(),
                _encoding_ratio(),
                *_mask_inputs(),
                seed_input("Seed of the mask's noises. Every image of the batch has its own."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="next",
                    optional=True,
                    tooltip="How to invert. next: fast, not for flow models. current: the paper's equation. implicit: exact, up "
                    "to 5 times the model calls.",
                ),
                *_rule_inputs(),
                _legacy_offset(),
                io.Conditioning.Input(
                    "inversion",
                    optional=True,
                    tooltip="The inversion prompt. Without it: the source prompt. The paper uses an empty prompt.",
                ),
                _vae_for_size(),
            ],
            outputs=[edited_output(), *_mask_outputs()],
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
    ) -> io.NodeOutput:
        clean, size = unnoised_samples(latent, "latent"), _image_size(latent, vae)
        rule = MaskRule(clip_ratio, threshold, smooth, smallest_island)
        settings = DiffEditSettings(
            steps, encoding_ratio, maps, strength, cfg, legacy_offset, rule, InversionOptions(mode)
        )
        source_prompt, prompt = context_of(source, "source"), context_of(target, "target")
        inversion_prompt = source_prompt if inversion is None else context_of(inversion, "inversion")
        negative_prompt = negative_in(negative)
        opened = [*opened_for(prompt, negative_prompt, cfg), *prompts_to_open(source_prompt, inversion_prompt)]
        sigma_grid = sampling_of(model).schedule(steps)
        with open_denoiser(model, clean.shape, opened, sigmas=sigma_grid) as denoiser:
            result = diffedit(
                denoiser,
                clean,
                source_prompt,
                prompt,
                negative_prompt,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                settings=settings,
                inversion=inversion_prompt,
                max_batch=batch_that_fits(model, clean.shape),
                progress=progress_bar(maps + 2 * executed_steps(steps, encoding_ratio), model),
            )
        outputs, text = _shown(result.mask, size)
        edited = finished_out(result.latent, like=latent)
        return io.NodeOutput(edited, *outputs, ui=show_text(cls, outputs[2], text))


NODES = [DiffEditMaskNode, MaskedDecode, DiffEdit]
