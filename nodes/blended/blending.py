"""Blending nodes: levels, noise, the blended loop in one step or many, and the same for native samplers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...hosts import host as _host
from ...pipelines.blended.blending import BlendOptions, blended_denoise, finished_latent
from ...pipelines.core.errors import MismatchError, ParameterError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.masks import MaskSchedule, constant_schedule
from ...pipelines.core.noise import image_seeds, seeded_noise, start_latent
from ...pipelines.core.shapes import check_latent, common_batch, match_batch
from ...pipelines.core.sigmas import check_sigmas
from ...pipelines.core.trajectory import Trajectory
from .._api import EmbeddingsSocket, MaskScheduleSocket, TrajectorySocket, io, schema

TO_THE_END = 10000
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def as_schedule(value) -> MaskSchedule:
    """The socket takes a schedule or a plain latent MASK, which is then the same at every step."""
    return value if isinstance(value, MaskSchedule) else constant_schedule(value)


class EditSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_EditSigmas",
            display_name="Sigmas for an edit",
            category="EditKit/blend",
            description=(
                "The noise levels of an edit: the last part of DDIM's grid, as Stable Diffusion was published. "
                "Any native scheduler's SIGMAS fit in its place."
            ),
            search_aliases=["scheduler", "ddim", "strength", "noise levels"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will denoise; the grid comes from its noise schedule."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps of the whole grid, from pure noise to the picture.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.75,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The part of the grid that runs, 0 to 1. 0.75 of 50 steps runs the last 38 and keeps the "
                    "rough layout under the mask; 1 starts from pure noise.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", display_name="sigmas", tooltip="Levels from noisy to 0, one more than steps to run."
                )
            ],
        )

    @classmethod
    def execute(cls, model, steps, strength) -> io.NodeOutput:
        return io.NodeOutput(_host.levels(model).schedule(steps, strength).cpu())


class NoiseLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_NoiseLatent",
            display_name="Noise latent to a level",
            category="EditKit/blend",
            description="Noises a clean latent to one level of an edit: where the blended loop starts.",
            search_aliases=["add noise", "start latent", "batch of candidates"],
            inputs=[
                io.Model.Input("model", tooltip="Decides how noise is added (diffusion or flow)."),
                io.Latent.Input("latent", tooltip="Clean latent of the source picture."),
                io.Sigmas.Input("sigmas", tooltip="The grid of the edit."),
                io.Int.Input(
                    "step", default=0, min=0, max=TO_THE_END, tooltip="Index into the sigmas: 0 is the noisiest level."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Image b of the batch uses seed + b. Give the blended loop the same seed.",
                ),
                io.Int.Input(
                    "copies",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="How many candidates per picture: a batch to rank afterwards.",
                ),
                io.Combo.Input(
                    "start",
                    options=["noised source", "noise alone"],
                    default="noised source",
                    tooltip="noised source: as the paper. noise alone: unit noise whatever the level, as the published SD2 script.",
                ),
            ],
            outputs=[io.Latent.Output("noised", display_name="noised latent", tooltip="The latent at that level.")],
        )

    @classmethod
    def execute(cls, model, latent, sigmas, step, seed, copies, start) -> io.NodeOutput:
        levels = check_sigmas(sigmas).tolist()
        if step >= len(levels):
            raise ParameterError(f"step is {step}: these sigmas have levels 0 to {len(levels) - 1}")
        samples = check_latent(_host.samples(latent), "latent")
        samples = samples.repeat_interleave(copies, dim=0)
        denoiser = _host.levels(model)
        source = denoiser.scale_in(samples)
        seeds = image_seeds(seed, len(source), latent.get("batch_index"))
        noise = seeded_noise(source.shape[1:], seeds, source.device)
        z = start_latent(denoiser, source, levels[step], noise, from_source=start == "noised source")
        return io.NodeOutput(_host.latent_out(z, denoiser, levels[step], like=latent))


def source_trajectory_of(trajectory: Any, source: Tensor) -> Trajectory:
    """The trajectory of the source latent [B, C, h, w]. Raises ShapeError, and MismatchError for another picture's."""
    path = _host.trajectory_in(trajectory)
    common_batch(trajectory=path.source_latent, source_latent=source)
    if (
        path.source_latent.shape[1:] != source.shape[1:]
        or not (path.source_latent == source.to(path.source_latent)).all()
    ):
        raise MismatchError(
            f"trajectory was made from another picture than source_latent ({list(path.source_latent.shape)} and {list(source.shape)}): "
            "connect the LATENT that was inverted as source_latent"
        )
    return path


class BlendedDenoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendedDenoise",
            display_name="Blended denoise (BLD)",
            category="EditKit/blend",
            description=(
                "Denoises towards the prompt and puts the source back outside the mask after every step, at the same noise "
                "level. One step, a range, or the whole loop: a chain of ranges equals the whole bit for bit. When it ends "
                "at sigma 0, the latent outside the mask is the source's exactly."
            ),
            search_aliases=["blended latent diffusion", "inpaint", "masked edit", "BLD"],
            inputs=[
                io.Model.Input("model", tooltip="Any model; LoRA, ControlNet and guidance patches stay in force."),
                io.Conditioning.Input(
                    "positive", tooltip="What should appear under the mask; describing the whole scene works best."
                ),
                io.MultiType.Input(
                    "negative",
                    types=[io.Conditioning, EmbeddingsSocket],
                    tooltip="What to move away from; not evaluated at cfg 1. Or the embeddings of an inversion, one per step.",
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale; 1 = no guidance, half the cost.",
                ),
                io.Sigmas.Input("sigmas", tooltip="The whole grid of the edit, also when only a range of it runs."),
                io.Latent.Input(
                    "latent", tooltip="The latent at level start_step: from 'Noise latent' or the range before."
                ),
                io.Latent.Input("source_latent", tooltip="The clean latent of the source: one, or one per image."),
                io.MultiType.Input(
                    "schedule",
                    types=[MaskScheduleSocket, io.Mask],
                    tooltip="A mask schedule, or a latent mask for the same mask at every step. 1 = edit.",
                ),
                io.Int.Input(
                    "start_step", default=0, min=0, max=TO_THE_END, tooltip="First step of this range, 0-based."
                ),
                io.Int.Input(
                    "end_step",
                    default=TO_THE_END,
                    min=1,
                    max=TO_THE_END,
                    tooltip="Step to stop before; 10000 = to the end.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the background's noise; the seed that noised the start. Image b uses seed + b.",
                ),
                *_options(),
                TrajectorySocket.Input(
                    "trajectory",
                    optional=True,
                    tooltip="Of the source, from 'Invert picture': its levels are then the background, and no noise is drawn. "
                    "Start from its noised latent.",
                ),
            ],
            outputs=[io.Latent.Output("blended", display_name="latent", tooltip="The latent at level end_step.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, sigmas, latent, source_latent, schedule, start_step, end_step, seed,
        blend="after", background_level="aligned", background_noise="fixed", eta=0.0, trajectory=None,
    ) -> io.NodeOutput:  # fmt: skip
        levels, masks = check_sigmas(sigmas), as_schedule(schedule)
        start, source = _host.samples(latent), check_latent(_host.samples(source_latent), "source_latent")
        check_latent(start, "latent")
        path = None if trajectory is None else source_trajectory_of(trajectory, source)
        batch = common_batch(latent=start, source_latent=source, schedule=masks.masks[0])
        towards, against = _host.context(positive, "positive"), _host.negative_in(negative)
        prompts, opened = EditPrompts(towards, against, cfg), _host.opened_for(towards, against, cfg)
        steps, last = len(levels) - 1, min(end_step, len(levels) - 1)
        with _host.open_denoiser(model, (batch, *start.shape[1:]), opened, sigmas=levels) as denoiser:
            z = match_batch(_host.latent_in(latent, denoiser, _level(levels, start_step)), batch, "latent", "the batch")
            z = blended_denoise(
                denoiser, z, path or denoiser.scale_in(source), levels, masks, prompts,
                seeds=image_seeds(seed, batch, latent.get("batch_index")),
                start=start_step, end=end_step,
                options=BlendOptions(blend, background_level, background_noise, eta),
                progress=_host.progress(last - start_step, model),
            )  # fmt: skip
            clean = levels[-1] == 0 or path is not None  # a path ends with the source, wherever its grid ends
            exact = last == steps and clean and blend == "after" and background_level == "aligned"
            if exact:
                done = finished_latent(denoiser.scale_out(z), source, masks, levels)
                return io.NodeOutput(_host.finished_out(done, like=latent))
            return io.NodeOutput(_host.latent_out(z, denoiser, float(levels[last]), like=latent))


def _level(levels, step: int) -> float:
    return float(levels[min(step, len(levels) - 1)])


def _options() -> list:
    """The published variants (methods.md, section 16, rows 1, 2 and 5)."""
    return [
        io.Combo.Input(
            "blend",
            options=["after", "before"],
            default="after",
            optional=True,
            tooltip="after: as the paper, ends at the clean source. before: as the LDM script, with the model's own background.",
        ),
        io.Combo.Input(
            "background_level",
            options=["aligned", "previous"],
            default="aligned",
            optional=True,
            tooltip="aligned: the level just reached. previous: one too noisy, as the SD2 and SDXL scripts; noise stays outside.",
        ),
        io.Combo.Input(
            "background_noise",
            options=["fixed", "fresh"],
            default="fixed",
            optional=True,
            tooltip="fixed: one noise for the run. fresh: a new one at every step, as published.",
        ),
        io.Float.Input(
            "eta",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="0 is deterministic DDIM; 1 adds as much noise per step as DDPM.",
        ),
    ]


class BlendedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendedModel",
            display_name="Blended model for any sampler (BLD)",
            category="EditKit/blend",
            description=(
                "Patches a model so that KSampler and SamplerCustomAdvanced edit only under the mask, with any sampler: the "
                "outside follows the LATENT that the sampler is given and ends at it exactly."
            ),
            search_aliases=["blended latent diffusion", "inpaint model", "KSampler mask"],
            inputs=[
                io.Model.Input("model", tooltip="Any model; the result is a patched clone, yours is not changed."),
                io.MultiType.Input(
                    "schedule",
                    types=[MaskScheduleSocket, io.Mask],
                    tooltip="A mask schedule, or a latent mask for the same mask at every step. 1 = edit.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The grid that the schedule's parts count on; without it, the sampler's own sigmas.",
                ),
                io.Latent.Input(
                    "source_latent",
                    optional=True,
                    tooltip="The clean source, for a sampler that starts from a noised latent (KSampler Advanced, second stage). "
                    "Without it, the latent that the sampler is given.",
                ),
            ],
            outputs=[
                io.Model.Output("blended_model", display_name="model", tooltip="For any native sampler or guider.")
            ],
        )

    @classmethod
    def execute(cls, model, schedule, sigmas=None, source_latent=None) -> io.NodeOutput:
        levels = None if sigmas is None else check_sigmas(sigmas)
        source = None if source_latent is None else _host.samples(source_latent)
        return io.NodeOutput(_host.blended_model(model, as_schedule(schedule), source=source, sigmas=levels))


NODES = [EditSigmas, NoiseLatent, BlendedDenoise, BlendedModel]
