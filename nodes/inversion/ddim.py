"""Inversion nodes: a picture's path up to noise, and the plain noise-and-denoise edit that it is compared with."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.progress import Legs
from ...pipelines.core.samplers import SAMPLERS
from ...pipelines.core.sigmas import check_sigmas, executed
from ...pipelines.inversion.ddim import (
    MODES,
    InversionOptions,
    ReconstructionQuality,
    invert,
    reconstruct,
    reconstruction_quality,
)
from ...pipelines.sdedit import sdedit
from .._api import EmbeddingsSocket, TrajectorySocket, io, schema, show_text

MAX_SEED = 0xFFFFFFFFFFFFFFFF
NOT_MEASURED = float("nan")


class InvertDDIM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_InvertDDIM",
            display_name="Invert picture (DDIM)",
            category="EditKit/inversion",
            description=(
                "Finds the noise that a real picture would have been sampled from, and keeps every level on the way: invert "
                "once, edit many times. Connect vae (and image) to measure how well the way back reconstructs the picture."
            ),
            search_aliases=["DDIM inversion", "unsample", "noise inversion", "trajectory"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will edit; LoRA and other patches stay in force."),
                io.Conditioning.Input(
                    "positive", tooltip="What the picture shows (or an empty prompt, as in DiffEdit)."
                ),
                io.Latent.Input("latent", tooltip="The encoded picture, or a batch of pictures."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The grid of the edit to come, down to 0, from 'Sigmas for an edit' at strength 1.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="next",
                    tooltip="next: as null-text inversion (not for flow models). current: the paper's equation. implicit: the "
                    "exact inverse of the sampler, up to 'iterations' times the cost.",
                ),
                io.Int.Input(
                    "iterations",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="implicit: most model evaluations per step; it stops earlier where it has converged.",
                ),
                io.Float.Input(
                    "damping",
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    tooltip="implicit: share of the way to the next iterate, 0 to 1; halved by itself where iterates diverge.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=1e-5,
                    min=1e-9,
                    max=0.1,
                    step=1e-6,
                    round=1e-9,
                    tooltip="implicit: done when an iterate moves less than this, relative to its size (1e-5).",
                ),
                io.Float.Input(
                    "encoding_ratio",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The last part of the grid to climb, 0 to 1. DiffEdit needs 0.8; less costs less and changes less.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="To measure: sample back at once and compare. Costs as much as the inversion (mode next) again.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="To measure against the picture itself, the VAE's own loss included.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Only for cfg above 1: what to move away from while inverting."
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance scale of the inversion; 1 as published, and above it inversion drifts off.",
                ),
            ],
            outputs=[
                TrajectorySocket.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="The picture at every noise level; belongs to this model, these sigmas and this size.",
                ),
                io.Latent.Output(
                    "noised",
                    display_name="noised latent",
                    tooltip="Its noisiest level: for a sampler on the same sigmas that adds no noise.",
                ),
                io.Float.Output(
                    "psnr",
                    display_name="PSNR",
                    tooltip="Reconstruction against the picture in dB, smallest of the batch; nan without vae and image.",
                ),
                io.Float.Output(
                    "psnr_without_vae",
                    display_name="PSNR without the VAE's loss",
                    tooltip="Reconstruction against the decoded latent in dB, smallest of the batch; nan without vae.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Both for every picture, and the VAE's own loss, in dB."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, sigmas, mode, iterations, damping, tolerance, encoding_ratio, vae=None, image=None,
        negative=None, cfg=1.0,
    ) -> io.NodeOutput:  # fmt: skip
        if image is not None and vae is None:
            raise ParameterError("image is connected but vae is not: connect vae to compare with the picture")
        options = InversionOptions(mode, iterations, damping, tolerance)
        levels, clean = check_sigmas(sigmas), _host.unnoised_samples(latent, "latent")
        source = _host.context(positive, "positive")
        against = None if negative is None else _host.context(negative, "negative")
        steps = executed(len(levels) - 1, encoding_ratio)
        legs = Legs(
            _host.progress(steps if vae is None else 2 * steps, model), (steps, steps if vae is not None else 0)
        )
        used = [source] if cfg == 1 or against is None else [source, against]
        with _host.open_denoiser(model, clean.shape, used, sigmas=levels) as denoiser:
            path = invert(
                denoiser, clean, source, levels, options=options, ratio=encoding_ratio, negative=against,
                guidance_scale=cfg, progress=legs(0),
            )  # fmt: skip
            noised = _host.latent_out(path.latents[0], denoiser, float(levels[path.first]), like=latent)
            rebuilt = None
            if vae is not None:
                back = reconstruct(denoiser, path, source, negative=against, guidance_scale=cfg, progress=legs(1))
                rebuilt = denoiser.scale_out(back)
        trajectory = _host.trajectory_out(path, like=latent)
        if rebuilt is None:
            return io.NodeOutput(trajectory, noised, NOT_MEASURED, NOT_MEASURED, "not measured: connect vae")
        found = reconstruction_quality(_host.codec(vae), rebuilt, clean, image)
        psnr = NOT_MEASURED if found.with_vae is None else float(found.with_vae.min())
        text = _report(found)
        shown = show_text(cls, _host.to_host(found.image), text)
        return io.NodeOutput(trajectory, noised, psnr, float(found.without_vae.min()), text, ui=shown)


def _report(found: ReconstructionQuality) -> str:
    lines = []
    for i, inverted in enumerate(found.without_vae.tolist()):
        line = f"reconstruction: {inverted:.1f} dB without the VAE's loss"
        if found.with_vae is not None and found.vae_only is not None:
            line += f", {float(found.with_vae[i]):.1f} dB with it (the VAE alone: {float(found.vae_only[i]):.1f} dB)"
        lines.append(line)
    return "\n".join(lines)


class SDEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_SDEdit",
            display_name="Noise and denoise (SDEdit)",
            category="EditKit/inversion",
            description=(
                "The simplest edit: noise the picture part of the way and denoise it towards a text. There is no mask, and the "
                "whole picture changes; the strength decides how much."
            ),
            search_aliases=["img2img", "image to image", "stroke painting"],
            inputs=[
                io.Model.Input("model", tooltip="Any model; LoRA, ControlNet and guidance patches stay in force."),
                io.Conditioning.Input("positive", tooltip="What the whole picture should show."),
                io.MultiType.Input(
                    "negative",
                    types=[io.Conditioning, EmbeddingsSocket],
                    tooltip="What to move away from, or the embeddings of a null-text inversion; not evaluated at cfg 1.",
                ),
                io.Latent.Input("latent", tooltip="The encoded picture, or a batch of pictures."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale; 1 = no guidance, half the cost.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Steps of the whole grid, of which the last part runs.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The part of the grid that runs, 0 to 1: 0 returns the picture, 1 forgets it.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="euler and ddim are one method here, first order; dpmpp_2m is second order.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the noise. Image b of the batch uses seed + b.",
                ),
            ],
            outputs=[io.Latent.Output("edited", display_name="latent", tooltip="The edited, clean latent.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, steps, strength, sampler, seed) -> io.NodeOutput:
        clean = _host.unnoised_samples(latent, "latent")
        towards, against = _host.context(positive, "positive"), _host.negative_in(negative)
        if strength == 0:
            return io.NodeOutput(_host.finished_out(clean, like=latent))
        levels = _host.levels(model).schedule(steps, strength)
        opened = _host.opened_for(towards, against, cfg)
        with _host.open_denoiser(model, clean.shape, opened, sigmas=levels) as denoiser:
            edited = sdedit(
                denoiser, clean, EditPrompts(towards, against, cfg), steps=steps, strength=strength, sampler=sampler,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                progress=_host.progress(len(levels) - 1, model),
            )  # fmt: skip
            return io.NodeOutput(_host.finished_out(edited, like=latent))


NODES = [InvertDDIM, SDEdit]
