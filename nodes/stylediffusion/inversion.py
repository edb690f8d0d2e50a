"""StyleDiffusion's inversion: value embeddings learned from an image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...hosts.embeddings import embeddings_out
from ...hosts.host import image_encoder_of, open_denoiser, progress_bar
from ...hosts.latent import finished_out
from ...hosts.sockets import context_of
from ...hosts.trajectory import trajectory_in, trajectory_rest
from ...pipelines.core.noise import image_seeds
from ...pipelines.evaluation.drawing import curve
from ...pipelines.learning.per_step import progress_units
from ...pipelines.stylediffusion.inversion import (
    PRESETS,
    TARGETS,
    StyleOptions,
    StyleResult,
    image_features,
    style_invert,
)
from ...pipelines.stylediffusion.networks import FORMS, INITS
from .._api import EmbeddingsSocket, RankerSocket, io, reproduction_switch, schema, show_text
from .._inputs import (
    cfg_input,
    loss_curve_output,
    model_input,
    report_output,
    seed_input,
    tolerance_inputs,
    trajectory_input,
)

CATEGORY = "EditKit/StyleDiffusion"
PRESET = "as the preset"


class StyleInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_StyleInvert",
            display_name="StyleDiffusion Inversion",
            category=CATEGORY,
            description=(
                "Learns the value embeddings of cross-attention from an image, while the keys stay those of the prompt. Guided "
                "sampling then reconstructs the image, and its attention maps can still be edited. A small network is trained "
                "for every step; the model does not change."
            ),
            search_aliases=["StyleDiffusion", "prompt-embedding inversion", "real image editing", "reconstruction"],
            inputs=[
                model_input("The model of the inversion. Its weights do not change."),
                trajectory_input("Inversion of the image at cfg 1, from 'DDIM Inversion'. 30 steps are usual."),
                io.Conditioning.Input("positive", tooltip="The inversion prompt: what the image shows."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, usually empty. It is not changed."),
                io.Image.Input("image", tooltip="The inverted image: one, or one per latent."),
                io.MultiType.Input(
                    "image_encoder",
                    types=[io.ClipVision, RankerSocket],
                    tooltip="A CLIP_VISION, or a ranker from 'Load CLIP Ranker': ViT-B-16 as in the paper, the bundled ranker "
                    "for the bundled model.",
                ),
                cfg_input(7.5, "CFG scale of the reconstruction and of the later edit."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="published",
                    tooltip="published: as the official code, 1015 updates in 30 steps. paper: as printed, 183 updates, learns "
                    "slowly. even: 20 updates at every step, 600 in 30.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=0,
                    min=0,
                    max=2000,
                    tooltip="Most updates in the first sampling step, 0 to 2000. 0 = as the preset.",
                ),
                io.Float.Input(
                    "attention_loss",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Weight of the loss that keeps the cross-attention maps of the inversion. 0 = off.",
                ),
                seed_input("Seed of the networks' initial weights. Every image of the batch has its own."),
                *_learning_inputs(),
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    "embeddings",
                    display_name="embeddings",
                    tooltip="The value embeddings of every step and the trajectory: everything an edit needs.",
                ),
                io.Latent.Output(
                    "reconstruction",
                    display_name="reconstruction",
                    tooltip="Result of guided sampling with the embeddings: the reconstructed image.",
                ),
                loss_curve_output("Loss of every sampling step, on a logarithmic axis."),
                report_output("Updates made, remaining loss, and the change of the cross-attention maps."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        positive,
        negative,
        image,
        image_encoder,
        cfg,
        preset,
        inner_steps,
        attention_loss,
        seed,
        network=PRESET,
        init=PRESET,
        map_targets="aligned",
        lr=0.0,
        tolerance=1e-5,
        tolerance_growth=2e-5,
    ) -> io.NodeOutput:
        options = _options(
            preset,
            cfg,
            attention_loss,
            map_targets,
            tolerance,
            tolerance_growth,
            inner=inner_steps,
            form=network,
            init=init,
            lr=lr,
        )
        inverted, rest = trajectory_in(trajectory), trajectory_rest(trajectory)
        source, null = context_of(positive, "positive"), context_of(negative, "negative")
        features = image_features(image_encoder_of(image_encoder), image, source.tokens.shape[2])
        shape = inverted.source.shape
        with open_denoiser(model, shape, [source, null], sigmas=inverted.sigmas, learning=True) as denoiser:
            found = style_invert(
                denoiser,
                inverted,
                source,
                null,
                features,
                seeds=image_seeds(seed, inverted.batch, rest.get("batch_index")),
                options=options,
                progress=progress_bar(progress_units(options.updates, inverted), model),
            )
            latent = finished_out(denoiser.scale_out(found.rebuilt), like=rest)
        text, plot = _report(found), curve(found.losses, "StyleDiffusion: loss of every step")
        return io.NodeOutput(embeddings_out(found.embeddings, rest), latent, plot, text, ui=show_text(cls, plot, text))


def _learning_inputs() -> list:
    """Settings that override the preset."""
    return [
        io.Combo.Input(
            "network",
            options=[PRESET, *FORMS],
            default=PRESET,
            optional=True,
            tooltip="affine: the network scales and shifts each prompt's own embedding, as the official code. direct: it "
            "replaces the embedding, as the paper.",
        ),
        io.Combo.Input(
            "init",
            options=[PRESET, *INITS],
            default=PRESET,
            optional=True,
            tooltip="Initial weights. identity: start from the plain prompt (affine only).",
        ),
        reproduction_switch(
            io.Combo,
            "map_targets",
            options=list(TARGETS),
            default="aligned",
            optional=True,
            tooltip="Cross-attention maps to keep. aligned: those of the step's own sigma. published: one sigma noisier, as the "
            "official code.",
        ),
        io.Float.Input(
            "lr",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-4,
            round=1e-7,
            optional=True,
            tooltip="Learning rate of Adam at the first sampling step. 0 = as the preset (0.01 published, 0.0001 paper).",
        ),
        *tolerance_inputs(),
    ]


def _options(
    preset: str, cfg: float, attention: float, targets: str, tolerance: float, growth: float, **chosen: Any
) -> StyleOptions:
    """A preset with the settings that override it. 0 and PRESET keep the preset's own."""
    changes = {name: value for name, value in chosen.items() if value not in (0, PRESET)}
    return replace(
        PRESETS[preset],
        guidance_scale=cfg,
        attention_weight=attention,
        targets=targets,
        tolerance=tolerance,
        tolerance_growth=growth,
        **changes,
    )


def _report(found: StyleResult) -> str:
    steps = len(found.losses)
    return (
        f"StyleDiffusion: {sum(found.updates)} updates in {steps} steps; loss {sum(found.losses) / steps:.2g} on average, "
        f"{found.losses[-1]:.2g} in the last step; attention maps {float(found.map_distance.mean()):.2g} from the inversion's "
        "(mean squared, summed over layers)"
    )


NODES = [StyleInvert]
