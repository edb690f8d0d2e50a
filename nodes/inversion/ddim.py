"""DDIM inversion: an image's trajectory to noise."""

from __future__ import annotations

from typing import Any

from ...hosts.host import codec_of, open_denoiser, progress_bar, to_host
from ...hosts.latent import latent_out, unnoised_samples, without_sources
from ...hosts.sockets import context_of
from ...hosts.trajectory import trajectory_out
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.progress import StagedProgress
from ...pipelines.core.sigmas import check_sigmas, executed_steps
from ...pipelines.inversion.ddim import (
    MODES,
    InversionOptions,
    ReconstructionQuality,
    invert,
    reconstruct,
    reconstruction_quality,
)
from ...pipelines.inversion.regularisation import Regularisation
from .._api import TrajectorySocket, io, schema, show_text
from .._inputs import (
    PATCHES_STAY,
    cfg_input,
    encoding_ratio_input,
    latent_input,
    model_input,
    report_output,
    seed_input,
    sigmas_input,
)

NOT_MEASURED = float("nan")


def _implicit_inputs() -> list:
    """The fixed-point iteration of mode implicit."""
    return [
        io.Int.Input(
            "iterations",
            default=5,
            min=1,
            max=100,
            tooltip="implicit: most model calls per step. It stops earlier when it has converged.",
        ),
        io.Float.Input(
            "damping",
            default=1.0,
            min=0.05,
            max=1.0,
            step=0.05,
            tooltip="implicit: step size of the fixed-point iteration, 0.05 to 1. Halved automatically when it diverges.",
        ),
        io.Float.Input(
            "tolerance",
            default=1e-5,
            min=1e-9,
            max=0.1,
            step=1e-6,
            round=1e-9,
            tooltip="implicit: stop when an iterate changes by less than this, relative to its size (1e-5).",
        ),
    ]


def _measuring_inputs() -> list:
    return [
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Connect it to measure the reconstruction. This samples once more, with as many model calls again.",
        ),
        io.Image.Input(
            "image",
            optional=True,
            tooltip="The original image, to include the loss of the VAE in the measurement.",
        ),
    ]


def _regularisation_inputs() -> list:
    """The regularised inversion of pix2pix-zero."""
    return [
        io.Int.Input(
            "reg_steps",
            display_name="regularisation steps",
            default=0,
            min=0,
            max=100,
            optional=True,
            tooltip="Regularise the predicted noise in this many rounds per step, as pix2pix-zero does (5). 0 = off. Not for mode "
            "implicit.",
        ),
        io.Float.Input(
            "lambda_auto_corr",
            display_name="auto-correlation weight",
            default=20.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            optional=True,
            tooltip="Regularisation: weight of the noise's correlation with its own shifted copies, 0 to 1000. 0 = off.",
        ),
        io.Float.Input(
            "lambda_kl",
            display_name="KL weight",
            default=20.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            optional=True,
            tooltip="Regularisation: weight of the noise's distance from mean 0 and variance 1, 0 to 1000. 0 = off.",
        ),
        seed_input("Regularisation: seed of the random shifts.", optional=True, control=False),
    ]


def _inversion_outputs() -> list:
    return [
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
        io.Float.Output(
            "psnr",
            display_name="PSNR",
            tooltip="Reconstruction against the image in dB, smallest of the batch. nan without vae and image.",
        ),
        io.Float.Output(
            "psnr_without_vae",
            display_name="PSNR without the VAE's loss",
            tooltip="Reconstruction against the decoded latent in dB, smallest of the batch. nan without vae.",
        ),
        report_output("Both values for every image, and the loss of the VAE alone, in dB."),
    ]


class InvertDDIM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_InvertDDIM",
            display_name="DDIM Inversion (Unsample Image)",
            category="EditKit/inversion",
            description=(
                "Inverts an image to noise and keeps the latent at every sigma: the trajectory. Invert once, edit many times. "
                "Connect vae (and image) to measure how well the trajectory reconstructs the image."
            ),
            search_aliases=["DDIM inversion", "unsample", "unsampler", "noise inversion", "trajectory", "invert image"],
            inputs=[
                model_input(f"The model that will edit. {PATCHES_STAY}"),
                io.Conditioning.Input(
                    "positive", tooltip="The inversion prompt: what the image shows, or an empty prompt as in DiffEdit."
                ),
                latent_input(),
                sigmas_input("All sigmas of the edit, ending at 0: 'Edit Sigmas (DDIM Scheduler)' at strength 1."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="next",
                    tooltip="next: evaluates at the next sigma; not for flow models. current: evaluates at the current sigma, as "
                    "in the paper. implicit: the exact inverse of the sampler, at up to 'iterations' times the model calls.",
                ),
                *_implicit_inputs(),
                encoding_ratio_input(
                    1.0, "Fraction of the steps to invert, 0 to 1, counted from the image. DiffEdit needs 0.8."
                ),
                *_measuring_inputs(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt of the inversion. Needed only above cfg 1."
                ),
                cfg_input(
                    1.0, "CFG scale of the inversion. Above 1 the reconstruction becomes inexact.", optional=True
                ),
                *_regularisation_inputs(),
            ],
            outputs=_inversion_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent,
        sigmas,
        mode,
        iterations,
        damping,
        tolerance,
        encoding_ratio,
        vae=None,
        image=None,
        negative=None,
        cfg=1.0,
        reg_steps=0,
        lambda_auto_corr=20.0,
        lambda_kl=20.0,
        seed=0,
    ) -> io.NodeOutput:
        if image is not None and vae is None:
            raise ParameterError("image is connected but vae is not: connect vae to compare with the image")
        regularisation = Regularisation(reg_steps, lambda_auto_corr, lambda_kl, seed=seed) if reg_steps else None
        options = InversionOptions(mode, iterations, damping, tolerance, regularisation)
        sigma_grid, clean = check_sigmas(sigmas), unnoised_samples(latent, "latent")
        rest, source = without_sources(latent), context_of(positive, "positive")
        negative_prompt = None if negative is None else context_of(negative, "negative")
        progress = _progress(model, executed_steps(len(sigma_grid) - 1, encoding_ratio), measured=vae is not None)
        used = [source] if cfg == 1 or negative_prompt is None else [source, negative_prompt]
        with open_denoiser(model, clean.shape, used, sigmas=sigma_grid) as denoiser:
            inverted = invert(
                denoiser,
                clean,
                source,
                sigma_grid,
                options=options,
                ratio=encoding_ratio,
                negative=negative_prompt,
                guidance_scale=cfg,
                progress=progress(0),
            )
            noised = latent_out(inverted.latents[0], denoiser, float(sigma_grid[inverted.first]), like=rest)
            rebuilt = None
            if vae is not None:
                guidance = {"negative": negative_prompt, "guidance_scale": cfg}
                rebuilt = denoiser.scale_out(reconstruct(denoiser, inverted, source, **guidance, progress=progress(1)))
        outputs = trajectory_out(inverted, like=rest), noised
        if rebuilt is None:
            return io.NodeOutput(*outputs, NOT_MEASURED, NOT_MEASURED, "not measured: connect vae")
        return _measured(cls, outputs, reconstruction_quality(codec_of(vae), rebuilt, clean, image))


def _progress(model: Any, steps: int, *, measured: bool) -> StagedProgress:
    """Of the inversion, and of the sampling back where the result is measured."""
    stages = (steps, steps if measured else 0)
    return StagedProgress(progress_bar(sum(stages), model), stages)


def _measured(cls: type, outputs: tuple, found: ReconstructionQuality) -> io.NodeOutput:
    """The outputs with the measures of the reconstruction."""
    text = _report(found)
    return io.NodeOutput(*outputs, *_worst(found), text, ui=show_text(cls, to_host(found.image), text))


def _worst(found: ReconstructionQuality) -> tuple[float, float]:
    """PSNR with and without the loss of the VAE, smallest of the batch, in dB."""
    with_vae = NOT_MEASURED if found.with_vae is None else float(found.with_vae.min())
    return with_vae, float(found.without_vae.min())


def _report(found: ReconstructionQuality) -> str:
    lines = []
    for i, inverted in enumerate(found.without_vae.tolist()):
        line = f"reconstruction: {inverted:.1f} dB without the VAE's loss"
        if found.with_vae is not None and found.vae_only is not None:
            line += f", {float(found.with_vae[i]):.1f} dB with it (the VAE alone: {float(found.vae_only[i]):.1f} dB)"
        lines.append(line)
    return "\n".join(lines)


NODES = [InvertDDIM]
