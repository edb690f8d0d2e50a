"""Loader nodes: the bundled model and folders in diffusers layout, and rankers."""

from __future__ import annotations

from ..hosts import host as _host
from ._api import RankerSocket, io, schema

BUNDLED = "bundled"


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadModel",
            display_name="Load model (bundled or diffusers folder)",
            category="EditKit/load",
            description=(
                "The tiny model that ships with EditKit, so that every workflow runs without a download, or a folder in "
                "diffusers layout. For a single-file checkpoint use Load Checkpoint in its place."
            ),
            search_aliases=["checkpoint", "tiny model", "diffusers"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[BUNDLED, *_host.diffusers_folders()],
                    default=BUNDLED,
                    tooltip="'bundled', or a folder below models/diffusers (unet, vae, text_encoder, safetensors only).",
                )
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip="The denoiser."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder."),
                io.Vae.Output("vae", display_name="vae", tooltip="The autoencoder."),
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(*(_host.load_bundled() if model == BUNDLED else _host.load_diffusers_folder(model)))


class LoadRanker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadRanker",
            display_name="Load ranker (CLIP)",
            category="EditKit/load",
            description=(
                "The judge that 'Rank by text' uses: the tiny one that ships with EditKit (it knows the bundled model's "
                "pictures), or an open_clip architecture with a local weight file. Nothing is downloaded."
            ),
            search_aliases=["clip score", "open_clip"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=[BUNDLED, *_host.ranker_files()],
                    default=BUNDLED,
                    tooltip="'bundled', or a safetensors file below models/clip_vision or models/editkit_rankers.",
                ),
                io.String.Input(
                    "architecture",
                    default="ViT-B-16",
                    optional=True,
                    tooltip="open_clip's name of the file's architecture; BLD was published with ViT-B-16 "
                    "(OpenAI's weights: ViT-B-16-quickgelu). "
                    "Unused for the bundled ranker.",
                ),
            ],
            outputs=[RankerSocket.Output("ranker", display_name="ranker", tooltip="For 'Rank by text'.")],
        )

    @classmethod
    def execute(cls, weights, architecture="ViT-B-16") -> io.NodeOutput:
        ranker = _host.load_bundled_ranker() if weights == BUNDLED else _host.load_ranker_file(architecture, weights)
        return io.NodeOutput(ranker)


NODES = [LoadModel, LoadRanker]
