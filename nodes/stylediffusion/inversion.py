"""StyleDiffusion's inversion: learn from a picture what its text's tokens carry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...hosts import host as _host
from ...pipelines.core.noise import image_seeds
from ...pipelines.evaluation.drawing import curve
from ...pipelines.stylediffusion.inversion import (
    PRESETS,
    TARGETS,
    StyleOptions,
    StyleResult,
    image_features,
    style_invert,
)
from ...pipelines.stylediffusion.networks import FORMS, INITS
from .._api import EmbeddingsSocket, RankerSocket, TrajectorySocket, io, schema, show_text
from ..attention.pairs import MAX_SEED

CATEGORY = "EditKit/style"
PRESET = "as the preset"


def cfg_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("cfg", default=7.5, min=1.0, max=30.0, step=0.1, tooltip=tooltip)


class StyleInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_StyleInvert",
            display_name="Learn a picture's values (StyleDiffusion)",
            category=CATEGORY,
            description=(
                "Learns what the text's tokens carry (the values of cross-attention) from the picture itself, while where they "
                "look (the keys) stays the text's. Guided sampling then gives the picture back, and its attention can still be "
                "edited. A small network learns for every step; the model does not change."
            ),
            search_aliases=["StyleDiffusion", "prompt-embedding inversion", "real image editing", "reconstruction"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model of the inversion; gradients pass through it, it does not change."
                ),
                TrajectorySocket.Input(
                    "trajectory",
                    tooltip="The picture's inversion at cfg 1, from 'Invert picture (DDIM)'; 30 steps are usual.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt of the inversion: what the picture shows."),
                io.Conditioning.Input(
                    "negative", tooltip="What guidance moves away from, usually an empty prompt; it stays."
                ),
                io.Image.Input(
                    "image", tooltip="The picture that was inverted, one or one per latent; looked at once."
                ),
                io.MultiType.Input(
                    "image_encoder",
                    types=[io.ClipVision, RankerSocket],
                    tooltip="What looks at the picture: a CLIP_VISION, or a ranker from 'Load ranker' (ViT-B-16 as published; "
                    "the bundled one for the bundled model).",
                ),
                cfg_input("Guidance scale to reconstruct, and later edit, at; 7.5 as published."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="published",
                    tooltip="published: the official code's (1015 updates in 30 steps). paper: what the paper prints (183, slow "
                    "to learn). even: 20 updates at every step, 600 in 30, with the last steps as careful as the first.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=0,
                    min=0,
                    max=2000,
                    tooltip="Most updates of the first sampling step, from which the preset counts on; 0 = the preset's own.",
                ),
                io.Float.Input(
                    "attention_loss",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Weight of the loss that keeps the attention maps those of the inversion; 1 as published, 0 = none.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the networks' first weights; image b of the batch uses seed + b.",
                ),
                *_learning_inputs(),
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    "embeddings",
                    display_name="embeddings",
                    tooltip="The values of every step, with the picture's path. Edits need nothing else of the picture.",
                ),
                io.Latent.Output(
                    "reconstruction",
                    display_name="reconstruction",
                    tooltip="Where guided sampling with them ends: the picture, at no further cost.",
                ),
                io.Image.Output(
                    "loss_curve", display_name="loss curve", tooltip="Loss of every sampling step, logarithmic."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Updates made, losses left, and how far the maps moved."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, positive, negative, image, image_encoder, cfg, preset, inner_steps, attention_loss, seed,
        network=PRESET, init=PRESET, map_targets="aligned", lr=0.0, tolerance=1e-5, tolerance_growth=2e-5,
    ) -> io.NodeOutput:  # fmt: skip
        options = _options(
            preset, cfg, attention_loss, map_targets, tolerance, tolerance_growth, inner=inner_steps, form=network, init=init,
            lr=lr,
        )  # fmt: skip
        path, rest = _host.trajectory_in(trajectory), _host.trajectory_rest(trajectory)
        source, null = _host.context(positive, "positive"), _host.context(negative, "negative")
        features = image_features(_host.image_encoder(image_encoder), image, source.tokens.shape[2])
        seeds = image_seeds(seed, path.batch, rest.get("batch_index"))
        with _host.open_denoiser(
            model, path.source.shape, [source, null], sigmas=path.sigmas, learning=True
        ) as denoiser:
            found = style_invert(
                denoiser, path, source, null, features, seeds=seeds, options=options,
                progress=_host.progress(len(path.latents) - 1, model),
            )  # fmt: skip
            rebuilt = denoiser.scale_out(found.rebuilt)
        text, plot = _report(found), curve(found.losses, "StyleDiffusion: loss of every step")
        latent = _host.finished_out(rebuilt, like=rest)
        return io.NodeOutput(
            _host.embeddings_out(found.embeddings, rest), latent, plot, text, ui=show_text(cls, plot, text)
        )


def _learning_inputs() -> list:
    """What departs from the preset."""
    return [
        io.Combo.Input(
            "network",
            options=[PRESET, *FORMS],
            default=PRESET,
            optional=True,
            tooltip="affine: the values scale and shift each prompt's own embedding (the official code). direct: they replace it "
            "(the paper).",
        ),
        io.Combo.Input(
            "init",
            options=[PRESET, *INITS],
            default=PRESET,
            optional=True,
            tooltip="First weights. identity: learning starts at the plain prompt (affine only).",
        ),
        io.Combo.Input(
            "map_targets",
            options=list(TARGETS),
            default="aligned",
            optional=True,
            tooltip="Maps to keep: aligned = those of the step's own noise level; published = one level noisier, as the official "
            "code.",
        ),
        *_stopping_inputs(),
    ]


def _stopping_inputs() -> list:
    """How fast it learns, and when a step is done."""
    return [
        io.Float.Input(
            "lr",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-4,
            round=1e-7,
            optional=True,
            tooltip="Adam's learning rate at the first sampling step; 0 = the preset's (0.01 published, 0.0001 paper).",
        ),
        io.Float.Input(
            "tolerance",
            default=1e-5,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-8,
            optional=True,
            tooltip="A step is done when its loss is below this; 1e-5 as published, 0 never stops early.",
        ),
        io.Float.Input(
            "tolerance_growth",
            default=2e-5,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-8,
            optional=True,
            tooltip="How much the tolerance grows with every sampling step; 2e-5 as published.",
        ),
    ]


def _options(
    preset: str, cfg: float, attention: float, targets: str, tolerance: float, growth: float, **chosen: Any
) -> StyleOptions:
    """A preset with what was chosen instead; 0 and PRESET choose nothing."""
    changes = {name: value for name, value in chosen.items() if value not in (0, PRESET)}
    return replace(
        PRESETS[preset], guidance_scale=cfg, attention_weight=attention, targets=targets, tolerance=tolerance,
        tolerance_growth=growth, **changes,
    )  # fmt: skip


def _report(found: StyleResult) -> str:
    steps = len(found.losses)
    return (
        f"StyleDiffusion: {sum(found.updates)} updates in {steps} steps; loss {sum(found.losses) / steps:.2g} on average, "
        f"{found.losses[-1]:.2g} in the last step; attention maps {float(found.map_distance.mean()):.2g} from the inversion's "
        "(mean squared, summed over layers)"
    )


NODES = [StyleInvert]
