"""Mask nodes: the latent mask, and mask schedules."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..hosts.host import codec_of, to_host
from ..hosts.latent import latent_grid
from ..pipelines.core.errors import ParameterError
from ..pipelines.core.masks import MODES, dilation_schedule, downsample, parse_kernels, parse_shares, release_schedule
from ..pipelines.core.shapes import check_edit_mask, check_mask_of_grid, check_mask_of_image
from ._api import MaskScheduleSocket, for_page, io, preview, reproduction_switch, schema

log = logging.getLogger("editkit")

SHOWN = 4  # masks of a batch in the page


class LatentMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LatentMask",
            display_name="Latent Mask Downsample",
            category="EditKit/mask",
            description=(
                "Downsamples a pixel mask to the latent grid, where inpainting and blending happen. Mode 'max' keeps thin strokes; "
                "the output 'stroke kept' tells how much of the stroke is still covered."
            ),
            search_aliases=["mask downsample", "mask to latent", "blended latent diffusion", "inpaint mask"],
            inputs=[
                io.Mask.Input("mask", tooltip="Pixel mask, 1 = edit, at the size of the image: one, or one per image."),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The encoded image. It gives the size of the latent grid."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Use this instead of latent: the VAE's scale factor gives the size."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="max",
                    tooltip="How a latent pixel gets its value. max: the largest value in it, so thin strokes stay. area: the "
                    "mean, its coverage. nearest: the pixel at the centre. bilinear: interpolated at the centre.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Edit latent pixels with at least this value, 0 to 1. Softer strokes are lost in every mode. "
                    "0 keeps soft values.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "latent_mask", display_name="latent mask", tooltip="Mask on the latent grid, [B, h, w], 1 = edit."
                ),
                io.Float.Output(
                    "kept",
                    display_name="stroke kept",
                    tooltip="Share of the stroke under the latent mask, 0 to 1, smallest of the batch. Below 1 some of it is lost.",
                ),
            ],
        )

    @classmethod
    def execute(cls, mask, latent=None, vae=None, mode="max", threshold=0.5) -> io.NodeOutput:
        codec = None if vae is None else codec_of(vae)
        mask = check_edit_mask(mask, "mask")
        height, width, factor = latent_grid(mask, latent, codec)
        if latent is not None and "editkit_size" in latent:
            check_mask_of_image(mask, latent["editkit_size"])
        check_mask_of_grid(mask, (height, width), factor)
        result = downsample(mask, height, width, mode, threshold, factor=factor)
        for index in result.lost:
            log.warning(
                "EditKit_LatentMask: mask %d is empty on the %d x %d latent grid: its largest value is %.2g and the threshold is "
                "%.2g; use mode 'max', a lower threshold or a thicker stroke",
                index,
                width,
                height,
                float(mask[index].max()),
                threshold,
            )
        return io.NodeOutput(to_host(result.mask), float(result.kept.min()))


class DilationSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DilationSchedule",
            display_name="Progressive Dilation Mask Schedule",
            category="EditKit/mask",
            description=(
                "A mask schedule for thin masks: it starts with a dilated mask and shrinks it to yours in stages, so that a new "
                "object has room to form. The last stage is always exactly your mask."
            ),
            search_aliases=["dilation", "grow mask", "thin mask", "mask schedule", "progressive mask shrinking"],
            inputs=[
                io.Mask.Input(
                    "latent_mask", tooltip="Mask on the latent grid from 'Latent Mask Downsample', 1 = edit."
                ),
                io.String.Input(
                    "kernels",
                    default="7,5,3,1",
                    tooltip="Dilation kernel of each stage in latent pixels: odd, falling, ending with 1 (your mask). "
                    "1 alone keeps your mask at every step.",
                ),
                io.Boolean.Input(
                    "scale_with_size",
                    default=False,
                    tooltip="Scale the kernels with the shorter side of the latent. They were tuned for 32 x 32 latent pixels.",
                ),
                io.Boolean.Input(
                    "invert",
                    default=False,
                    tooltip="Edit everything outside the mask. The mask is inverted, then dilated.",
                ),
                reproduction_switch(
                    io.Boolean,
                    "published_rule",
                    default=False,
                    tooltip="Divide the steps as the published script does, and invert after dilating. With 4, 5, 6, 8, 9 or 12 "
                    "steps it never reaches your mask.",
                ),
                io.Combo.Input(
                    "parts",
                    display_name="stages",
                    optional=True,
                    options=["equal steps", "equal log-sigma"],
                    default="equal steps",
                    tooltip="equal steps: every stage gets as many steps. equal log-sigma: every stage gets an equal fall of "
                    "log sigma, so your mask comes late. Use it on small latents, or when objects vanish.",
                ),
                io.String.Input(
                    "shares",
                    display_name="shares of the steps",
                    optional=True,
                    default="",
                    tooltip="Share of the steps of each stage, for example 40,20,20,20. Empty = equal. Drag the handles below "
                    "to set them.",
                ),
            ],
            outputs=[
                MaskScheduleSocket.Output(
                    "schedule", display_name="schedule", tooltip="Which latent pixels may change at which step."
                ),
                io.Image.Output(
                    "strip", display_name="preview strip", tooltip="The stages from left to right, one line per mask."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, latent_mask, kernels, scale_with_size, invert, published_rule, parts="equal steps", shares=""
    ) -> io.NodeOutput:
        if not kernels.strip():
            raise ParameterError("kernels is empty: write odd numbers with commas, for example 7,5,3,1")
        if published_rule and parts != "equal steps":
            raise ParameterError(
                "published_rule has its own stages: set parts to 'equal steps', or switch the rule off"
            )
        if shares.strip() and (published_rule or parts != "equal steps"):
            raise ParameterError(
                "shares has its own stages: set stages to 'equal steps' and published rule off, or empty shares"
            )
        schedule = dilation_schedule(
            latent_mask,
            parse_kernels(kernels),
            invert=invert,
            scale_with_size=scale_with_size,
            spacing="published" if published_rule else parts.removeprefix("equal "),
            shares=parse_shares(shares),
        )
        strip = to_host(schedule.preview())
        return io.NodeOutput(schedule, strip, ui=for_page(preview(cls, strip), "masks", lambda: _bits(latent_mask)))


def _bits(mask: Tensor) -> dict[str, Any]:
    """The first masks of a batch, binary, for the page's strip: width, height, and the bits of each as hexadecimal text."""
    import numpy as np

    solid = (mask[:SHOWN] >= 0.5).flatten(1).cpu().numpy()
    return {
        "width": mask.shape[2],
        "height": mask.shape[1],
        "masks": [np.packbits(bits).tobytes().hex() for bits in solid],
    }


class ReleaseSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_ReleaseSchedule",
            display_name="Differential Diffusion (Soft Mask Schedule)",
            category="EditKit/mask",
            description=(
                "Turns a soft mask into a mask schedule: the value of a latent pixel decides how early it may change. 1 = from "
                "the first step, 0.5 = from half of the steps on, 0 = never. The edit has no hard border."
            ),
            search_aliases=["soft inpainting", "change map", "gradient mask", "mask schedule", "feather"],
            inputs=[
                io.Mask.Input(
                    "latent_mask",
                    tooltip="Soft mask on the latent grid, 0 (keep) to 1 (change freely); the published map is its inverse. "
                    "'Latent Mask Downsample' with threshold 0 keeps soft values.",
                ),
            ],
            outputs=[
                MaskScheduleSocket.Output(
                    "schedule", display_name="schedule", tooltip="Which latent pixels may change at which step."
                ),
                io.Image.Output(
                    "strip",
                    display_name="preview strip",
                    tooltip="The editable region at each eighth of the steps, from left to right, one line per mask.",
                ),
            ],
        )

    @classmethod
    def execute(cls, latent_mask) -> io.NodeOutput:
        schedule = release_schedule(latent_mask)
        strip = to_host(schedule.preview())
        return io.NodeOutput(schedule, strip, ui=preview(cls, strip))


NODES = [LatentMask, DilationSchedule, ReleaseSchedule]
