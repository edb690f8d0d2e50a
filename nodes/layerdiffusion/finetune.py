"""LayerDiffusion's fine-tune, and Imagic: MODEL clones that know one picture, and what they learned as a LoRA."""

from __future__ import annotations

from dataclasses import replace

from ...hosts import host as _host
from ...pipelines import imagic as presets
from ...pipelines.core.noise import image_seeds
from ...pipelines.evaluation.drawing import curve
from ...pipelines.imagic import imagic
from ...pipelines.layerdiffusion.finetune import LIGHT, PUBLISHED, TuneOptions, layered_tune
from ...pipelines.learning.weight_deltas import TunePlan, save_changes
from .._api import LoraSocket, io, schema, show_text
from .embeddings import (  # fmt: skip
    CATEGORY,
    PRECISIONS,
    conditioning_out,
    report_outputs,
    saving_inputs,
    seed_input,
    subject_mask,
    summary,
)

METHODS = {"LoRA (light)": "lora", "all weights (paper)": "full"}
PRESET = 0  # of steps or lr: take the method's own


def _method() -> io.Combo.Input:
    return io.Combo.Input(
        "method",
        options=list(METHODS),
        default="LoRA (light)",
        tooltip="LoRA (light): small additions to the attention layers. all weights (paper): the whole network, as "
        "published; 16 bytes of memory for each of its weights.",
    )


def _rank() -> io.Int.Input:
    return io.Int.Input(
        "rank", default=16, min=1, max=1024, optional=True, tooltip="LoRA only: rank of the additions; 16 is usual."
    )


def _lr(light: str, published: str) -> io.Float.Input:
    return io.Float.Input(
        "lr",
        default=PRESET,
        min=0.0,
        max=1.0,
        step=1e-6,
        round=1e-9,
        tooltip=f"Adam's learning rate. 0 = the method's: {light} for LoRA, {published} for all weights (as published).",
    )


def _model_outputs() -> list:
    return [
        io.Model.Output("tuned_model", display_name="model", tooltip="A clone of the MODEL with what was learned."),
        LoraSocket.Output(
            "lora",
            display_name="lora",
            tooltip="What was learned, for 'Save what a model learned' and the host's own LoRA nodes.",
        ),
    ]


def _options(preset: TuneOptions, method: str, rank: int, seed: int, precision: str, **given) -> TuneOptions:
    """A preset, with what differs from it; values of PRESET are the preset's own."""
    plan = TunePlan(METHODS[method], rank, seed, PRECISIONS[precision])
    return replace(preset, plan=plan, **{name: value for name, value in given.items() if value is not None})


def _given(value):
    return None if value == PRESET else value


class LayeredTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LayeredTune",
            display_name="Tune model to subject and background (LayerDiffusion)",
            category=CATEGORY,
            description=(
                "Teaches a copy of the model this one subject and this one background, with the mixed embedding fixed. Your "
                "MODEL is not changed: the result is a clone with patches, and a LoRA to save."
            ),
            search_aliases=["LayerDiffusion", "fine-tune", "DreamBooth", "train LoRA"],
            inputs=[
                io.Model.Input("model", tooltip="The model to teach; its LoRAs and patches stay in force."),
                io.Conditioning.Input(
                    "mixed", tooltip="The mixed embedding of 'Subject and background embeddings'; it stays as it is."
                ),
                io.Latent.Input(
                    "latent", tooltip="The encoded picture with the subject, or a batch of pictures of it."
                ),
                io.Mask.Input("mask", tooltip="The subject in that picture, 1 = subject. From anywhere."),
                _method(),
                io.Int.Input("steps", default=250, min=0, max=10000, tooltip="Adam steps; 250 as published."),
                _lr("1e-4", "2e-6"),
                io.Float.Input(
                    "object_weight",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the subject's loss (lambda 1); 2 as published, 3 for small subjects, 0 = off.",
                ),
                io.Float.Input(
                    "background_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the background's loss (lambda 2); 1 as published. 0 = off, needs no reference.",
                ),
                seed_input("Seed of the noises, and of the LoRA's start. Image b of the batch uses seed + b."),
                io.Latent.Input(
                    "reference",
                    optional=True,
                    tooltip="Clean latent of the new background, of the same size, from 'Reference background'.",
                ),
                io.Mask.Input(
                    "background_mask",
                    optional=True,
                    tooltip="Where the reference counts, 1 = counts; without it, everywhere but the subject's mask.",
                ),
                _rank(),
                io.Boolean.Input(
                    "normalise",
                    default=False,
                    optional=True,
                    tooltip="Make a small subject count as much as a large one. Off as published.",
                ),
                *saving_inputs(),
            ],
            outputs=[*_model_outputs(), *report_outputs("Steps taken, and the mean loss at the start and at the end.")],
        )

    @classmethod
    def execute(
        cls, model, mixed, latent, mask, method, steps, lr, object_weight, background_weight, seed, reference=None,
        background_mask=None, rank=16, normalise=False, low_memory=False, precision="float32", patience=0,
    ) -> io.NodeOutput:  # fmt: skip
        options = _options(
            LIGHT if METHODS[method] == "lora" else PUBLISHED, method, rank, seed, precision, steps=steps, lr=_given(lr),
            object_weight=object_weight, background_weight=background_weight, normalise=normalise, patience=patience,
            low_memory=low_memory,
        )  # fmt: skip
        clean, context = _host.unnoised_samples(latent, "latent"), _host.context(mixed, "mixed")
        found = layered_tune(
            _host.tunable(model, [context]), clean,
            None if reference is None else _host.unnoised_samples(reference, "reference"), context,
            subject_mask(mask, latent), background_mask=subject_mask(background_mask, latent),
            seeds=image_seeds(seed, len(clean), latent.get("batch_index")), options=options,
            progress=_host.progress(steps),
        )  # fmt: skip
        graph, report = curve(found.losses, "model"), summary("model", found.losses, found.stopped)
        tuned = _host.tuned_model(model, found.changes)
        return io.NodeOutput(tuned, found.changes, graph, report, ui=show_text(cls, graph, report))


class Imagic(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_Imagic",
            display_name="Fit model to picture and text (Imagic)",
            category=CATEGORY,
            description=(
                "Fits the text of what a picture should become to the picture as it is, then a copy of the model to both. "
                "Sample the result from noise with the embedding that it gives: eta decides between keeping and changing."
            ),
            search_aliases=["Imagic", "fine-tune", "text embedding optimisation"],
            inputs=[
                io.Model.Input("model", tooltip="The model to teach; your MODEL is not changed."),
                io.Latent.Input("latent", tooltip="The encoded picture."),
                io.Conditioning.Input("target", tooltip="What the picture should become."),
                io.Float.Input(
                    "eta",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 = the picture as it is, 1 = the text; 0.6 to 0.8 is usual.",
                ),
                _method(),
                io.Int.Input(
                    "embedding_steps",
                    default=1000,
                    min=0,
                    max=10000,
                    tooltip="Adam steps for the embedding; 1000 is usual.",
                ),
                io.Float.Input(
                    "embedding_lr",
                    default=2e-3,
                    min=1e-7,
                    max=1.0,
                    step=1e-4,
                    round=1e-7,
                    tooltip="Adam's learning rate for the embedding; 0.002 is usual.",
                ),
                io.Int.Input(
                    "steps",
                    default=PRESET,
                    min=0,
                    max=10000,
                    tooltip="Adam steps for the model. 0 = the method's: 500 for LoRA, 1500 for all weights.",
                ),
                _lr("1e-4", "5e-7"),
                seed_input("Seed of the noises, and of the LoRA's start. Image b of the batch uses seed + b."),
                _rank(),
                *saving_inputs(),
            ],
            outputs=[
                *_model_outputs(),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The embedding to sample with, eta between both."
                ),
                io.Conditioning.Output("fitted", display_name="fitted", tooltip="The fitted embedding alone (eta 0)."),
                *report_outputs("Steps taken, and the mean losses of both parts."),
            ],
        )

    @classmethod
    def execute(
        cls, model, latent, target, eta, method, embedding_steps, embedding_lr, steps, lr, seed, rank=16,
        low_memory=False, precision="float32", patience=0,
    ) -> io.NodeOutput:  # fmt: skip
        first = replace(
            presets.EMBEDDINGS, steps=embedding_steps, lr=embedding_lr, patience=patience, low_memory=low_memory,
            half=PRECISIONS[precision],
        )  # fmt: skip
        second = _options(
            presets.LIGHT if METHODS[method] == "lora" else presets.PUBLISHED, method, rank, seed, precision,
            steps=_given(steps), lr=_given(lr), patience=patience, low_memory=low_memory,
        )  # fmt: skip
        clean, context = _host.unnoised_samples(latent, "latent"), _host.context(target, "target")
        found = imagic(
            _host.open_denoiser(model, clean.shape, [context], learning=True), _host.tunable(model, [context]), clean,
            context, eta=eta, seeds=image_seeds(seed, len(clean), latent.get("batch_index")), embeddings=first,
            tuning=second, progress=_host.progress(first.steps + second.steps),
        )  # fmt: skip
        made, tuning = found.embeddings, found.tuning
        graph = curve(tuning.losses, "model")
        report = "\n".join(
            [summary("embedding", made.losses, made.stopped), summary("model", tuning.losses, tuning.stopped)]
        )
        return io.NodeOutput(
            _host.tuned_model(model, tuning.changes), tuning.changes, conditioning_out(found.context),
            conditioning_out(made.subject), graph, report, ui=show_text(cls, graph, report),
        )  # fmt: skip


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_SaveLora",
            display_name="Save what a model learned (LoRA file)",
            category=CATEGORY,
            description=(
                "Saves what a tuned model learned as a LoRA file below output/loras. Move it to models/loras, and any LoRA "
                "loader puts it on the same model, at any strength."
            ),
            search_aliases=["save LoRA", "export", "checkpoint"],
            inputs=[
                LoraSocket.Input("lora", tooltip="What was learned, from a tuning node."),
                io.String.Input(
                    "filename_prefix",
                    default="editkit",
                    tooltip="File name below output/loras, with folders if you like; a number is added.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="file", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, filename_prefix) -> io.NodeOutput:
        path = str(save_changes(lora, _host.new_lora_path(filename_prefix)))
        return io.NodeOutput(path, ui={"text": [path]})


NODES = [LayeredTune, Imagic, SaveLora]
