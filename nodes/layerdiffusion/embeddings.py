"""LayerDiffusion nodes: a reference background, the embeddings of subject and background, and alternating guidance."""

from __future__ import annotations

import torch

from ...hosts import host as _host
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.shapes import match_batch, pad_to_factor
from ...pipelines.core.sigmas import check_sigmas
from ...pipelines.evaluation.drawing import curve
from ...pipelines.layerdiffusion.embeddings import (
    JOINS,
    REGIONS,
    EmbeddingOptions,
    IterativeGuidance,
    layered_embeddings,
)
from ...pipelines.layerdiffusion.reference_background import fitted_image, object_latent_mask, reference_from_text
from .._api import io, schema, show_text

MAX_SEED = 0xFFFFFFFFFFFFFFFF
CATEGORY = "EditKit/layered"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def saving_inputs() -> list:
    """What makes learning fit into memory, or end early."""
    return [
        io.Boolean.Input(
            "low_memory",
            default=False,
            optional=True,
            tooltip="Compute activations again instead of keeping them: a third slower, much less memory.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="float32",
            optional=True,
            tooltip="Arithmetic of the network; bfloat16 takes half the memory. What learns is float32 in both.",
        ),
        io.Int.Input(
            "patience",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Stop when the mean loss of this many steps is less than 1 % below that of as many before. 0 = never.",
        ),
    ]


def report_outputs(what: str) -> list:
    return [
        io.Image.Output(
            "loss_curve", display_name="loss curve", tooltip="Loss over the steps, logarithmic; it is noisy."
        ),
        io.String.Output("report", display_name="report", tooltip=what),
    ]


def subject_mask(mask, latent):
    """The MASK of a subject on the grid of a LATENT; None stays None."""
    if mask is None:
        return None
    height, width, factor = _host.latent_grid(mask, latent, None)
    return object_latent_mask(mask, height, width, factor)


def conditioning_out(context):
    """CONDITIONING with its embedding where native nodes expect it."""
    return _host.conditioning(context.with_tokens(_host.to_host(context.tokens)))


class LayeredReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LayeredReference",
            display_name="Reference background (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "The new background as a latent of the picture's size: your own picture, scaled and cut to fit, or one that "
                "the model makes from the text of the background."
            ),
            search_aliases=["LayerDiffusion", "background image", "new background"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Latent.Input("latent", tooltip="The encoded picture that is edited: gives size and batch."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture of the new background, one or one per image. Without it the model makes one.",
                ),
                io.Model.Input("model", optional=True, tooltip="Makes the background where no image is connected."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Text of the new background; needed where no image is connected."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What to keep out of it; needed above cfg 1."),
                io.Int.Input(
                    "steps", default=50, min=1, max=1000, optional=True, tooltip="Sampling steps of a made background."
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance scale of a made background; 1 = none.",
                ),
                seed_input("Seed of a made background. Image b of the batch uses seed + b."),
            ],
            outputs=[
                io.Latent.Output("reference", display_name="reference", tooltip="Clean latent of the new background."),
                io.Image.Output("background_image", display_name="image", tooltip="The same as a picture, to look at."),
            ],
        )

    @classmethod
    def execute(
        cls, vae, latent, image=None, model=None, positive=None, negative=None, steps=50, cfg=7.5, seed=0
    ) -> io.NodeOutput:
        codec, like = _host.codec(vae), _host.unnoised_samples(latent, "latent")
        factor, height, width = _host.image_size(latent, vae)
        if image is not None:
            made = codec.encode(pad_to_factor(fitted_image(image, height, width), factor))
        elif model is None or positive is None:
            raise ParameterError("there is neither an image nor a model with positive text: connect one or the other")
        else:
            contexts = [_host.context(positive, "positive")]
            contexts += [] if negative is None else [_host.context(negative, "negative")]
            sigmas = _host.levels(model).schedule(steps)
            prompts = EditPrompts(contexts[0], contexts[1] if negative is not None else None, cfg)
            with _host.open_denoiser(model, like.shape, contexts, sigmas=sigmas) as denoiser:
                made = reference_from_text(
                    denoiser, prompts, like.shape, sigmas,
                    seeds=image_seeds(seed, len(like), latent.get("batch_index")), progress=_host.progress(steps, model),
                )  # fmt: skip
        made = match_batch(made, len(like), "image", "latent")
        picture = codec.decode(made)[:, :height, :width]
        return io.NodeOutput(_host.finished_out(made, like=latent), _host.to_host(picture))


class LayeredEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LayeredEmbeddings",
            display_name="Subject and background embeddings (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "Fits two prompts, one of the subject and one of the background, to a picture until both describe its "
                "background, with the subject masked out of the comparison. The model does not change."
            ),
            search_aliases=[
                "LayerDiffusion",
                "textual inversion",
                "embedding optimisation",
                "layered controlled optimization",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Gradients pass through it; its weights do not change."),
                io.Conditioning.Input(
                    "object", tooltip="The subject as it should become: what and how, without the background."
                ),
                io.Conditioning.Input("background", tooltip="The new background alone."),
                io.Latent.Input(
                    "latent",
                    tooltip="The picture to match: the reference background (what the edit should end on), encoded.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The subject in the picture that is edited, 1 = subject. Drawn, DiffEdit's, or a segmenter's. "
                    "Needed unless region is none.",
                ),
                io.Int.Input("steps", default=500, min=0, max=10000, tooltip="Adam steps; 500 as published."),
                io.Float.Input(
                    "lr",
                    default=1e-3,
                    min=1e-7,
                    max=1.0,
                    step=1e-4,
                    round=1e-7,
                    tooltip="Adam's learning rate; 0.001 as published.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the subject in the mixed embedding, 0 to 1; 0.7 as published.",
                ),
                seed_input("Seed of the noise levels and noises. Image b of the batch uses seed + b."),
                io.Combo.Input(
                    "join",
                    options=list(JOINS),
                    default="concatenate",
                    optional=True,
                    tooltip="concatenate: the model sees both prompts as one text. average: each alone, for models with a "
                    "fixed count of tokens; twice the cost.",
                ),
                io.Combo.Input(
                    "region",
                    options=list(REGIONS),
                    default="background",
                    optional=True,
                    tooltip="Where the comparison counts: outside the subject (as published), inside it, or everywhere.",
                ),
                *saving_inputs(),
            ],
            outputs=[
                io.Conditioning.Output("object_embedding", display_name="object", tooltip="The subject's, fitted."),
                io.Conditioning.Output(
                    "background_embedding", display_name="background", tooltip="The background's, fitted."
                ),
                io.Conditioning.Output(
                    "mixed_embedding", display_name="mixed", tooltip="alpha of the first and the rest of the second."
                ),
                *report_outputs("Steps taken, and the mean loss at the start and at the end."),
            ],
        )

    @classmethod
    def execute(
        cls, model, object, background, latent, mask=None, steps=500, lr=1e-3, alpha=0.7, seed=0, join="concatenate",
        region="background", low_memory=False, precision="float32", patience=0,
    ) -> io.NodeOutput:  # fmt: skip
        options = EmbeddingOptions(steps, lr, alpha, join, region, patience, low_memory, PRECISIONS[precision])
        clean, latent_pixels = _host.unnoised_samples(latent, "latent"), subject_mask(mask, latent)
        first, second = _host.context(object, "object"), _host.context(background, "background")
        with _host.open_denoiser(model, clean.shape, [first, second], learning=True) as denoiser:
            found = layered_embeddings(
                denoiser, clean, first, second, latent_pixels, seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                options=options, progress=_host.progress(steps),
            )  # fmt: skip
        graph, report = curve(found.losses, "embeddings"), summary("embeddings", found.losses, found.stopped)
        made = [conditioning_out(context) for context in (found.subject, found.background, found.mixed)]
        return io.NodeOutput(*made, graph, report, ui=show_text(cls, graph, report))


def summary(name: str, losses: list[float], stopped: bool) -> str:
    """One line about an optimisation; single losses are noisy, so it gives means of a tenth of the steps."""
    if not losses:
        return f"{name}: no steps, nothing changed"
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    early = " (stopped early)" if stopped else ""
    return f"{name}: {len(losses)} steps{early}, mean loss {first:.4g} at the start, {last:.4g} at the end"


class IterativeGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_IterativeGuidance",
            display_name="Alternating guider (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "A guider that follows the subject's embedding and the mixed one in turn, step by step of the whole grid, "
                "in any sampler: for SamplerCustomAdvanced, from an empty latent with noise."
            ),
            search_aliases=["LayerDiffusion", "iterative guidance", "prompt alternation", "CFGGuider"],
            inputs=[
                io.Model.Input("model", tooltip="The tuned model."),
                io.Conditioning.Input("object", tooltip="The subject's fitted embedding: every second step."),
                io.Conditioning.Input("mixed", tooltip="The mixed embedding: the other steps, the last among them."),
                io.Conditioning.Input("negative", tooltip="What to move away from: plain, in every step."),
                io.Float.Input(
                    "cfg", default=7.5, min=1.0, max=30.0, step=0.1, tooltip="Guidance scale; 1 = none, half the cost."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The whole grid, on which steps are counted; the sampler gets the same, or a part of it.",
                ),
                io.Boolean.Input(
                    "swap",
                    default=False,
                    optional=True,
                    tooltip="Off: steps at an even distance from the end (2, 4, ... steps left) follow the subject, as "
                    "published. On: the others do.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, object, mixed, negative, cfg, sigmas, swap=False) -> io.NodeOutput:
        pair = _host.context(object, "object"), _host.context(mixed, "mixed")
        guidance = IterativeGuidance(*pair, check_sigmas(sigmas).cpu(), int(swap))
        return io.NodeOutput(_host.iterative_guider(model, guidance, _host.context(negative, "negative"), cfg))


NODES = [LayeredReference, LayeredEmbeddings, IterativeGuider]
