"""Loader nodes: the bundled model, diffusers folders and rankers."""

from __future__ import annotations

from ...hosts.bundled import BUNDLED, bundled_models
from ...hosts.loading import (
    AUTOMATIC,
    checkpoint_files,
    diffusers_folders,
    load_model,
    load_ranker,
    ranker_files,
)
from .._api import RankerSocket, io, schema


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadModel",
            display_name="Load EditKit Model",
            category="EditKit/loaders",
            description=(
                "Loads the tiny model that ships with EditKit, so that every workflow runs without a download, one of your "
                "checkpoints as Load Checkpoint does, or a model folder in diffusers layout."
            ),
            search_aliases=["checkpoint", "tiny model", "diffusers", "bundled model"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*bundled_models(), *checkpoint_files(), *diffusers_folders()],
                    default=BUNDLED,
                    tooltip="'bundled', a file in models/checkpoints, or a folder in models/diffusers with unet, vae and "
                    "text_encoder (safetensors only).",
                )
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder."),
                io.Vae.Output("vae", display_name="vae", tooltip="The VAE."),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(*load_model(model))


class LoadRanker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadRanker",
            display_name="Load CLIP Ranker",
            category="EditKit/loaders",
            description=(
                "Loads the scorer for 'CLIP Rank' and 'Measure Edit': an open_clip model from a local file, or the tiny one that "
                "ships with EditKit, which knows only images of the bundled model. Nothing is downloaded."
            ),
            search_aliases=["clip score", "open_clip", "ranker", "scorer"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=[BUNDLED, AUTOMATIC, *ranker_files()],
                    default=AUTOMATIC,
                    tooltip="automatic: the first file in models/editkit_rankers, or else the bundled ranker. Or choose a "
                    "safetensors file that holds image and text encoder.",
                ),
                io.String.Input(
                    "architecture",
                    default=AUTOMATIC,
                    optional=True,
                    tooltip="automatic: from the file. Or open_clip's name, for example ViT-B-16-quickgelu for OpenAI's weights. "
                    "Not used for the bundled ranker.",
                ),
            ],
            outputs=[
                RankerSocket.Output("ranker", display_name="ranker", tooltip="For 'CLIP Rank' and 'Measure Edit'.")
            ],
        )

    @classmethod
    def execute(cls, weights, architecture=AUTOMATIC) -> io.NodeOutput:
        return io.NodeOutput(load_ranker(weights, architecture))


NODES = [LoadModel, LoadRanker]
