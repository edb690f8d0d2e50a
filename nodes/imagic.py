"""Imagic: an embedding and a model fitted to one image."""

from __future__ import annotations

from dataclasses import replace

from ..hosts.host import open_denoiser, progress_bar, tunable, tuned_model
from ..hosts.latent import unnoised_samples
from ..hosts.sockets import context_of
from ..pipelines.core.noise import image_seeds
from ..pipelines.evaluation.drawing import curve
from ..pipelines.imagic import EMBEDDINGS, LIGHT, PUBLISHED, imagic
from ._api import io, schema, show_text
from ._inputs import latent_input, model_input, seed_input
from .layerdiffusion.embeddings import CATEGORY, PRECISIONS, conditioning_out, report_outputs, saving_inputs, summary
from .layerdiffusion.finetune import (
    METHODS,
    PRESET,
    given,
    method_input,
    rank_input,
    tuned_model_outputs,
    tuning_lr_input,
    tuning_options,
)


class Imagic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_Imagic",
            display_name="Imagic Fine-Tune",
            category=CATEGORY,
            description=(
                "Optimises the embedding of the target prompt on the image, then fine-tunes a copy of the model with it. Sample "
                "the result from noise with the positive output; eta trades the original image against the text."
            ),
            search_aliases=["Imagic", "fine-tune", "text embedding optimisation"],
            inputs=[
                model_input("The model to fine-tune. Your model is not changed."),
                latent_input("The encoded image."),
                io.Conditioning.Input("target", tooltip="The target prompt: what the image should become."),
                io.Float.Input(
                    "eta",
                    display_name="text strength (eta)",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Interpolates the embedding from the image (0) to the target prompt (1). 0.6 to 0.8 is usual.",
                ),
                method_input(),
                io.Int.Input(
                    "embedding_steps",
                    default=1000,
                    min=0,
                    max=10000,
                    tooltip="Adam steps for the embedding, 0 to 10000.",
                ),
                io.Float.Input(
                    "embedding_lr",
                    default=2e-3,
                    min=1e-7,
                    max=1.0,
                    step=1e-4,
                    round=1e-7,
                    tooltip="Learning rate of Adam for the embedding.",
                ),
                io.Int.Input(
                    "steps",
                    default=PRESET,
                    min=0,
                    max=10000,
                    tooltip="Adam steps for the model. 0 = automatic: 500 for LoRA, 1500 for all weights.",
                ),
                tuning_lr_input("1e-4", "5e-7"),
                seed_input(
                    "Seed of the noise and of the LoRA's initial weights. Every image of the batch has its own noise."
                ),
                rank_input(),
                *saving_inputs(),
            ],
            outputs=[
                *tuned_model_outputs(),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The interpolated embedding to sample with."
                ),
                io.Conditioning.Output(
                    "fitted", display_name="fitted", tooltip="The optimised embedding alone (eta 0)."
                ),
                *report_outputs("Steps taken, and the mean losses of both stages."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        latent,
        target,
        eta,
        method,
        embedding_steps,
        embedding_lr,
        steps,
        lr,
        seed,
        rank=16,
        low_memory=False,
        precision="float32",
        patience=0,
    ) -> io.NodeOutput:
        first = replace(
            EMBEDDINGS,
            steps=embedding_steps,
            lr=embedding_lr,
            patience=patience,
            low_memory=low_memory,
            compute_dtype=PRECISIONS[precision],
        )
        preset = LIGHT if METHODS[method] == "lora" else PUBLISHED
        overrides = {"steps": given(steps), "lr": given(lr), "patience": patience, "low_memory": low_memory}
        second = tuning_options(preset, method, rank, seed, precision, **overrides)
        clean, context = unnoised_samples(latent, "latent"), context_of(target, "target")
        found = imagic(
            open_denoiser(model, clean.shape, [context], learning=True),
            tunable(model, [context]),
            clean,
            context,
            eta=eta,
            seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
            embeddings=first,
            tuning=second,
            progress=progress_bar(first.steps + second.steps),
        )
        changes = found.tuning.changes
        embeddings = conditioning_out(found.context), conditioning_out(found.embeddings.object)
        graph, report = curve(found.tuning.losses, "model"), _report(found)
        return io.NodeOutput(
            tuned_model(model, changes), changes, *embeddings, graph, report, ui=show_text(cls, graph, report)
        )


def _report(found) -> str:
    """One line per stage."""
    embedding, tuning = found.embeddings, found.tuning
    return "\n".join(
        [summary("embedding", embedding.losses, embedding.stopped), summary("model", tuning.losses, tuning.stopped)]
    )


NODES = [Imagic]
