"""Flow models: inversion by the literature's solvers, the edit that samples back, and FlowEdit, which needs no inversion."""

from __future__ import annotations

from ...hosts.embeddings import negative_in, opened_for
from ...hosts.host import open_denoiser, progress_bar
from ...hosts.latent import finished_out, latent_out, unnoised_samples, without_sources
from ...hosts.sockets import context_of, prompt_pair
from ...hosts.trajectory import trajectory_in, trajectory_out, trajectory_rest
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.sigmas import check_sigmas, executed_steps
from ...pipelines.inversion.flow import (
    IMPLICIT,
    SOLVERS,
    FlowInversionOptions,
    SourceGuidance,
    invert_flow,
    sample_inverted,
)
from ...pipelines.inversion.flow_edit import FlowEditOptions, flow_edit
from .._api import MaskScheduleSocket, TrajectorySocket, io, schema
from .._inputs import (
    PATCHES_STAY,
    cfg_input,
    edited_output,
    encoding_ratio_input,
    fraction_input,
    latent_input,
    model_input,
    negative_input,
    seed_input,
    sigmas_input,
    trajectory_input,
)
from ..blended.blending import as_schedule

SOLVER_TOOLTIP = (
    "Euler: 1 model call per step. implicit: the exact inverse of Euler, at up to 'iterations' calls per step. RF-Inversion: "
    "drawn to noise, 1 call. RF-Solver: second order, 2 calls. FireFlow: second order, 1 call."
)


def _solver_input(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("solver", options=list(SOLVERS), default=IMPLICIT, tooltip=tooltip)


class FlowInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_FlowInversion",
            display_name="Flow Inversion (RF-Inversion)",
            category="EditKit/inversion",
            description=(
                "Inverts an image to noise with a flow model (SD3, Flux) and keeps the latent at every sigma: the "
                "trajectory. Invert once, edit many times. For SD 1.x, SD 2.x and SDXL use 'DDIM Inversion'."
            ),
            search_aliases=["RF inversion", "rectified flow", "unsample", "FireFlow", "RF-Solver", "Flux inversion"],
            inputs=[
                model_input(f"A flow model. {PATCHES_STAY}"),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The inversion prompt: what the image shows, or an empty prompt for RF-Inversion.",
                ),
                latent_input(),
                sigmas_input("All sigmas of the edit, ending at 0: a scheduler node at denoise 1."),
                _solver_input(SOLVER_TOOLTIP),
                fraction_input(
                    "gamma",
                    0.5,
                    "RF-Inversion: share of the velocity to the noise of the seed. 0 = Euler, 1 = that noise.",
                ),
                io.Int.Input("iterations", default=5, min=1, max=100, tooltip="implicit: most model calls per step."),
                encoding_ratio_input(1.0, "Fraction of the steps to invert, 0 to 1, counted from the image."),
                seed_input("RF-Inversion: seed of the noise.", control=False),
            ],
            outputs=[
                TrajectorySocket.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="The latent at every sigma. It belongs to this model, these sigmas and this size.",
                ),
                io.Latent.Output(
                    "noised",
                    display_name="noised latent",
                    tooltip="The noisiest latent, for a sampler on the same sigmas that adds no noise.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent, sigmas, solver, gamma, iterations, encoding_ratio, seed) -> io.NodeOutput:
        options = FlowInversionOptions(solver, gamma, iterations)
        sigma_grid, clean = check_sigmas(sigmas), unnoised_samples(latent, "latent")
        rest, prompt = without_sources(latent), context_of(positive, "positive")
        steps = executed_steps(len(sigma_grid) - 1, encoding_ratio)
        with open_denoiser(model, clean.shape, [prompt], sigmas=sigma_grid) as denoiser:
            inverted = invert_flow(
                denoiser,
                clean,
                prompt,
                sigma_grid,
                options=options,
                ratio=encoding_ratio,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                progress=progress_bar(steps, model),
            )
            noised = latent_out(inverted.latents[0], denoiser, float(sigma_grid[inverted.first]), like=rest)
        return io.NodeOutput(trajectory_out(inverted, like=rest), noised)


class FlowInversionEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_FlowInversionEdit",
            display_name="Flow Inversion Edit",
            category="EditKit/sampling",
            description=(
                "Samples from an inverted image with a new prompt, by the solver that inverted it. RF-Inversion's guidance "
                "mixes the source into the first steps, so that the layout stays."
            ),
            search_aliases=["RF inversion", "rectified flow", "resample", "Flux edit"],
            inputs=[
                model_input(f"The model that inverted. {PATCHES_STAY}"),
                io.Conditioning.Input("positive", tooltip="The prompt of the edit: what the whole image should show."),
                negative_input(),
                cfg_input(1.0, "CFG scale, 1 to 30. Models with distilled guidance, as Flux dev, run at 1."),
                trajectory_input("From 'Flow Inversion' with this model."),
                _solver_input("The solver of the inversion. implicit and RF-Inversion sample by Euler steps."),
                fraction_input("eta", 0.9, "Share of the source in the prediction, 0 to 1. 0 = free, 1 = the source."),
                fraction_input("start", 0.0, "Fraction of the steps where eta begins to act, 0 to 1."),
                fraction_input(
                    "stop", 0.25, "Fraction of the steps where it ends, 0 to 1. The longer, the closer to the source."
                ),
            ],
            outputs=[edited_output()],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, trajectory, solver, eta, start, stop) -> io.NodeOutput:
        guidance, inverted = SourceGuidance(eta, start, stop), trajectory_in(trajectory)
        prompt, negative_prompt = context_of(positive, "positive"), negative_in(negative)
        opened = opened_for(prompt, negative_prompt, cfg)
        with open_denoiser(model, inverted.source_latent.shape, opened, sigmas=inverted.sigmas) as denoiser:
            edited = sample_inverted(
                denoiser,
                inverted,
                EditPrompts(prompt, negative_prompt, cfg),
                solver=solver,
                guidance=guidance,
                progress=progress_bar(inverted.steps - inverted.first, model),
            )
        return io.NodeOutput(finished_out(edited, like=trajectory_rest(trajectory)))


def _flow_edit_inputs() -> list:
    return [
        io.Float.Input(
            "source_cfg",
            display_name="source CFG",
            default=3.5,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="CFG scale under the source prompt, 1 to 30. SD3: 3.5; with distilled guidance: 1.",
        ),
        io.Float.Input(
            "target_cfg",
            display_name="target CFG",
            default=13.5,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="CFG scale under the target prompt, 1 to 30. SD3: 13.5; with distilled guidance: 1.",
        ),
        io.Int.Input(
            "n_max",
            display_name="steps that edit",
            default=33,
            min=1,
            max=1000,
            tooltip="The last steps of the grid that edit; the fewer, the closer to the source. SD3: 33 of 50, Flux: 24 of 28.",
        ),
        io.Int.Input(
            "n_min",
            display_name="plain steps at the end",
            default=0,
            min=0,
            max=1000,
            tooltip="Of these steps, the last ones that sample the target prompt alone. 0 as published.",
        ),
        io.Int.Input(
            "n_avg",
            display_name="noises per step",
            default=1,
            min=1,
            max=64,
            tooltip="Noises that every step averages over. Each costs as many model calls again.",
        ),
    ]


class FlowEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_FlowEdit",
            display_name="FlowEdit (Replace Object)",
            category="EditKit/sampling",
            description=(
                "Edits an image by its source and target prompts, without inversion and without a mask (Kulikov et al. 2025). "
                "For flow models (SD3, Flux), and for SD 1.x, SD 2.x and SDXL."
            ),
            search_aliases=["flow edit", "inversion free", "Flux edit", "SD3 edit", "replace object"],
            inputs=[
                model_input(),
                io.Conditioning.Input("source", tooltip="The source prompt: what the image shows."),
                io.Conditioning.Input("target", tooltip="The target prompt: what the edited image should show."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of both. Not evaluated at CFG 1."),
                latent_input(),
                sigmas_input("All sigmas, ending at 0: a scheduler node at denoise 1."),
                *_flow_edit_inputs(),
                seed_input(),
                io.MultiType.Input(
                    "latent_mask",
                    types=[io.Mask, MaskScheduleSocket],
                    optional=True,
                    tooltip="A latent mask or a mask schedule, 1 = edit. Outside, the latent stays exactly as it is.",
                ),
            ],
            outputs=[edited_output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        source,
        target,
        negative,
        latent,
        sigmas,
        source_cfg,
        target_cfg,
        n_max,
        n_min,
        n_avg,
        seed,
        latent_mask=None,
    ) -> io.NodeOutput:
        options = FlowEditOptions(n_max, n_min, n_avg)
        sigma_grid, clean = check_sigmas(sigmas), unnoised_samples(latent, "latent")
        old, new = prompt_pair(source, target)
        negative_prompt = context_of(negative, "negative")
        opened = [old, new] if source_cfg == target_cfg == 1 else [old, new, negative_prompt]
        with open_denoiser(model, clean.shape, opened, sigmas=sigma_grid) as denoiser:
            edited = flow_edit(
                denoiser,
                clean,
                EditPrompts(old, negative_prompt, source_cfg),
                EditPrompts(new, negative_prompt, target_cfg),
                sigma_grid,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                options=options,
                masks=None if latent_mask is None else as_schedule(latent_mask),
                progress=progress_bar(min(n_max, len(sigma_grid) - 1), model),
            )
        return io.NodeOutput(finished_out(edited, like=latent))


NODES = [FlowInversion, FlowInversionEdit, FlowEdit]
