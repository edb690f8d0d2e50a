"""Mask nodes: pixel mask to latent mask, and the schedules that shrink a mask or let it grow."""

from __future__ import annotations

import logging

from ..hosts import host as _host
from ..pipelines.core.errors import ParameterError
from ..pipelines.core.masks import MODES, dilation_schedule, downsample, parse_kernels, release_schedule
from ..pipelines.core.shapes import check_mask
from ._api import MaskScheduleSocket, io, preview, schema

log = logging.getLogger("editkit")


class LatentMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_LatentMask",
            display_name="Latent mask (BLD)",
            category="EditKit/mask",
            description=(
                "Brings a pixel mask onto the latent grid, where the blending happens. A thin stroke can vanish there; "
                "mode 'max' never loses one, and the node says how much of the stroke the latent mask still covers."
            ),
            search_aliases=["mask downsample", "mask to latent", "blended latent diffusion"],
            inputs=[
                io.Mask.Input(
                    "mask", tooltip="Pixel mask, 1 = edit, at the size of the picture. One mask or one per image."
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The encoded picture: gives the size of the latent grid."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Instead of a latent: the VAE whose factor gives the latent size."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="max",
                    tooltip="max: a cell that the stroke touches. area: a cell covered at least to the threshold. "
                    "nearest: the pixel at the cell's centre (as published). bilinear: interpolated at the centre.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Coverage from which a cell is edited, 0 to 1. 0 keeps soft values.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "latent_mask", display_name="latent mask", tooltip="Mask on the latent grid, [B, h, w], 1 = edit."
                ),
                io.Float.Output(
                    "kept",
                    display_name="stroke kept",
                    tooltip="Smallest share of a stroke's pixels under the latent mask, 0 to 1.",
                ),
            ],
        )

    @classmethod
    def execute(cls, mask, latent=None, vae=None, mode="max", threshold=0.5) -> io.NodeOutput:
        height, width, factor = _host.latent_grid(check_mask(mask, "mask"), latent, vae)
        result = downsample(mask, height, width, mode, threshold, factor=factor)
        for index in result.lost:
            log.warning(
                "EditKit_LatentMask: the stroke of mask %d is gone on the %d x %d latent grid: use mode 'max' or a thicker stroke",
                index,
                width,
                height,
            )
        return io.NodeOutput(_host.to_host(result.mask), float(result.kept.min()))


class DilationSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DilationSchedule",
            display_name="Progressive mask shrinking (BLD)",
            category="EditKit/mask",
            description=(
                "Begins with a grown mask and shrinks it to yours part by part, so that thin masks have room for a shape before "
                "the background is pinned. The last part is always exactly your mask."
            ),
            search_aliases=["dilation", "grow mask", "thin mask", "mask schedule"],
            inputs=[
                io.Mask.Input("latent_mask", tooltip="Mask on the latent grid, from 'Latent mask', 1 = edit."),
                io.String.Input(
                    "kernels",
                    default="7,5,3,1",
                    tooltip="Sizes of the dilations in latent cells, odd, falling, ending with 1 (your mask). "
                    "One equal part of the run each; 1 alone is the plain loop.",
                ),
                io.Boolean.Input(
                    "scale_with_size",
                    default=False,
                    tooltip="The paper's kernels were tuned on 32 x 32 cells (256 px). On: keep their share of the shorter side.",
                ),
                io.Boolean.Input(
                    "invert", default=False, tooltip="Edit everything but the mask; inverted before it is grown."
                ),
                io.Boolean.Input(
                    "published_rule",
                    default=False,
                    tooltip="As the official script: unequal parts (runs of 4, 5, 6, 8, 9 or 12 steps never reach your mask) "
                    "and inversion after growing. Only to reproduce published pictures.",
                ),
                io.Combo.Input(
                    "parts",
                    optional=True,
                    options=["equal steps", "equal noise"],
                    default="equal steps",
                    tooltip="equal steps: every kernel gets as many steps, as published. equal noise: every kernel gets an "
                    "equal fall of log sigma, so that your mask alone comes late. Take it where shapes still vanish, above "
                    "all on small latents.",
                ),
            ],
            outputs=[
                MaskScheduleSocket.Output(
                    "schedule", display_name="schedule", tooltip="Which latent cells may change at which step."
                ),
                io.Image.Output(
                    "strip", display_name="preview strip", tooltip="The parts from left to right, one row per mask."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, latent_mask, kernels, scale_with_size, invert, published_rule, parts="equal steps"
    ) -> io.NodeOutput:
        if not kernels.strip():
            raise ParameterError("kernels is empty: write odd numbers with commas, for example 7,5,3,1")
        if published_rule and parts != "equal steps":
            raise ParameterError(
                "published_rule has parts of its own: set parts to 'equal steps', or switch the rule off"
            )
        schedule = dilation_schedule(
            latent_mask,
            parse_kernels(kernels),
            invert=invert,
            scale_with_size=scale_with_size,
            division="published" if published_rule else parts.removeprefix("equal "),
        )
        strip = _host.to_host(schedule.preview())
        return io.NodeOutput(schedule, strip, ui=preview(cls, strip))


class ReleaseSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_ReleaseSchedule",
            display_name="Change by degrees (Differential Diffusion)",
            category="EditKit/mask",
            description=(
                "Turns a soft mask into a schedule: a cell that may change a little is held to the source for most of the steps "
                "and let go late, one that may change freely is free from the start. The editable part grows, where 'Progressive "
                "mask shrinking' lets it shrink."
            ),
            search_aliases=["soft inpainting", "change map", "gradient mask", "mask schedule"],
            inputs=[
                io.Mask.Input(
                    "latent_mask",
                    tooltip="How much each latent cell may change, 0 (not at all) to 1 (freely); the published map is its "
                    "inverse. From 'Latent mask' with threshold 0, which keeps soft values.",
                ),
            ],
            outputs=[
                MaskScheduleSocket.Output(
                    "schedule", display_name="schedule", tooltip="Which latent cells may change at which step."
                ),
                io.Image.Output(
                    "strip",
                    display_name="preview strip",
                    tooltip="What may change at each eighth of the steps, from left to right, one row per mask.",
                ),
            ],
        )

    @classmethod
    def execute(cls, latent_mask) -> io.NodeOutput:
        schedule = release_schedule(latent_mask)
        strip = _host.to_host(schedule.preview())
        return io.NodeOutput(schedule, strip, ui=preview(cls, strip))


NODES = [LatentMask, DilationSchedule, ReleaseSchedule]
