"""Background nodes: restore the source outside the mask by fine-tuning, blending or compositing."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...hosts.host import codec_of, progress_bar, sampling_of, to_host, vae_of
from ...hosts.latent import finished_out, samples_of, sources_of
from ...pipelines.blended.composite import blend_pixels, composite_source
from ...pipelines.blended.decoder_tuning import (
    METHODS,
    PUBLISHED,
    SD_LATENT_SCALE,
    DecoderSettings,
    LatentSettings,
    Tuning,
    latent_scale,
    tune_decoder,
    tune_latent,
)
from ...pipelines.blended.poisson import blend_poisson
from ...pipelines.core.errors import ShapeError
from ...pipelines.core.shapes import check_image, check_latent, check_mask, match_batch, with_sources
from ...pipelines.evaluation.drawing import curve
from .._api import for_page, io, preview, schema, show_text, thumbnails
from .._inputs import latent_input, loss_curve_output, report_output

ALL_BLOCKS = 0
DIFFERENCE = 10.0  # enlargement of differences in the page
COMPARED = 1024  # longest side of what the page compares, in pixels


def _edited(tooltip: str) -> io.Image.Input:
    return io.Image.Input("edited", tooltip=tooltip)


def _source() -> io.Image.Input:
    return io.Image.Input("source", tooltip="The source image, [B, H, W, 3], 0 to 1.")


def _mask() -> io.Mask.Input:
    return io.Mask.Input("mask", tooltip="Pixel mask of the edit (not the latent mask), 1 = edit.")


def _image_output(tooltip: str) -> io.Image.Output:
    return io.Image.Output("image", display_name="image", tooltip=tooltip)


def _learning_inputs(lr: float, lr_tooltip: str) -> list:
    return [
        io.Int.Input("steps", default=75, min=0, max=2000, tooltip="Adam steps, 0 to 2000. 0 changes nothing."),
        io.Float.Input("lr", default=lr, min=1e-7, max=1.0, step=1e-6, round=1e-7, tooltip=lr_tooltip),
        io.Float.Input(
            "background_weight",
            default=100.0,
            min=0.0,
            max=10000.0,
            step=1.0,
            tooltip="Weight of the loss outside the mask, relative to the loss inside it.",
        ),
        io.Int.Input(
            "patience",
            default=0,
            min=0,
            max=500,
            tooltip="Stop early when the background loss improved by less than 1 % in this many steps. 0 = never.",
        ),
    ]


def _optional_edited() -> io.Image.Input:
    return io.Image.Input(
        "edited",
        optional=True,
        tooltip="The image to keep inside the mask. Without it: the plain VAE decode of the latent.",
    )


def _feather() -> io.Int.Input:
    return io.Int.Input(
        "feather",
        default=0,
        min=0,
        max=1024,
        tooltip="Width of the soft edge inside the mask, in pixels. 0 = hard edge.",
    )


def _linear_light() -> io.Boolean.Input:
    return io.Boolean.Input(
        "linear_light", default=False, tooltip="Blend in linear light instead of sRGB, as an out-of-focus edge would."
    )


def _candidates() -> io.Latent.Input:
    return io.Latent.Input(
        "latent",
        optional=True,
        tooltip="The latent that the edited images were decoded from. Connect it where there are several candidates of several "
        "sources: images do not say which source each belongs to, the latent does.",
    )


def _of_candidates(latent, source, mask, edited=None) -> tuple:
    """Source and mask for every candidate of a LATENT: those of its own source image. Without a LATENT, unchanged.

    Raises: ShapeError where `edited` has another number of images than the LATENT, or several for each source without it.
    """
    if latent is None:
        images, own = len(check_image(edited, "edited")), len(check_image(source, "source"))
        if 1 < own < images:
            raise ShapeError(
                f"edited has {images} entries but source has {own}: connect latent, which knows the source of each"
            )
        return source, mask
    if edited is not None:
        match_batch(check_image(edited, "edited"), len(check_latent(samples_of(latent), "latent")), "edited", "latent")
    sources = sources_of(latent, "latent")
    return (
        with_sources(check_image(source, "source"), sources, "source", "latent"),
        with_sources(check_mask(mask, "mask"), sources, "mask", "latent"),
    )


def _report(name: str, tuning: Tuning) -> str:
    stopped = " (stopped early)" if tuning.stopped else ""
    if math.isnan(tuning.psnr_before):
        return (
            f"{name}: {tuning.steps} steps{stopped}; the mask covers the whole image, so nothing outside it is compared"
        )
    before, after = f"{tuning.psnr_before:.1f} dB before", f"{tuning.psnr_after:.1f} dB after"
    return f"{name}: outside the mask {before}, {after} {tuning.steps} steps{stopped}"


class TuneDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_TuneDecoder",
            display_name="Decoder Fine-Tune (BLD)",
            category="EditKit/background",
            description=(
                "Fine-tunes a copy of the VAE decoder on this one image, so that the background matches the source without a "
                "seam and the edit stays. Your VAE is not changed. Use it on the best candidate: a batch shares one decoder."
            ),
            search_aliases=["background reconstruction", "decoder fine-tune", "vae finetune"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE that decodes the latent."),
                latent_input("Clean latent of the edited image."),
                _source(),
                _mask(),
                *_learning_inputs(1e-4, "Learning rate of Adam, 1e-7 to 1. Above 1e-3 it becomes unstable."),
                io.Int.Input(
                    "last_blocks",
                    default=ALL_BLOCKS,
                    min=0,
                    max=16,
                    tooltip="Number of decoder blocks to train, counted from the output, 0 to 16. 0 = all. Fewer is faster and "
                    "needs less memory.",
                ),
                io.Boolean.Input(
                    "low_memory",
                    default=False,
                    tooltip="Gradient checkpointing: slower, with much less memory on large images.",
                ),
                _optional_edited(),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=PUBLISHED,
                    optional=True,
                    tooltip="published: Adam, as in the paper. fast: about a sixth of the time and half the memory; "
                    "steps and lr count in proportion, 75 steps become 10.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    "tuned_vae", display_name="vae", tooltip="A copy of the VAE with the fine-tuned decoder."
                ),
                _image_output("The latent decoded with it, at the source's size."),
                loss_curve_output(),
                report_output("PSNR outside the mask before and after, in dB."),
            ],
        )

    @classmethod
    def execute(
        cls,
        vae,
        latent,
        source,
        mask,
        steps,
        lr,
        background_weight,
        patience,
        last_blocks,
        low_memory,
        edited=None,
        method=PUBLISHED,
    ) -> io.NodeOutput:
        settings = DecoderSettings(
            steps,
            lr,
            background_weight,
            patience,
            low_memory,
            blocks="all" if last_blocks == ALL_BLOCKS else last_blocks,
            method=method,
        )
        latents = check_latent(samples_of(latent), "latent")
        source, mask = _of_candidates(latent, source, mask)
        tuning = tune_decoder(
            codec_of(vae),
            latents,
            source,
            edited,
            mask,
            settings=settings,
            progress=progress_bar(steps),
        )
        image = to_host(tuning.image)
        plot = curve(tuning.losses, "decoder fine-tune: loss")
        text = _report("decoder", tuning)
        return io.NodeOutput(vae_of(tuning.codec), image, plot, text, ui=show_text(cls, plot, text))


class TuneLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_TuneLatent",
            display_name="Latent Fine-Tune (BLD)",
            category="EditKit/background",
            description=(
                "Optimises the latent instead of the decoder, so that its decode matches the source outside the mask. The "
                "result is smoother than with 'Decoder Fine-Tune (BLD)'. Use it to compare."
            ),
            search_aliases=["latent optimisation", "background reconstruction"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE that decodes the latent."),
                latent_input("Clean latent of the edited image."),
                _source(),
                _mask(),
                *_learning_inputs(
                    0.1,
                    "Learning rate of Adam on the scaled latent, 1e-7 to 1. 0.1 as published. The paper's 1e-4 has no effect.",
                ),
                _optional_edited(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model of this latent, which knows its scale. Needed for other models than SD 1.x and 2.x, whose "
                    "scale (0.18215) is taken otherwise.",
                ),
            ],
            outputs=[
                io.Latent.Output("tuned_latent", display_name="latent", tooltip="The optimised latent."),
                _image_output("The optimised latent decoded, at the source's size."),
                loss_curve_output(),
                report_output("PSNR outside the mask before and after, in dB."),
            ],
        )

    @classmethod
    def execute(
        cls, vae, latent, source, mask, steps, lr, background_weight, patience, edited=None, model=None
    ) -> io.NodeOutput:
        latents = check_latent(samples_of(latent), "latent")
        scale = SD_LATENT_SCALE if model is None else latent_scale(sampling_of(model))
        source, mask = _of_candidates(latent, source, mask)
        tuning = tune_latent(
            codec_of(vae),
            latents,
            source,
            edited,
            mask,
            settings=LatentSettings(steps, lr, background_weight, patience, latent_scale=scale),
            progress=progress_bar(steps),
        )
        image = to_host(tuning.image)
        plot = curve(tuning.losses, "latent fine-tune: loss")
        text = _report("latent", tuning)
        tuned = finished_out(tuning.latent, like=latent)
        return io.NodeOutput(tuned, image, plot, text, ui=show_text(cls, plot, text))


class BlendPoisson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendPoisson",
            display_name="Poisson Blend (Seamless Clone)",
            category="EditKit/background",
            description=(
                "Seamless cloning: copies the gradients of the edit into the source. Outside the mask the result is exactly "
                "the source. Inside, the edit's colours shift towards the surroundings."
            ),
            search_aliases=["seamless clone", "gradient domain", "poisson image editing", "composite"],
            inputs=[_edited("The edited image."), _source(), _mask(), _candidates()],
            outputs=[_image_output("The source with the edit's gradients inside the mask.")],
        )

    @classmethod
    def execute(cls, edited, source, mask, latent=None) -> io.NodeOutput:
        source, mask = _of_candidates(latent, source, mask, edited)
        image = to_host(blend_poisson(edited, source, mask))
        return io.NodeOutput(image, ui=preview(cls, image))


class BlendPixels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendPixels",
            display_name="Alpha Blend (Feather)",
            category="EditKit/background",
            description=(
                "Mixes the edited image and the source by the mask, with an optional feather. The simplest composite; without "
                "a feather the seam can show."
            ),
            search_aliases=["alpha blend", "feather", "paste", "composite"],
            inputs=[_edited("The edited image."), _source(), _mask(), _feather(), _linear_light(), _candidates()],
            outputs=[_image_output("The blended image.")],
        )

    @classmethod
    def execute(cls, edited, source, mask, feather, linear_light, latent=None) -> io.NodeOutput:
        source, mask = _of_candidates(latent, source, mask, edited)
        image = blend_pixels(edited, source, mask, feather_px=feather, linear_light=linear_light)
        return io.NodeOutput(to_host(image), ui=preview(cls, to_host(image)))


class CompositeSource(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_CompositeSource",
            display_name="Composite over Source (Exact)",
            category="EditKit/background",
            description=(
                "The last node of a masked edit: composites the edited image over the source. Outside the mask the result "
                "equals the source bit for bit, and the node measures that. The feather lies inside the mask."
            ),
            search_aliases=["composite", "paste", "exact background", "inpaint stitch"],
            inputs=[
                _edited("The edited image, best from a fine-tuned decoder."),
                _source(),
                _mask(),
                _feather(),
                _candidates(),
            ],
            outputs=[
                _image_output("The composite."),
                io.Float.Output(
                    "change_outside",
                    display_name="largest change outside",
                    tooltip="Largest difference of any channel outside the mask, 0 to 1. It is 0.",
                ),
            ],
        )

    @classmethod
    def execute(cls, edited, source, mask, feather, latent=None) -> io.NodeOutput:
        source, mask = _of_candidates(latent, source, mask, edited)
        image, change = composite_source(edited, source, mask, feather_px=feather)
        image = to_host(image)
        shown = show_text(cls, image, f"largest change outside the mask: {change:g}")
        return io.NodeOutput(
            image, change, ui=for_page(shown, "compare", lambda: _comparison(edited, source, mask, image, change))
        )


def _comparison(edited: Tensor, source: Tensor, mask: Tensor, image: Tensor, change: float) -> dict[str, Any]:
    """What the page's slider shows: source, result, and what the composite has undone outside the mask, enlarged."""
    source, mask = (value.to(edited.device) for value in (source, mask))
    outside = (mask <= 0).to(edited)[..., None]
    undone = DIFFERENCE * (edited - source).abs() * outside
    return {
        "source": thumbnails(source, COMPARED),
        "result": thumbnails(image, COMPARED),
        "difference": thumbnails(undone.clamp(max=1), COMPARED),
        "change": change,
        "undone": float(undone.max()) / DIFFERENCE,
    }


NODES = [TuneDecoder, TuneLatent, BlendPoisson, BlendPixels, CompositeSource]
