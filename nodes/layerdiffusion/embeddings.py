"""LayerDiffusion nodes: the reference background, the layered embeddings and iterative guidance."""

from __future__ import annotations

import torch

from ...hosts.host import codec_of, iterative_guider, open_denoiser, progress_bar, sampling_of, to_host
from ...hosts.latent import finished_out, image_size, latent_grid, unnoised_samples
from ...hosts.sockets import conditioning_of, context_of
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.images import decode_image
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.shapes import match_batch
from ...pipelines.core.sigmas import check_sigmas
from ...pipelines.evaluation.drawing import curve
from ...pipelines.layerdiffusion.embeddings import JOINS, REGIONS, EmbeddingOptions, layered_embeddings
from ...pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from ...pipelines.layerdiffusion.reference_background import (
    object_latent_mask,
    reference_from_image,
    reference_from_text,
)
from .._api import io, schema, show_text
from .._inputs import (
    cfg_input,
    latent_input,
    loss_curve_output,
    model_input,
    report_output,
    seed_input,
    sigmas_input,
    steps_input,
)

CATEGORY = "EditKit/LayerDiffusion"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def saving_inputs() -> list:
    """What saves memory or ends the optimisation early."""
    return [
        io.Boolean.Input(
            "low_memory",
            default=False,
            optional=True,
            tooltip="Gradient checkpointing: a third slower, with much less memory.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="float32",
            optional=True,
            tooltip="Precision of the network. bfloat16 halves the memory; trained values stay float32.",
        ),
        io.Int.Input(
            "patience",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Stop early when the mean loss of this many steps improved by less than 1 %. 0 = never.",
        ),
    ]


def report_outputs(tooltip: str) -> list:
    return [
        loss_curve_output("Loss over the steps, on a logarithmic axis. Single losses are noisy."),
        report_output(tooltip),
    ]


def object_mask(mask, latent):
    """The mask of the object on the latent grid. None stays None."""
    if mask is None:
        return None
    height, width, factor = latent_grid(mask, latent, None)
    return object_latent_mask(mask, height, width, factor)


def conditioning_out(context):
    """CONDITIONING with its embedding on the device that ComfyUI's own nodes expect."""
    return conditioning_of(context.with_tokens(to_host(context.tokens)))


class LayeredReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LayeredReference",
            display_name="Replace Background Reference (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "The new background as a latent: your own image, scaled and cropped to fit, or an image generated from the "
                "background prompt."
            ),
            search_aliases=["LayerDiffusion", "background image", "new background", "replace background"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                latent_input("The encoded image to edit. It gives size and batch."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Image of the new background: one, or one per image. Without it, the model generates one.",
                ),
                io.Model.Input("model", optional=True, tooltip="Generates the background if no image is connected."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="The background prompt. Needed if no image is connected."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt. Needed above cfg 1."),
                steps_input("Sampling steps of the generated background.", optional=True),
                cfg_input(7.5, "CFG scale of the generated background. 1 = no guidance.", optional=True),
                seed_input("Seed of the generated background. Every image of the batch has its own noise."),
            ],
            outputs=[
                io.Latent.Output("reference", display_name="reference", tooltip="Clean latent of the new background."),
                io.Image.Output("background_image", display_name="image", tooltip="The new background as an image."),
            ],
        )

    @classmethod
    def execute(
        cls, vae, latent, image=None, model=None, positive=None, negative=None, steps=50, cfg=7.5, seed=0
    ) -> io.NodeOutput:
        codec, like = codec_of(vae), unnoised_samples(latent, "latent")
        _, height, width = image_size(latent, codec)
        if image is not None:
            made = reference_from_image(codec, image, height, width)
        elif model is None or positive is None:
            raise ParameterError("no background is connected: connect image, or model and positive")
        else:
            contexts = [context_of(positive, "positive")]
            contexts += [] if negative is None else [context_of(negative, "negative")]
            sigmas = sampling_of(model).schedule(steps)
            prompts = EditPrompts(contexts[0], contexts[1] if negative is not None else None, cfg)
            with open_denoiser(model, like.shape, contexts, sigmas=sigmas) as denoiser:
                made = reference_from_text(
                    denoiser,
                    prompts,
                    like.shape,
                    sigmas,
                    seeds=image_seeds(seed, len(like), latent.get("batch_index")),
                    progress=progress_bar(steps, model),
                )
        made = match_batch(made, len(like), "image", "latent")
        shown = decode_image(codec, made, (height, width))
        return io.NodeOutput(finished_out(made, like=latent), to_host(shown))


class LayeredEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LayeredEmbeddings",
            display_name="Layered Embeddings (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "First stage of LayerDiffusion: optimises the embeddings of an object prompt and a background prompt on a "
                "reference image, with the object masked out. The model does not change."
            ),
            search_aliases=[
                "LayerDiffusion",
                "textual inversion",
                "embedding optimisation",
                "layered controlled optimization",
            ],
            inputs=[
                model_input("Gradients pass through it; its weights do not change."),
                io.Conditioning.Input("object", tooltip="Prompt of the edited object alone, without the background."),
                io.Conditioning.Input("background", tooltip="Prompt of the new background alone."),
                latent_input("Encoded image to fit the embeddings to: the reference background."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Pixel mask of the object in the image to edit, 1 = object. Needed unless region is none.",
                ),
                io.Int.Input("steps", default=500, min=0, max=10000, tooltip="Adam steps, 0 to 10000."),
                io.Float.Input(
                    "lr",
                    default=1e-3,
                    min=1e-7,
                    max=1.0,
                    step=1e-4,
                    round=1e-7,
                    tooltip="Learning rate of Adam.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the object in the mixed embedding, 0 to 1.",
                ),
                seed_input("Seed of the sigmas and the noise. Every image of the batch has its own."),
                io.Combo.Input(
                    "join",
                    options=list(JOINS),
                    default="concatenate",
                    optional=True,
                    tooltip="concatenate: both prompts as one long text. average: each prompt alone, at twice the model calls, "
                    "for models with a fixed number of tokens.",
                ),
                io.Combo.Input(
                    "region",
                    options=list(REGIONS),
                    default="background",
                    optional=True,
                    tooltip="Where the loss counts: outside the object (as in the paper), inside it, or everywhere (none).",
                ),
                *saving_inputs(),
            ],
            outputs=[
                io.Conditioning.Output("object_embedding", display_name="object", tooltip="The object's embedding."),
                io.Conditioning.Output(
                    "background_embedding", display_name="background", tooltip="The background's embedding."
                ),
                io.Conditioning.Output(
                    "mixed_embedding", display_name="mixed", tooltip="alpha x object + (1 - alpha) x background."
                ),
                *report_outputs("Steps taken, and the mean loss at the start and at the end."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        object,
        background,
        latent,
        mask=None,
        steps=500,
        lr=1e-3,
        alpha=0.7,
        seed=0,
        join="concatenate",
        region="background",
        low_memory=False,
        precision="float32",
        patience=0,
    ) -> io.NodeOutput:
        options = EmbeddingOptions(steps, lr, alpha, join, region, patience, low_memory, PRECISIONS[precision])
        clean, latent_pixels = unnoised_samples(latent, "latent"), object_mask(mask, latent)
        first, second = context_of(object, "object"), context_of(background, "background")
        with open_denoiser(model, clean.shape, [first, second], learning=True) as denoiser:
            found = layered_embeddings(
                denoiser,
                clean,
                first,
                second,
                latent_pixels,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                options=options,
                progress=progress_bar(steps),
            )
        graph, report = curve(found.losses, "embeddings"), summary("embeddings", found.losses, found.stopped)
        made = [conditioning_out(context) for context in (found.object, found.background, found.mixed)]
        return io.NodeOutput(*made, graph, report, ui=show_text(cls, graph, report))


def summary(name: str, losses: list[float], stopped: bool) -> str:
    """One line about an optimisation. Single losses are noisy, so it gives means over a tenth of the steps."""
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
            display_name="Iterative Guidance Guider (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "A guider for SamplerCustomAdvanced that alternates between the object's embedding and the mixed embedding from "
                "step to step. Works with any sampler; start from an empty latent with noise."
            ),
            search_aliases=["LayerDiffusion", "iterative guidance", "prompt alternation", "CFGGuider"],
            inputs=[
                model_input("The fine-tuned model."),
                io.Conditioning.Input("object", tooltip="The object's embedding, used in every second step."),
                io.Conditioning.Input(
                    "mixed", tooltip="The mixed embedding, used in the other steps and in the last one."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt of every step."),
                cfg_input(),
                sigmas_input("All sigmas, on which the steps are counted. The sampler gets all or some of them."),
                io.Boolean.Input(
                    "swap",
                    default=False,
                    optional=True,
                    tooltip="Off: the object's embedding is used when an even number of steps is left, as in the paper. On: when "
                    "an odd number is left.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, object, mixed, negative, cfg, sigmas, swap=False) -> io.NodeOutput:
        pair = context_of(object, "object"), context_of(mixed, "mixed")
        guidance = IterativeGuidance(*pair, check_sigmas(sigmas).cpu(), int(swap))
        return io.NodeOutput(iterative_guider(model, guidance, context_of(negative, "negative"), cfg))


NODES = [LayeredReference, LayeredEmbeddings, IterativeGuider]
