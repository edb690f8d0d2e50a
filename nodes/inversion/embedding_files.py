"""Save and load inversion embeddings."""

from __future__ import annotations

from ...hosts.embeddings import embeddings_out, learned_in, load_learned, save_learned
from ...hosts.files import embedding_files, embedding_name, embedding_path, save_embedding_file
from .._api import EmbeddingsSocket, io, schema
from .._inputs import embeddings_input


class SaveEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_SaveEmbeddings",
            display_name="Save Inversion Embeddings",
            category="EditKit/inversion",
            description=(
                "Saves the embeddings of an inversion as a safetensors file in the output folder, so that the image does not "
                "have to be inverted again. Existing files are never overwritten."
            ),
            search_aliases=["null text", "export", "save embeddings"],
            inputs=[
                embeddings_input("From null-text, negative-prompt or StyleDiffusion inversion."),
                io.String.Input(
                    "filename_prefix",
                    default="embeddings",
                    tooltip="File name in output/editkit_embeddings; folders are allowed. A number is added.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "file", display_name="file", tooltip="The file name, as 'Load Inversion Embeddings' lists it."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embeddings, filename_prefix) -> io.NodeOutput:
        learned = learned_in(embeddings)
        file = embedding_name(save_embedding_file(filename_prefix, lambda path: save_learned(learned, path)))
        return io.NodeOutput(file, ui={"text": [f"saved {file}"]})


class LoadEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadEmbeddings",
            display_name="Load Inversion Embeddings",
            category="EditKit/inversion",
            description=(
                "Loads saved inversion embeddings from output/editkit_embeddings or models/editkit_embeddings. Use them with "
                "the model and the sigmas they were made with. The model family and the sigmas are checked, the weights are not."
            ),
            search_aliases=["null text", "import", "load embeddings"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=embedding_files(),
                    tooltip="A file that 'Save Inversion Embeddings' wrote. Refresh the page to see new files.",
                )
            ],
            outputs=[
                EmbeddingsSocket.Output(
                    "embeddings",
                    display_name="embeddings",
                    tooltip="For the negative input of EditKit's nodes, 'Per-Step Negative Guider' and 'StyleDiffusion Edit'.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file) -> tuple[str, int]:
        """Read the file again when it has changed."""
        return file, embedding_path(file).stat().st_mtime_ns

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(embeddings_out(load_learned(embedding_path(file))))


NODES = [SaveEmbeddings, LoadEmbeddings]
