"""Embeddings on disk: learned once, used in any later session."""

from __future__ import annotations

from ...hosts import host as _host
from ...hosts.embeddings import load_learned, save_learned
from .._api import EmbeddingsSocket, io, schema


class SaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_SaveEmbeddings",
            display_name="Save embeddings",
            category="EditKit/inversion",
            description=(
                "Writes the embeddings of an inversion to a safetensors file in the output folder, so that the picture need "
                "not be inverted again. An older file is never overwritten."
            ),
            search_aliases=["null text", "export"],
            inputs=[
                EmbeddingsSocket.Input(
                    "embeddings", tooltip="Of null-text or negative-prompt inversion, or of StyleDiffusion."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="embeddings",
                    tooltip="File name, with folders if you like, inside output/editkit_embeddings; a number is added.",
                ),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="The file's name, as 'Load embeddings' lists it.")
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings, filename_prefix) -> io.NodeOutput:
        file = _host.embedding_name(
            save_learned(_host.learned_in(embeddings), _host.new_embedding_path(filename_prefix))
        )
        return io.NodeOutput(file, ui={"text": [f"saved {file}"]})


class LoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadEmbeddings",
            display_name="Load embeddings",
            category="EditKit/inversion",
            description=(
                "Reads embeddings that were saved, from output/editkit_embeddings or models/editkit_embeddings. They fit the "
                "model and the sigmas they were made with: the family and the sigmas are checked, the weights are not known."
            ),
            search_aliases=["null text", "import"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_host.embedding_files(),
                    tooltip="A safetensors file that 'Save embeddings' wrote. Refresh the page to see new ones.",
                )
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    "embeddings",
                    display_name="embeddings",
                    tooltip="As they were saved: a negative for every step, or a picture's values (StyleDiffusion).",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file) -> tuple[str, int]:
        """The file is read again when it has changed."""
        return file, _host.embedding_path(file).stat().st_mtime_ns

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(_host.embeddings_out(load_learned(_host.embedding_path(file))))


NODES = [SaveEmbeddings, LoadEmbeddings]
