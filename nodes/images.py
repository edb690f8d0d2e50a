"""Picture nodes: encode and decode at any size, and pictures to start from."""

from __future__ import annotations

from ..hosts import host as _host
from ..hosts.bundled.example_images import EXAMPLES, load_example
from ..pipelines.core.noise import image_seeds, seeded_noise
from ..pipelines.core.shapes import check_image, check_latent, crop_to, pad_to_factor
from ._api import io, preview, schema


class LoadExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LoadExample",
            display_name="Example picture",
            category="EditKit/load",
            description=(
                "A picture that ships with EditKit, with a mask and the sentence that describes it: made for the bundled "
                "model, so that a workflow runs anywhere. For your own picture use Load Image."
            ),
            search_aliases=["sample image", "demo picture"],
            inputs=[
                io.Combo.Input(
                    "name", options=list(EXAMPLES), default=EXAMPLES[0], tooltip="Which of the shipped pictures."
                )
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The picture, 96 x 96 pixels."),
                io.Mask.Output("mask", display_name="mask", tooltip="A mask that goes with it, 1 = edit."),
                io.String.Output("caption", display_name="caption", tooltip="The sentence that describes the picture."),
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
            display_name="Encode picture, any size",
            category="EditKit/blend",
            description=(
                "Encodes a picture of any size: it is padded by reflection to whole latent cells, and 'Decode picture' crops "
                "it back exactly. (VAE Encode cuts odd sizes off instead.)"
            ),
            search_aliases=["VAE encode", "odd size", "padding"],
            inputs=[
                io.Image.Input("image", tooltip="Picture of any size, [B, H, W, 3], 0 to 1."),
                io.Vae.Input("vae", tooltip="The model's own VAE."),
                io.Combo.Input(
                    "posterior",
                    options=["mean", "sample"],
                    default="mean",
                    optional=True,
                    tooltip="mean: the most likely latent. sample: a random one, as the published LDM script.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # a new seed at every run would encode, and edit, again each time
                    optional=True,
                    tooltip="Seed of the sample, 0 to 2^64 - 1; unused for mean.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="Clean latent; remembers the picture's own size."
                )
            ],
        )

    @classmethod
    def execute(cls, image, vae, posterior="mean", seed=0) -> io.NodeOutput:
        image, codec = check_image(image, "image"), _host.codec(vae)
        padded = pad_to_factor(image, codec.factor)
        noise = None
        if posterior == "sample":
            shape = (codec.channels, padded.shape[1] // codec.factor, padded.shape[2] // codec.factor)
            noise = seeded_noise(shape, image_seeds(seed, len(image)), codec.device)
        latent = codec.encode(padded, noise=noise)
        size = (image.shape[1], image.shape[2])
        return io.NodeOutput(_host.finished_out(latent, like={"editkit_size": size, "editkit_factor": codec.factor}))


class DecodeLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DecodeLatent",
            display_name="Decode picture, its own size",
            category="EditKit/blend",
            description="Decodes a latent and crops the padding that 'Encode picture' added: same size out as in.",
            search_aliases=["VAE decode", "crop"],
            inputs=[
                io.Latent.Input("latent", tooltip="A clean latent."),
                io.Vae.Input("vae", tooltip="The VAE that encoded it, or its tuned copy."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The picture at its own size, 0 to 1.")],
        )

    @classmethod
    def execute(cls, latent, vae) -> io.NodeOutput:
        samples = check_latent(_host.samples(latent), "latent")
        image = _host.codec(vae).decode(samples)
        height, width = latent.get("editkit_size", image.shape[1:3])
        return io.NodeOutput(_host.to_host(crop_to(image, height, width)))


NODES = [LoadExample, EncodeImage, DecodeLatent]
