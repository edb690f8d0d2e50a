"""The edit window: crop around a small mask, and paste the edited crop back."""

from __future__ import annotations

from ...hosts.host import to_host
from ...pipelines.blended.window import GRID, EditWindow, edit_window
from ...pipelines.core.errors import ShapeError
from ...pipelines.core.shapes import check_edit_mask, check_image, check_mask_of_image
from .._api import WindowSocket, io, preview, schema


class CropWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_CropWindow",
            display_name="Crop Edit Window",
            category="EditKit/mask",
            description=(
                "Crops image and mask to a window around the mask, so that a small edit in a large image is made at the size that "
                "the model knows, and costs no more. 'Paste Edit Window' puts the result back. Nothing is resized."
            ),
            search_aliases=["crop around mask", "inpaint crop", "crop and stitch", "only masked", "masked area"],
            inputs=[
                io.Image.Input("image", tooltip="The whole image, [B, H, W, 3], 0 to 1."),
                io.Mask.Input("mask", tooltip="Pixel mask of the edit, 1 = edit: one, or one per image."),
                io.Int.Input(
                    "size",
                    default=512,
                    min=8,
                    max=8192,
                    step=8,
                    tooltip="Smallest side of the window in pixels, 8 to 8192: the size that the model was trained at. "
                    "A larger mask gets a larger window.",
                ),
                io.Int.Input(
                    "context",
                    default=64,
                    min=0,
                    max=4096,
                    tooltip="Pixels around the mask that the model sees at least, 0 to 4096.",
                ),
                io.Int.Input(
                    "multiple",
                    default=GRID,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="The window's corner lies on a grid of this many pixels, 1 to 64: the factor of the VAE.",
                ),
            ],
            outputs=[
                io.Image.Output("window_image", display_name="image", tooltip="The window of each image."),
                io.Mask.Output("window_mask", display_name="mask", tooltip="The window of each mask."),
                WindowSocket.Output("window", display_name="window", tooltip="For 'Paste Edit Window'."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, size, context, multiple=GRID) -> io.NodeOutput:
        image, mask = check_image(image, "image"), check_edit_mask(mask, "mask")
        check_mask_of_image(mask, (image.shape[1], image.shape[2]))
        window = edit_window(mask, size=size, context=context, multiple=multiple)
        cropped, masks = to_host(window.crop(image, "image")), to_host(window.crop(mask, "mask"))
        return io.NodeOutput(cropped, masks, window, ui=preview(cls, cropped))


class PasteWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_PasteWindow",
            display_name="Paste Edit Window",
            category="EditKit/background",
            description=(
                "Pastes the edited window back into the whole image. Every pixel outside the window keeps its bits; composite the "
                "window over its source first to keep the pixels around the mask too."
            ),
            search_aliases=["stitch", "uncrop", "inpaint stitch", "paste back", "crop and stitch"],
            inputs=[
                io.Image.Input(
                    "edited", tooltip="The edited window, at its size: one per image, or several candidates."
                ),
                io.Image.Input("source", tooltip="The whole image that was cropped."),
                WindowSocket.Input("window", tooltip="From 'Crop Edit Window'."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The whole image with the edit.")],
        )

    @classmethod
    def execute(cls, edited, source, window) -> io.NodeOutput:
        if not isinstance(window, EditWindow):
            raise ShapeError(f"window is a {type(window).__name__}: connect the window of 'Crop Edit Window'")
        image = to_host(window.paste(check_image(edited, "edited"), check_image(source, "source")))
        return io.NodeOutput(image, ui=preview(cls, image))


NODES = [CropWindow, PasteWindow]
