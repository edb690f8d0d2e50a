"""Nodes of Blended Latent Diffusion: sigmas, noise, the blended loop, and the model patch for any sampler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...hosts.embeddings import negative_in, opened_for
from ...hosts.host import blended_model, open_denoiser, progress_bar, sampling_of
from ...hosts.latent import candidates_out, finished_out, latent_in, latent_out, noise_seed, samples_of, sources_of
from ...hosts.sockets import context_of
from ...hosts.trajectory import trajectory_in
from ...pipelines.blended.blending import BlendOptions, blended_denoise, unscale_over_source
from ...pipelines.blended.candidates import noised_candidates
from ...pipelines.core.errors import MismatchError, ParameterError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.masks import MaskSchedule, constant_schedule
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.shapes import check_latent, common_batch, match_batch, refuse_nan, with_sources
from ...pipelines.core.sigmas import ENDS, ROUNDINGS, PublishedGrid, check_sigmas
from ...pipelines.core.trajectory import Trajectory
from .._api import io, reproduction_switch, schema
from .._inputs import (
    cfg_input,
    latent_input,
    mask_schedule_input,
    model_input,
    negative_input,
    seed_input,
    sigmas_input,
    steps_input,
    strength_input,
    trajectory_input,
)

TO_THE_END = 10000


def as_schedule(value) -> MaskSchedule:
    """The mask schedule of a socket. A plain latent MASK becomes a schedule that is the same at every step.

    Raises: ShapeError for a value that is neither, and for NaN or infinity.
    """
    if not isinstance(value, MaskSchedule):
        return constant_schedule(value)
    refuse_nan(value.masks, "schedule")
    return value


class EditSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_EditSigmas",
            display_name="Edit Sigmas (DDIM Scheduler)",
            category="EditKit/sampling",
            description=(
                "The sigmas of an edit: the DDIM schedule of the model, cut to its last steps by strength. You can use the "
                "SIGMAS of any scheduler instead."
            ),
            search_aliases=["scheduler", "ddim", "strength", "denoise", "noise schedule"],
            inputs=[
                model_input("The model that denoises. Its noise schedule gives the sigmas."),
                steps_input(),
                strength_input(
                    0.75,
                    0.01,
                    "Fraction of the steps that run, 0 to 1. 0.75 of 50 steps runs the last 38 and keeps the rough layout; "
                    "1 starts from pure noise.",
                ),
                *_published_grid_inputs(),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", display_name="sigmas", tooltip="Falling sigmas that end at 0, one more than steps to run."
                )
            ],
        )

    @classmethod
    def execute(cls, model, steps, strength, end=ENDS[0], offset=1, rounding=ROUNDINGS[0]) -> io.NodeOutput:
        sampling, published = sampling_of(model), PublishedGrid(offset, end, rounding)
        if published == PublishedGrid():
            return io.NodeOutput(sampling.schedule(steps, strength).cpu())
        return io.NodeOutput(published.sigmas(sampling.training_sigmas, steps, strength).cpu())


def _published_grid_inputs() -> list:
    """The grids of the published scripts (docs/methods.md, section 0.3)."""
    return [
        reproduction_switch(
            io.Combo,
            "end",
            options=list(ENDS),
            default=ENDS[0],
            optional=True,
            tooltip="The last sigma. 0 (denoised): the image itself. first training sigma: as in the published scripts, which "
            "end at the noise of timestep 0.",
        ),
        reproduction_switch(
            io.Int,
            "offset",
            default=1,
            min=0,
            max=1,
            optional=True,
            tooltip="Offset of the timesteps. 1: 981 to 1 of 50 steps. 0: 980 to 0, as in the SD2 script.",
        ),
        reproduction_switch(
            io.Combo,
            "rounding",
            options=list(ROUNDINGS),
            default=ROUNDINGS[0],
            optional=True,
            tooltip="Rounding of steps x strength. up: 38 of 50 steps at 0.75. down: 37, as diffusers counts.",
        ),
    ]


class NoiseLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_NoiseLatent",
            display_name="Noise Latent to Sigma (Add Noise)",
            category="EditKit/latent",
            description=(
                "Adds noise to a clean latent up to one sigma of the edit. This is the latent a blended edit starts from. Set "
                "copies to make several candidates per image."
            ),
            search_aliases=["add noise", "start latent", "batch of candidates", "best of"],
            inputs=[
                model_input("The model that denoises. It decides how noise is added (diffusion or flow)."),
                latent_input("Clean latent of the source image."),
                sigmas_input("The sigmas of the edit."),
                io.Int.Input(
                    "step", default=0, min=0, max=TO_THE_END, tooltip="Index of the sigma, from 0 (noisiest)."
                ),
                seed_input(
                    "Seed of the noise. Every candidate has its own noise. The latent carries it to 'Blended Denoise Step'."
                ),
                io.Int.Input(
                    "copies",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Candidates per image, 1 to 256, for ranking afterwards. Images a and b become a b a b ...",
                ),
                reproduction_switch(
                    io.Combo,
                    "start",
                    options=["noised source", "noise alone"],
                    default="noised source",
                    tooltip="noised source: source plus noise, as in the paper. noise alone: unit noise at any sigma, as in the "
                    "published SD2 script.",
                ),
            ],
            outputs=[io.Latent.Output("noised", display_name="noised latent", tooltip="The latent at that sigma.")],
        )

    @classmethod
    def execute(cls, model, latent, sigmas, step, seed, copies, start) -> io.NodeOutput:
        sigma_grid = check_sigmas(sigmas).tolist()
        if step >= len(sigma_grid):
            raise ParameterError(f"step is {step}: the last index of these sigmas is {len(sigma_grid) - 1}")
        denoiser, sigma = sampling_of(model), sigma_grid[step]
        found = noised_candidates(
            denoiser,
            samples_of(latent),
            sigma,
            seed=seed,
            copies=copies,
            batch_index=latent.get("batch_index"),
            from_source=start == "noised source",
        )
        return io.NodeOutput(candidates_out(found, denoiser, sigma, seed, like=latent))


def source_trajectory_of(trajectory: Any, source: Tensor) -> Trajectory:
    """The trajectory of the source latent [B, C, h, w]. Raises MismatchError if it belongs to another image."""
    inverted = trajectory_in(trajectory)
    found = inverted.source_latent
    common_batch(trajectory=found, source_latent=source)
    if found.shape[1:] != source.shape[1:] or not (found == source.to(found)).all():
        raise MismatchError(
            f"trajectory was made from another image than source_latent ({list(found.shape)} and {list(source.shape)}): "
            "connect the LATENT that was inverted as source_latent"
        )
    return inverted


class BlendedDenoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendedDenoise",
            display_name="Blended Denoise Step, Inpaint (BLD)",
            category="EditKit/sampling",
            description=(
                "Inpainting by Blended Latent Diffusion: denoises with the prompt and replaces everything outside the mask by "
                "the source at the same sigma, after every step. Runs one step, a range or all steps. At sigma 0 the latent "
                "outside the mask equals the source exactly."
            ),
            search_aliases=[
                "blended latent diffusion",
                "inpaint",
                "masked edit",
                "BLD",
                "replace object",
                "remove object",
            ],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt of the edit. Describing the whole image works best."
                ),
                negative_input(
                    "The negative prompt, or the embeddings of an inversion (one per step). Unused at cfg 1."
                ),
                cfg_input(5.0),
                sigmas_input("All sigmas of the edit, also when this node runs only a range of the steps."),
                latent_input("The latent at start_step, from 'Noise Latent to Sigma' or from the previous range."),
                io.Latent.Input("source_latent", tooltip="Clean latent of the source: one, or one per image."),
                mask_schedule_input(),
                io.Int.Input("start_step", default=0, min=0, max=TO_THE_END, tooltip="First step to run, from 0."),
                io.Int.Input(
                    "end_step",
                    default=TO_THE_END,
                    min=1,
                    max=TO_THE_END,
                    tooltip="Stop before this step. 10000 = run to the end.",
                ),
                seed_input(
                    "Seed of the background's noise. A latent from 'Noise Latent to Sigma' carries its seed, which is used instead."
                ),
                *_variant_inputs(),
                trajectory_input(
                    "Inversion of the source from 'DDIM Inversion'. It is used as background instead of fresh noise; start from "
                    "its noised latent.",
                    optional=True,
                ),
            ],
            outputs=[io.Latent.Output("blended", display_name="latent", tooltip="The latent at end_step.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        cfg,
        sigmas,
        latent,
        source_latent,
        schedule,
        start_step,
        end_step,
        seed,
        blend="after",
        background_level="aligned",
        background_noise="fixed",
        eta=0.0,
        trajectory=None,
    ) -> io.NodeOutput:
        sigma_grid, masks = check_sigmas(sigmas), as_schedule(schedule)
        start = check_latent(samples_of(latent), "latent")
        source = check_latent(samples_of(source_latent), "source_latent")
        inverted = None if trajectory is None else source_trajectory_of(trajectory, source)
        sources = sources_of(latent, "latent")
        source, masks = with_sources(source, sources, "source_latent", "latent"), masks.with_sources(sources)
        batch = common_batch(latent=start, source_latent=source, schedule=masks.masks[0])
        prompt, negative_prompt = context_of(positive, "positive"), negative_in(negative)
        last = min(end_step, len(sigma_grid) - 1)
        opened = opened_for(prompt, negative_prompt, cfg)
        with open_denoiser(model, (batch, *start.shape[1:]), opened, sigmas=sigma_grid) as denoiser:
            noised = latent_in(latent, denoiser, _sigma_at(sigma_grid, start_step))
            z = blended_denoise(
                denoiser,
                match_batch(noised, batch, "latent", "the batch"),
                inverted or denoiser.scale_in(source),
                sigma_grid,
                masks,
                EditPrompts(prompt, negative_prompt, cfg),
                seeds=image_seeds(noise_seed(latent, seed), batch, latent.get("batch_index")),
                start=start_step,
                end=end_step,
                options=BlendOptions(blend, background_level, background_noise, eta),
                progress=progress_bar(last - start_step, model),
            )
            # A trajectory ends at the source, wherever its sigmas end.
            ends_clean = last == len(sigma_grid) - 1 and (sigma_grid[-1] == 0 or inverted is not None)
            if ends_clean and blend == "after" and background_level == "aligned":
                done = unscale_over_source(denoiser, z, source, masks, sigma_grid)
                return io.NodeOutput(finished_out(done, like=latent))
            return io.NodeOutput(latent_out(z, denoiser, float(sigma_grid[last]), like=latent))


def _sigma_at(sigma_grid, step: int) -> float:
    return float(sigma_grid[min(step, len(sigma_grid) - 1)])


def _variant_inputs() -> list:
    """The variants of the published scripts (docs/methods.md, section 16, rows 1, 2 and 5)."""
    return [
        reproduction_switch(
            io.Combo,
            "blend",
            options=["after", "before"],
            default="after",
            optional=True,
            tooltip="after: blend after each step, as in the paper; ends at the source. before: blend before each step, as in "
            "the LDM script.",
        ),
        reproduction_switch(
            io.Combo,
            "background_level",
            display_name="background sigma",
            options=["aligned", "previous", "previous (DDIM)"],
            default="aligned",
            optional=True,
            tooltip="aligned: background at the sigma just reached. previous: at the sigma before it, as in the SDXL script; "
            "noise stays outside the mask. previous (DDIM): the same in DDIM's scale, as in the SD2 script.",
        ),
        reproduction_switch(
            io.Combo,
            "background_noise",
            options=["fixed", "fresh"],
            default="fixed",
            optional=True,
            tooltip="fixed: one noise for all steps. fresh: new noise at every step, as in the published scripts.",
        ),
        io.Float.Input(
            "eta",
            display_name="DDIM eta",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Noise added per step, 0 to 1. 0 = deterministic DDIM, 1 = as much as DDPM.",
        ),
    ]


class BlendedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendedModel",
            display_name="Blended Latent Diffusion Patch (Any Sampler)",
            category="EditKit/sampling",
            description=(
                "Patches a model so that KSampler and SamplerCustomAdvanced inpaint only under the mask, with any sampler. "
                "Outside the mask the result equals the latent the sampler starts from."
            ),
            search_aliases=["blended latent diffusion", "inpaint model", "KSampler mask", "inpaint"],
            inputs=[
                model_input("Any diffusion model. The output is a patched clone."),
                mask_schedule_input(),
                sigmas_input(
                    "The sigmas on which the stages of the schedule are counted. Without it: the sampler's own sigmas.",
                    optional=True,
                ),
                io.Latent.Input(
                    "source_latent",
                    optional=True,
                    tooltip="Clean latent of the source, for a sampler that starts from a noised latent (second stage of "
                    "KSampler Advanced). Without it: the latent the sampler starts from.",
                ),
            ],
            outputs=[io.Model.Output("blended_model", display_name="model", tooltip="For any sampler or guider.")],
        )

    @classmethod
    def execute(cls, model, schedule, sigmas=None, source_latent=None) -> io.NodeOutput:
        sigma_grid = None if sigmas is None else check_sigmas(sigmas)
        source = None if source_latent is None else check_latent(samples_of(source_latent), "source_latent")
        return io.NodeOutput(blended_model(model, as_schedule(schedule), source=source, sigmas=sigma_grid))


NODES = [EditSigmas, NoiseLatent, BlendedDenoise, BlendedModel]
