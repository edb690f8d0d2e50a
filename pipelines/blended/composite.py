"""Pixel blending: the edit inside the mask, the source outside it, exactly (docs/methods.md, sections 3 and 14).

A feather ramps inside the mask only, so that what the mask leaves out stays the source bit for bit.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError
from ..core.shapes import check_image, check_mask, common_batch, match_batch, same_size
from ..evaluation.metrics import largest_change_outside

log = logging.getLogger("editkit")


def blend_pixels(
    edited: Tensor, source: Tensor, mask: Tensor, *, feather_px: int = 0, linear_light: bool = False
) -> Tensor:
    """m edited + (1 - m) source, the simplest alternative of Blended Latent Diffusion's figure 4.

    Args:
        edited, source: IMAGE [B, H, W, 3] in [0, 1].
        mask: MASK, 1 = edit; soft values mix.
        feather_px: width of the ramp from source to edit, in pixels, inside the mask, >= 0.
        linear_light: mix light instead of sRGB code values, as an out-of-focus border would.
    Returns: IMAGE float32 [B, H, W, 3]; `source` bit for bit where the mask is 0, `edited` where the weight is 1.
    Raises: ShapeError, ParameterError.
    """
    edited = check_image(edited, "edited")
    source, mask = check_image(source, "source").to(edited.device), check_mask(mask, "mask").to(edited.device)
    same_size(edited, source, "edited", "source")
    same_size(edited, mask, "edited", "mask")
    batch = common_batch(edited=edited, source=source, mask=mask)
    weight = match_batch(feather(mask, feather_px), batch, "mask", "edited")[..., None]
    edited, source = match_batch(edited, batch, "edited", "source"), match_batch(source, batch, "source", "edited")
    if linear_light:
        mixed = from_linear(torch.lerp(to_linear(source), to_linear(edited), weight))
    else:
        mixed = torch.lerp(source, edited, weight)
    return torch.where(weight <= 0, source, torch.where(weight >= 1, edited, mixed))


def composite_source(edited: Tensor, source: Tensor, mask: Tensor, *, feather_px: int = 0) -> tuple[Tensor, float]:
    """Put the source back outside the mask, exactly: the last step of every masked method.

    Args:
        edited, source: IMAGE [B, H, W, 3] in [0, 1].
        mask: MASK, 1 = edit; soft values mix.
        feather_px: width of the ramp from source to edit, in pixels, inside the mask, >= 0.
    Returns: IMAGE [B, H, W, 3] and the largest absolute change of any value where the mask is 0, measured on the
        result: 0.0.
    Raises: ShapeError, ParameterError.
    """
    result = blend_pixels(edited, source, mask, feather_px=feather_px)
    return result, largest_change_outside(result, source, mask)


def feather(mask: Tensor, width_px: int) -> Tensor:
    """The mask with a linear ramp of `width_px` pixels inside its border, MASK [B, H, W]; 0 stays 0.

    A pixel's factor is its distance to the nearest pixel outside (mask 0), over width_px + 1, at most 1. The frame is
    no border. Strokes thinner than twice the ramp never reach 1, and a warning says so.
    """
    if isinstance(width_px, bool) or not isinstance(width_px, int) or width_px < 0:
        raise ParameterError(f"feather_px is {width_px!r}: give a whole number of pixels, 0 or more")
    mask = check_mask(mask, "mask")
    if width_px == 0:
        return mask
    soft = mask * (distance_inside(mask, width_px + 1) / (width_px + 1))
    if soft.sum() < 0.5 * mask.sum():
        log.warning("a feather of %d pixels takes away most of the edit: the mask is thinner than that", width_px)
    return soft


def distance_inside(mask: Tensor, limit: int) -> Tensor:
    """Euclidean distance in pixels to the nearest pixel where the MASK is 0, at most `limit`; 0 outside."""
    squared = torch.where(mask > 0, float(limit * limit), 0.0)
    for axis in (2, 1):  # the squared distance is a minimum over columns of a minimum over rows
        squared = _lowest_parabola(squared, axis, limit)
    return squared.sqrt()


def _lowest_parabola(value: Tensor, axis: int, limit: int) -> Tensor:
    """min over shifts s along `axis` of value(x + s) + s^2, for |s| < limit."""
    lowest, length = value, value.shape[axis]
    for shift in range(1, min(limit, length)):
        pads = ((shift, 0), (0, shift)) if axis == 2 else ((0, 0, shift, 0), (0, 0, 0, shift))
        kept = value.narrow(axis, 0, length - shift), value.narrow(axis, shift, length - shift)
        for pad, part in zip(pads, kept, strict=True):
            lowest = torch.minimum(lowest, F.pad(part, pad, value=float("inf")) + shift * shift)
    return lowest


def to_linear(image: Tensor) -> Tensor:
    """sRGB code values to linear light (IEC 61966-2-1), odd around 0."""
    size = image.abs()
    return image.sign() * torch.where(size <= 0.04045, size / 12.92, ((size + 0.055) / 1.055) ** 2.4)


def from_linear(light: Tensor) -> Tensor:
    """The inverse of `to_linear`."""
    size = light.abs()
    return light.sign() * torch.where(
        size <= 0.0031308, size * 12.92, 1.055 * size.clamp(min=1e-12) ** (1 / 2.4) - 0.055
    )
