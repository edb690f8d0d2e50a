"""LayerDiffusion's fine-tune, what it shares with Imagic, and saving a LoRA."""

from __future__ import annotations

from dataclasses import replace

from ...hosts.files import save_lora_file
from ...hosts.host import progress_bar, tunable, tuned_model
from ...hosts.latent import unnoised_samples
from ...hosts.sockets import context_of
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.evaluation.drawing import curve
from ...pipelines.layerdiffusion.finetune import LIGHT, PUBLISHED, TuneOptions, layered_tune
from ...pipelines.learning.weight_deltas import save_changes
from .._api import LoraSocket, io, schema, show_text
from .._inputs import latent_input, model_input, seed_input
from .embeddings import (
    CATEGORY,
    PRECISIONS,
    object_mask,
    report_outputs,
    saving_inputs,
    summary,
)

METHODS = {"LoRA (light)": "lora", "all weights (paper)": "full"}
PRESET = 0  # of steps or lr: take the method's own


def method_input() -> io.Combo.Input:
    return io.Combo.Input(
        "method",
        options=list(METHODS),
        default="LoRA (light)",
        tooltip="LoRA (light): a LoRA on the attention layers. all weights (paper): the whole network, with 16 bytes of "
        "memory per weight.",
    )


def rank_input() -> io.Int.Input:
    return io.Int.Input(
        "rank", default=16, min=1, max=1024, optional=True, tooltip="Rank of the LoRA, 1 to 1024. 16 is usual."
    )


def tuning_lr_input(lora: str, all_weights: str) -> io.Float.Input:
    return io.Float.Input(
        "lr",
        default=PRESET,
        min=0.0,
        max=1.0,
        step=1e-6,
        round=1e-9,
        tooltip=f"Learning rate of Adam. 0 = automatic: {lora} for LoRA, {all_weights} for all weights.",
    )


def tuned_model_outputs() -> list:
    return [
        io.Model.Output("tuned_model", display_name="model", tooltip="A fine-tuned clone of the model."),
        LoraSocket.Output(
            "lora",
            display_name="lora",
            tooltip="The changes of the weights, for 'Save LoRA' and ComfyUI's own LoRA nodes.",
        ),
    ]


def tuning_options(preset: TuneOptions, method: str, rank: int, seed: int, precision: str, **changes) -> TuneOptions:
    """A preset with the settings that override it. None keeps the preset's own."""
    plan = TunePlan(METHODS[method], rank, seed, PRECISIONS[precision])
    return replace(preset, plan=plan, **{name: value for name, value in changes.items() if value is not None})


def given(value):
    return None if value == PRESET else value


class LayeredTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LayeredTune",
            display_name="Layered Fine-Tune (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "Second stage of LayerDiffusion: fine-tunes a copy of the model on this object and the new background, with the "
                "mixed embedding fixed. Your model is not changed; the output is a patched clone and a LoRA to save."
            ),
            search_aliases=["LayerDiffusion", "fine-tune", "DreamBooth", "train LoRA"],
            inputs=[
                model_input("The model to fine-tune. Its LoRA and patches stay active."),
                io.Conditioning.Input(
                    "mixed", tooltip="The mixed embedding of 'Layered Embeddings'. It is not changed."
                ),
                latent_input("Encoded image with the object, or a batch of images of the same object."),
                io.Mask.Input("mask", tooltip="Pixel mask of the object in that image, 1 = object."),
                method_input(),
                io.Int.Input("steps", default=250, min=0, max=10000, tooltip="Adam steps, 0 to 10000."),
                tuning_lr_input("1e-4", "2e-6"),
                io.Float.Input(
                    "object_weight",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the object's loss (lambda 1), 0 to 100. 3 for small objects, 0 = off.",
                ),
                io.Float.Input(
                    "background_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the background's loss (lambda 2), 0 to 100. 0 = off, needs no reference.",
                ),
                seed_input(
                    "Seed of the noise and of the LoRA's initial weights. Every image of the batch has its own noise."
                ),
                io.Latent.Input(
                    "reference",
                    optional=True,
                    tooltip="Clean latent of the new background, of the same size, from 'Replace Background Reference "
                    "(LayerDiffusion)'.",
                ),
                io.Mask.Input(
                    "background_mask",
                    optional=True,
                    tooltip="Where the reference counts, 1 = counts. Without it: everywhere outside the object's mask.",
                ),
                rank_input(),
                io.Boolean.Input(
                    "normalise",
                    default=False,
                    optional=True,
                    tooltip="Divide each loss by the size of its mask, so that a small object counts as much as a large one.",
                ),
                *saving_inputs(),
            ],
            outputs=[
                *tuned_model_outputs(),
                *report_outputs("Steps taken, and the mean loss at the start and at the end."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        mixed,
        latent,
        mask,
        method,
        steps,
        lr,
        object_weight,
        background_weight,
        seed,
        reference=None,
        background_mask=None,
        rank=16,
        normalise=False,
        low_memory=False,
        precision="float32",
        patience=0,
    ) -> io.NodeOutput:
        options = tuning_options(
            LIGHT if METHODS[method] == "lora" else PUBLISHED,
            method,
            rank,
            seed,
            precision,
            steps=steps,
            lr=given(lr),
            object_weight=object_weight,
            background_weight=background_weight,
            normalise=normalise,
            patience=patience,
            low_memory=low_memory,
        )
        clean, context = unnoised_samples(latent, "latent"), context_of(mixed, "mixed")
        found = layered_tune(
            tunable(model, [context]),
            clean,
            None if reference is None else unnoised_samples(reference, "reference"),
            context,
            object_mask(mask, latent),
            background_mask=object_mask(background_mask, latent),
            seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
            options=options,
            progress=progress_bar(steps),
        )
        graph, report = curve(found.losses, "model"), summary("model", found.losses, found.stopped)
        tuned = tuned_model(model, found.changes)
        return io.NodeOutput(tuned, found.changes, graph, report, ui=show_text(cls, graph, report))


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_SaveLora",
            display_name="Save LoRA",
            category=CATEGORY,
            description=(
                "Saves the changes of a fine-tuned model as a LoRA file in output/loras. Move it to models/loras to use it with "
                "any LoRA loader, at any strength."
            ),
            search_aliases=["save LoRA", "export", "checkpoint"],
            inputs=[
                LoraSocket.Input("lora", tooltip="The lora output of a fine-tuning node."),
                io.String.Input(
                    "filename_prefix",
                    default="editkit",
                    tooltip="File name in output/loras; folders are allowed. A number is added.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="file", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, filename_prefix) -> io.NodeOutput:
        path = str(save_lora_file(filename_prefix, lambda file: save_changes(lora, file)))
        return io.NodeOutput(path, ui={"text": [path]})


NODES = [LayeredTune, SaveLora]
