"""Image nodes: example images, and VAE encode and decode at any size."""

from __future__ import annotations

from ...hosts.bundled.example_images import EXAMPLES, load_example
from ...hosts.host import codec_of, to_host
from ...hosts.latent import finished_out, samples_of
from ...pipelines.core.images import decode_image, encode_image
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.shapes import check_image, check_latent
from .._api import io, preview, reproduction_switch, schema
from .._inputs import latent_input, seed_input


class LoadExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadExample",
            display_name="Example Image and Mask",
            category="EditKit/loaders",
            description=(
                "An example image with a mask and a caption, made for the bundled model, so that a workflow runs without any "
                "files. For your own image use Load Image instead."
            ),
            search_aliases=["sample image", "demo image"],
            inputs=[
                io.Combo.Input(
                    "name", options=list(EXAMPLES), default=EXAMPLES[0], tooltip="Which of the example images to load."
                )
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The image, 96 x 96 pixels."),
                io.Mask.Output("mask", display_name="mask", tooltip="Its mask, 1 = edit."),
                io.String.Output("caption", display_name="caption", tooltip="A sentence that describes the image."),
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        example = load_example(name)
        return io.NodeOutput(example.image, example.mask, example.caption, ui=preview(cls, example.image))


class EncodeImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_EncodeImage",
            display_name="VAE Encode (Any Size)",
            category="EditKit/latent",
            description=(
                "Encodes an image of any size. It is padded by reflection to whole latent pixels; 'VAE Decode (Original Size)' "
                "removes the padding. ComfyUI's VAE Encode crops odd sizes instead."
            ),
            search_aliases=["VAE encode", "odd size", "padding"],
            inputs=[
                io.Image.Input("image", tooltip="Image of any size, [B, H, W, 3], 0 to 1."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                reproduction_switch(
                    io.Combo,
                    "posterior",
                    display_name="VAE posterior",
                    options=["mean", "sample"],
                    default="mean",
                    optional=True,
                    tooltip="mean: the most likely latent. sample: a random latent, as in the published LDM script.",
                ),
                # A new seed at every run would encode, and edit, again each time.
                seed_input("Seed for posterior 'sample'. Not used for 'mean'.", optional=True, control=False),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="Clean latent. It remembers the original image size."
                )
            ],
        )

    @classmethod
    def execute(cls, image, vae, posterior="mean", seed=0) -> io.NodeOutput:
        image, codec = check_image(image, "image"), codec_of(vae)
        latent = encode_image(codec, image, seeds=image_seeds(seed, len(image)) if posterior == "sample" else None)
        size = (image.shape[1], image.shape[2])
        return io.NodeOutput(finished_out(latent, like={"editkit_size": size, "editkit_factor": codec.factor}))


class DecodeLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DecodeLatent",
            display_name="VAE Decode (Original Size)",
            category="EditKit/latent",
            description="Decodes a latent and removes the padding of 'VAE Encode (Any Size)': the image keeps its original size.",
            search_aliases=["VAE decode", "crop"],
            inputs=[
                latent_input("A clean latent."),
                io.Vae.Input("vae", tooltip="The VAE that encoded it, or its fine-tuned copy."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The image at its original size, 0 to 1.")],
        )

    @classmethod
    def execute(cls, latent, vae) -> io.NodeOutput:
        samples = check_latent(samples_of(latent), "latent")
        return io.NodeOutput(to_host(decode_image(codec_of(vae), samples, latent.get("editkit_size"))))


NODES = [LoadExample, EncodeImage, DecodeLatent]
