"""DiffEdit Mask: the mask of an edit from two prompts."""

from __future__ import annotations

from ...hosts.host import batch_that_fits, open_denoiser, progress_bar, to_host
from ...hosts.latent import unnoised_samples
from ...hosts.sockets import prompt_pair
from ...pipelines.core.noise import image_seeds
from ...pipelines.diffedit.mask import MaskRule, diffedit_mask, strength_sigma
from .._api import io, reproduction_switch, schema, show_text
from .._inputs import latent_input, model_input, seed_input
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


class DiffEditMaskNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DiffEditMask",
            display_name="DiffEdit Mask from Text",
            category="EditKit/mask",
            description=(
                "Finds the mask of an edit from two prompts. The image is noised; where the model predicts different noise for "
                "the two prompts, the image must change. Equal prompts give an empty mask and a warning."
            ),
            search_aliases=["automatic mask", "text mask", "prompt difference", "segmentation"],
            inputs=[
                model_input(),
                latent_input(),
                *prompts(),
                *mask_inputs(),
                seed_input("Seed of the noises. Every image of the batch has its own."),
                *rule_inputs(),
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
                vae_for_size(),
                *negative_inputs(),
            ],
            outputs=[
                *mask_outputs(),
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
        source_negative=None,
        target_negative=None,
        mask_cfg=7.5,
    ) -> io.NodeOutput:
        clean, size = unnoised_samples(latent, "latent"), size_of(latent, vae)
        rule = MaskRule(clip_ratio, threshold, smooth, smallest_island, batch_mean)
        contexts = prompt_pair(source, target)
        negatives = negatives_in(source_negative, target_negative, mask_cfg)
        with open_denoiser(model, clean.shape, [*contexts, *mask_prompts(negatives)]) as denoiser:
            found = diffedit_mask(
                denoiser,
                clean,
                *contexts,
                maps=maps,
                rule=rule,
                negatives=negatives,
                sigma=sigma if sigma > 0 else strength_sigma(denoiser, strength),
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                max_batch=batch_that_fits(model, clean.shape),
                progress=progress_bar(maps),
            )
        outputs, text = shown(found, size)
        return io.NodeOutput(*outputs, to_host(found.heat), ui=show_text(cls, outputs[2], text))


NODES = [DiffEditMaskNode]
