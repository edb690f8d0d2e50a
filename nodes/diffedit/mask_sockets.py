"""Inputs and outputs that the nodes of DiffEdit share: what its mask takes, and what it gives."""

from __future__ import annotations

from typing import Any

from ...hosts.host import codec_of, to_host
from ...hosts.latent import image_size
from ...hosts.sockets import context_of
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.protocols import Context
from ...pipelines.diffedit.mask import DiffEditMask, MaskNegatives, heat_image, mask_in_pixels
from .._api import io
from .._inputs import prompt_pair_inputs, strength_input


def prompts() -> list:
    return prompt_pair_inputs(
        "The source prompt: what the image shows. An empty prompt works less precisely.",
        "The target prompt: the source prompt with the words of the edit changed.",
    )


def mask_inputs() -> list:
    return [
        io.Int.Input("maps", default=10, min=1, max=100, tooltip="How many noise draws are averaged, 1 to 100."),
        strength_input(0.5, 0.02, "Noise strength of the comparison, 0.02 to 1."),
        io.Float.Input(
            "threshold",
            default=0.5,
            min=0.01,
            max=0.99,
            step=0.01,
            tooltip="Share of the ceiling above which a latent pixel is edited. Lower values give a larger mask.",
        ),
    ]


def rule_inputs() -> list:
    return [
        io.Float.Input(
            "clip_ratio",
            default=3.0,
            min=0.1,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="The ceiling of the difference map, 0.1 to 100 times its mean. Larger differences are clipped.",
        ),
        io.Int.Input(
            "smooth",
            default=1,
            min=1,
            max=31,
            step=2,
            optional=True,
            tooltip="Side of the averaging window in latent pixels, odd, 1 to 31. 1 = no smoothing.",
        ),
        io.Int.Input(
            "smallest_island",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="Remove connected regions smaller than this many latent pixels. 0 keeps all.",
        ),
    ]


def negative_inputs() -> list:
    """A negative prompt for each of the two predictions, as in diffusers."""
    return [
        io.Conditioning.Input(
            "source_negative",
            optional=True,
            tooltip="Negative prompt of the source prompt while the mask is computed. Needs target_negative. Two equal ones "
            "leave the mask as it is.",
        ),
        io.Conditioning.Input(
            "target_negative",
            optional=True,
            tooltip="Negative prompt of the target prompt while the mask is computed. Needs source_negative.",
        ),
        io.Float.Input(
            "mask_cfg",
            default=7.5,
            min=0.1,
            max=30.0,
            step=0.1,
            optional=True,
            tooltip="CFG scale of the mask, 0.1 to 30. Used only with the two negatives, which double the model calls of the mask.",
        ),
    ]


def negatives_in(source_negative: Any, target_negative: Any, scale: float) -> MaskNegatives | None:
    """The negatives of the mask; None without any. Raises ParameterError where only one is connected."""
    given = {"source_negative": source_negative, "target_negative": target_negative}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        raise ParameterError(
            f"{missing[0]} is not connected but the other negative of the mask is: connect both (an empty prompt may be one)"
        )
    if missing:
        return None
    source, target = (context_of(value, name) for name, value in given.items())
    return MaskNegatives(source, target, scale)


def mask_prompts(negatives: MaskNegatives | None) -> list[Context]:
    """The negatives of the mask for `open_denoiser`."""
    return [] if negatives is None else [negatives.source, negatives.target]


def vae_for_size() -> io.Vae.Input:
    return io.Vae.Input(
        "vae",
        optional=True,
        tooltip="The VAE, for its scale factor. Needed only for a latent from ComfyUI's VAE Encode.",
    )


def mask_outputs() -> list:
    return [
        io.Mask.Output("mask", display_name="mask", tooltip="The mask at the size of the image, [B, H, W], 1 = edit."),
        io.Mask.Output(
            "latent_mask", display_name="latent mask", tooltip="The mask on the latent grid, [B, h, w], 1 = edit."
        ),
        io.Image.Output(
            "heat_map",
            display_name="heat map",
            tooltip="The difference between the two prompts, from black (none) to white (the ceiling).",
        ),
    ]


def size_of(latent: Any, vae: Any) -> tuple[int, int, int]:
    return image_size(latent, None if vae is None else codec_of(vae))


def shown(found: DiffEditMask, size: tuple[int, int, int]) -> tuple:
    """The three mask outputs and the line of text below the node."""
    mask, heat = to_host(mask_in_pixels(found.mask, *size)), to_host(heat_image(found.heat, *size))
    shares = ", ".join(f"{share:.0%}" for share in found.mask.mean(dim=(1, 2)).tolist())
    text = f"to edit: {shares} of the image"
    if found.empty:
        text += f". Nothing found in image {', '.join(map(str, found.empty))}: do the prompts differ?"
    return (mask, to_host(found.mask), heat), text
