"""SDEdit: image to image by noising and denoising."""

from __future__ import annotations

from ..hosts.embeddings import negative_in, opened_for
from ..hosts.host import open_denoiser, progress_bar, sampling_of
from ..hosts.latent import finished_out, unnoised_samples
from ..hosts.sockets import context_of
from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.noise import image_seeds
from ..pipelines.core.samplers import SAMPLERS
from ..pipelines.sdedit import sdedit
from ._api import io, schema
from ._inputs import (
    cfg_input,
    edited_output,
    latent_input,
    model_input,
    negative_input,
    seed_input,
    steps_input,
    strength_input,
)


class SDEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_SDEdit",
            display_name="SDEdit (img2img)",
            category="EditKit/sampling",
            description=(
                "Image to image: adds noise to the image and denoises it with the prompt. There is no mask, so the whole image "
                "may change; strength decides how much."
            ),
            search_aliases=["img2img", "image to image", "stroke painting"],
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="What the whole image should show."),
                negative_input(),
                latent_input(),
                cfg_input(5.0),
                steps_input("Steps of the full schedule, of which the last ones run."),
                strength_input(0.6, 0.0, "Fraction of the steps that run, 0 to 1. 0 returns the image, 1 ignores it."),
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="euler and ddim are the same first-order method here. dpmpp_2m is second order.",
                ),
                seed_input(),
            ],
            outputs=[edited_output()],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, strength, sampler, seed) -> io.NodeOutput:
        clean = unnoised_samples(latent, "latent")
        prompt, negative_prompt = context_of(positive, "positive"), negative_in(negative)
        if strength == 0:
            return io.NodeOutput(finished_out(clean, like=latent))
        sigma_grid = sampling_of(model).schedule(steps, strength)
        opened = opened_for(prompt, negative_prompt, cfg)
        with open_denoiser(model, clean.shape, opened, sigmas=sigma_grid) as denoiser:
            edited = sdedit(
                denoiser,
                clean,
                EditPrompts(prompt, negative_prompt, cfg),
                steps=steps,
                strength=strength,
                sampler=sampler,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                progress=progress_bar(len(sigma_grid) - 1, model),
            )
            return io.NodeOutput(finished_out(edited, like=latent))


NODES = [SDEdit]
