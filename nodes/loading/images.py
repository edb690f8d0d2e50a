"""Image nodes: example images, and VAE encode and decode at any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hosts.bundled.example_images import EXAMPLES, load_example
from ...hosts.host import codec_of, to_host
from ...hosts.latent import finished_out, samples_of
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.images import decode_image, encode_image
from ...pipelines.core.noise import image_seeds
from ...pipelines.core.shapes import PLACEHOLDER, check_image, check_latent, check_mask, check_mask_of_image
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
                "files. Connect the IMAGE and MASK of Load Image to edit your own image instead."
            ),
            search_aliases=["sample image", "demo image"],
            inputs=[
                io.Combo.Input(
                    "name", options=list(EXAMPLES), default=EXAMPLES[0], tooltip="Which of the example images to load."
                ),
                io.Image.Input(
                    "own_image",
                    display_name="own image",
                    optional=True,
                    tooltip="Your image from Load Image, of any size. It takes the place of the example and its mask.",
                ),
                io.Mask.Input(
                    "own_mask",
                    display_name="own mask",
                    optional=True,
                    tooltip="The mask of your image, 1 = edit: the MASK of Load Image, painted with Open in MaskEditor.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="Your image, or the example of 96 x 96 pixels."),
                io.Mask.Output("mask", display_name="mask", tooltip="Its mask, 1 = edit."),
                io.String.Output(
                    "caption",
                    display_name="caption",
                    tooltip="A sentence that describes the example; empty for your own image.",
                ),
            ],
            is_output_node=True,  # so that the page shows the image also where nothing has to run again
        )

    @classmethod
    def execute(cls, name, own_image=None, own_mask=None) -> io.NodeOutput:
        if own_image is not None or own_mask is not None:
            image, mask = _own(own_image, own_mask)
            return io.NodeOutput(image, mask, "", ui=preview(cls, image))
        example = load_example(name)
        return io.NodeOutput(example.image, example.mask, example.caption, ui=preview(cls, example.image))


def _own(image: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """The user's IMAGE and MASK. Without a mask, an empty one of the image's size, for methods that need none.

    Raises: ParameterError for a mask alone; ShapeError for one of another size.
    """
    if image is None:
        raise ParameterError("own_mask is connected but own_image is not: connect the IMAGE of the same Load Image")
    image = check_image(image, "own_image")
    if mask is None:
        return image, torch.zeros(image.shape[:3])
    mask = check_mask(mask, "own_mask")
    if tuple(mask.shape[1:]) == PLACEHOLDER and not mask.any():
        return image, torch.zeros(image.shape[:3])  # nothing was painted; a node that needs a mask refuses it
    check_mask_of_image(mask, (image.shape[1], image.shape[2]), "own_mask")
    return image, mask


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
