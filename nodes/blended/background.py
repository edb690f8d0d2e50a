"""Background nodes: bring the source back outside the mask, by learning or by blending, and exactly."""

from __future__ import annotations

from ...hosts import host as _host
from ...pipelines.blended.composite import blend_pixels, composite_source
from ...pipelines.blended.decoder_tuning import DecoderSettings, TuneSettings, Tuning, tune_decoder, tune_latent
from ...pipelines.blended.poisson import blend_poisson
from ...pipelines.evaluation.drawing import curve
from .._api import io, preview, schema, show_text

ALL_BLOCKS = 0


def _edited(tooltip: str) -> io.Image.Input:
    return io.Image.Input("edited", tooltip=tooltip)


def _source() -> io.Image.Input:
    return io.Image.Input("source", tooltip="The source picture, [B, H, W, 3], 0 to 1.")


def _mask() -> io.Mask.Input:
    return io.Mask.Input("mask", tooltip="The pixel mask of the edit (not the latent one), 1 = edit.")


def _image_output(tooltip: str) -> io.Image.Output:
    return io.Image.Output("image", display_name="image", tooltip=tooltip)


def _learning_inputs(lr: float, lr_tooltip: str) -> list:
    return [
        io.Int.Input("steps", default=75, min=0, max=2000, tooltip="Adam steps; 75 as published, 0 changes nothing."),
        io.Float.Input("lr", default=lr, min=1e-7, max=1.0, step=1e-6, round=1e-7, tooltip=lr_tooltip),
        io.Float.Input(
            "background_weight",
            default=100.0,
            min=0.0,
            max=10000.0,
            step=1.0,
            tooltip="Weight of the loss outside the mask against the loss inside it; 100 as published.",
        ),
        io.Int.Input(
            "patience",
            default=0,
            min=0,
            max=500,
            tooltip="Stop when this many steps improved the background loss by less than 1 %. 0 = run all steps.",
        ),
    ]


def _optional_edited() -> io.Image.Input:
    return io.Image.Input(
        "edited",
        optional=True,
        tooltip="The picture to keep inside the mask; without it, the plain decode of the latent.",
    )


def _report(name: str, tuning: Tuning) -> str:
    stopped = " (stopped early)" if tuning.stopped else ""
    before, after = f"{tuning.psnr_before:.1f} dB before", f"{tuning.psnr_after:.1f} dB after"
    return f"{name}: outside the mask {before}, {after} {tuning.steps} steps{stopped}"


class TuneDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_TuneDecoder",
            display_name="Tune decoder to the source (BLD)",
            category="EditKit/background",
            description=(
                "Fits a copy of the VAE's decoder to this one picture: the source comes back outside the mask without a seam, "
                "the edit inside stays. Your VAE is not changed. Give it the best candidate, not the whole batch: all "
                "pictures of a batch share one decoder."
            ),
            search_aliases=["background reconstruction", "decoder fine-tune", "vae finetune"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE that decodes the latent."),
                io.Latent.Input("latent", tooltip="The edited, clean latent."),
                _source(),
                _mask(),
                *_learning_inputs(1e-4, "Adam's learning rate; 1e-4 as published. Above 1e-3 it becomes unstable."),
                io.Int.Input(
                    "last_blocks",
                    default=ALL_BLOCKS,
                    min=0,
                    max=16,
                    tooltip="How many of the decoder's last blocks learn; 0 = all, as published. With fewer, the rest is "
                    "computed once: faster, less memory.",
                ),
                io.Boolean.Input(
                    "low_memory",
                    default=False,
                    tooltip="Compute activations again instead of keeping them: slower, much less memory on large pictures.",
                ),
                _optional_edited(),
            ],
            outputs=[
                io.Vae.Output("tuned_vae", display_name="vae", tooltip="A copy of the VAE with the tuned decoder."),
                _image_output("The latent decoded with it, at the source's size."),
                io.Image.Output("loss_curve", display_name="loss curve", tooltip="Loss over the steps, logarithmic."),
                io.String.Output(
                    "report", display_name="report", tooltip="PSNR outside the mask before and after, in dB."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, vae, latent, source, mask, steps, lr, background_weight, patience, last_blocks, low_memory, edited=None
    ) -> io.NodeOutput:
        settings = DecoderSettings(
            steps,
            lr,
            background_weight,
            patience,
            low_memory,
            blocks="all" if last_blocks == ALL_BLOCKS else last_blocks,
        )
        tuning = tune_decoder(
            _host.codec(vae), _host.samples(latent), source, edited, mask,
            settings=settings, progress=_host.progress(steps),
        )  # fmt: skip
        image, plot, text = (
            _host.to_host(tuning.image),
            curve(tuning.losses, "decoder fine-tune: loss"),
            _report("decoder", tuning),
        )
        return io.NodeOutput(_host.vae_of(tuning.codec), image, plot, text, ui=show_text(cls, plot, text))


class TuneLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_TuneLatent",
            display_name="Tune latent to the source (BLD alternative)",
            category="EditKit/background",
            description=(
                "The paper's alternative to tuning the decoder: the latent learns and the decoder stays. Over-smooth, because "
                "what the decoder cannot draw stays out of reach; here to compare."
            ),
            search_aliases=["latent optimisation", "background reconstruction"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE that decodes the latent."),
                io.Latent.Input("latent", tooltip="The edited, clean latent."),
                _source(),
                _mask(),
                *_learning_inputs(
                    0.1,
                    "Adam's learning rate in latent units; 0.1 as the official code. The paper's 1e-4 moves nothing.",
                ),
                _optional_edited(),
            ],
            outputs=[
                io.Latent.Output("tuned_latent", display_name="latent", tooltip="The learned latent."),
                _image_output("The learned latent decoded, at the source's size."),
                io.Image.Output("loss_curve", display_name="loss curve", tooltip="Loss over the steps, logarithmic."),
                io.String.Output(
                    "report", display_name="report", tooltip="PSNR outside the mask before and after, in dB."
                ),
            ],
        )

    @classmethod
    def execute(cls, vae, latent, source, mask, steps, lr, background_weight, patience, edited=None) -> io.NodeOutput:
        tuning = tune_latent(
            _host.codec(vae), _host.samples(latent), source, edited, mask,
            settings=TuneSettings(steps, lr, background_weight, patience), progress=_host.progress(steps),
        )  # fmt: skip
        image, plot, text = (
            _host.to_host(tuning.image),
            curve(tuning.losses, "latent fine-tune: loss"),
            _report("latent", tuning),
        )
        tuned = _host.finished_out(tuning.latent, like=latent)
        return io.NodeOutput(tuned, image, plot, text, ui=show_text(cls, plot, text))


class BlendPoisson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendPoisson",
            display_name="Blend gradients (Poisson)",
            category="EditKit/background",
            description=(
                "Clones the gradients of the edit into the source: no seam, and the outside is the source exactly, but the "
                "edit's colours shift towards its surroundings. Computed in float, also at the picture's border."
            ),
            search_aliases=["seamless clone", "gradient domain", "poisson image editing"],
            inputs=[_edited("The edited picture."), _source(), _mask()],
            outputs=[_image_output("The source with the edit's gradients inside the mask.")],
        )

    @classmethod
    def execute(cls, edited, source, mask) -> io.NodeOutput:
        image = _host.to_host(blend_poisson(edited, source, mask))
        return io.NodeOutput(image, ui=preview(cls, image))


class BlendPixels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_BlendPixels",
            display_name="Blend pixels",
            category="EditKit/background",
            description="Mixes edit and source by the mask: the simplest background, with a visible seam unless it is feathered.",
            search_aliases=["alpha blend", "feather", "paste"],
            inputs=[
                _edited("The edited picture."),
                _source(),
                _mask(),
                io.Int.Input(
                    "feather", default=0, min=0, max=1024, tooltip="Width of the soft edge in pixels, inside the mask."
                ),
                io.Boolean.Input(
                    "linear_light",
                    default=False,
                    tooltip="Mix light instead of sRGB values, as an out-of-focus edge would.",
                ),
            ],
            outputs=[_image_output("The mix.")],
        )

    @classmethod
    def execute(cls, edited, source, mask, feather, linear_light) -> io.NodeOutput:
        image = blend_pixels(edited, source, mask, feather_px=feather, linear_light=linear_light)
        return io.NodeOutput(_host.to_host(image), ui=preview(cls, _host.to_host(image)))


class CompositeSource(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_CompositeSource",
            display_name="Put the source back outside the mask",
            category="EditKit/background",
            description=(
                "The last node of every masked edit: outside the mask the result is the source, bit for bit, and the node "
                "says so as a number. A feather lies inside the mask."
            ),
            search_aliases=["composite", "paste", "exact background", "inpaint stitch"],
            inputs=[
                _edited("The edited picture, best from a tuned decoder."),
                _source(),
                _mask(),
                io.Int.Input(
                    "feather", default=0, min=0, max=1024, tooltip="Width of the soft edge in pixels, inside the mask."
                ),
            ],
            outputs=[
                _image_output("The result."),
                io.Float.Output(
                    "change_outside",
                    display_name="largest change outside",
                    tooltip="Largest difference of any channel outside the mask, 0 to 1: 0.",
                ),
            ],
        )

    @classmethod
    def execute(cls, edited, source, mask, feather) -> io.NodeOutput:
        image, change = composite_source(edited, source, mask, feather_px=feather)
        image = _host.to_host(image)
        return io.NodeOutput(image, change, ui=show_text(cls, image, f"largest change outside the mask: {change:g}"))


NODES = [TuneDecoder, TuneLatent, BlendPoisson, BlendPixels, CompositeSource]
