"""Checks of layouts, batches and sizes that every method shares.

IMAGE is [B, H, W, 3], MASK is [B, H, W], latents are [B, C, h, w]. Sizes that are not a multiple of the VAE factor are
padded on the right and at the bottom by reflection, and cropped back exactly. Pixel (0, 0) stays in latent pixel (0, 0).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ParameterError, ShapeError

log = logging.getLogger("editkit")

BRIGHTEST = 2.0  # of an IMAGE: upscalers and decoders overshoot 1 by little, images in 0 to 255 by far
PLACEHOLDER = (64, 64)  # height and width of the empty mask of ComfyUI's Load Image where nothing was painted
LARGEST_FACTOR = 64  # image pixels per latent pixel, of any VAE
UNPAINTED = "(Load Image gives an empty mask of 64 x 64 pixels where nothing was painted)"


def check_image(image: Tensor, socket: str) -> Tensor:
    """IMAGE as float32 [B, H, W, 3] in about [0, 1]; alpha is dropped. Raises ShapeError for anything else."""
    if not isinstance(image, Tensor):
        raise ShapeError(f"{socket} is a {type(image).__name__}: connect an IMAGE")
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ShapeError(
            f"{socket} has shape {list(image.shape)}: an IMAGE is [batch, height, width, 3] with no empty side"
        )
    if not image.is_floating_point():
        raise ShapeError(f"{socket} holds {image.dtype}: an IMAGE holds floats from 0 to 1, so divide by 255")
    image = image[..., :3].float()
    refuse_nan(image, socket)
    if image.max() > BRIGHTEST or image.min() < 1 - BRIGHTEST:
        raise ShapeError(
            f"{socket} has values from {image.min():.3g} to {image.max():.3g}: an IMAGE lies in 0 to 1, "
            "so divide by 255, or clamp what overshoots"
        )
    return image


def check_mask(mask: Tensor, socket: str) -> Tensor:
    """MASK as float32 [B, H, W] in [0, 1]; [H, W] and [B, 1, H, W] are accepted too. Raises ShapeError for anything else."""
    if not isinstance(mask, Tensor):
        raise ShapeError(f"{socket} is a {type(mask).__name__}: connect a MASK")
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3 or 0 in mask.shape:
        raise ShapeError(f"{socket} has shape {list(mask.shape)}: a MASK is [batch, height, width] with no empty side")
    mask = mask.float()
    refuse_nan(mask, socket)
    if mask.min() < 0 or mask.max() > 1:
        raise ShapeError(
            f"{socket} has values from {mask.min():.3g} to {mask.max():.3g}: a MASK lies in 0 to 1 (1 = edit)"
        )
    return mask


def check_latent(latent: Tensor, socket: str, channels: int | None = None) -> Tensor:
    """Latent [B, C, h, w] with the number of channels that the model takes. Raises ShapeError for anything else."""
    if not isinstance(latent, Tensor):
        raise ShapeError(f"{socket} holds a {type(latent).__name__}: connect a LATENT with one tensor of samples")
    if latent.ndim != 4 or 0 in latent.shape:
        raise ShapeError(
            f"{socket} has shape {list(latent.shape)}: a latent is [batch, channels, height, width] with no empty side"
        )
    if channels is not None and latent.shape[1] != channels:
        raise ShapeError(
            f"{socket} has {latent.shape[1]} channels but the model takes {channels}: encode with the model's own VAE"
        )
    refuse_nan(latent, socket)
    return latent


def refuse_nan(value: Tensor, socket: str) -> None:
    """Raise ShapeError for NaN or infinity, naming the socket."""
    if not torch.isfinite(value).all():
        raise ShapeError(
            f"{socket} contains NaN or infinity: check what came in (a model or VAE in half precision can overflow)"
        )


def check_tokens(tokens: Tensor, socket: str) -> Tensor:
    """A text embedding [R, T, D]. Raises ShapeError for another layout, no tokens, NaN or infinity."""
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ShapeError(
            f"{socket} has a text embedding {list(tokens.shape)}: [rows, tokens, width], none of them 0, is needed; encode "
            "the prompt with CLIP Text Encode"
        )
    if not torch.isfinite(tokens).all():
        raise ShapeError(f"{socket} contains NaN or infinity: check the CLIP or the embeddings that made it")
    return tokens


def check_width(width: int, expected: int | None, socket: str) -> None:
    """Raise ShapeError for text of another width than a network takes; None accepts every width."""
    if expected is not None and width != expected:
        raise ShapeError(
            f"{socket} has width {width} but this model takes {expected}: encode it with this model's CLIP"
        )


def check_pooled(pooled: Tensor | None, expected: int | None, socket: str) -> None:
    """Raise ShapeError for a prompt without the pooled text [R, P] that a network takes; None accepts everything."""
    if expected is None:
        return
    if pooled is None:
        raise ShapeError(
            f"{socket} has no pooled text, of which this model takes {expected} numbers: encode it with this model's CLIP"
        )
    if pooled.shape[-1] != expected:
        raise ShapeError(
            f"{socket} has a pooled text of {pooled.shape[-1]} numbers but this model takes {expected}: encode it with this "
            "model's CLIP"
        )


def check_channels(latent: Tensor, channels: int) -> None:
    """Raise ShapeError for a latent [B, C, h, w] of another model family."""
    if latent.ndim != 4 or latent.shape[1] != channels:
        raise ShapeError(
            f"latent is {list(latent.shape)} but this model takes [batch, {channels}, height, width]: encode the image with "
            "this model's VAE"
        )


def match_batch(value: Tensor, batch: int, socket: str, other: str) -> Tensor:
    """`value` with exactly `batch` entries; a single entry is repeated (as a view).

    Args:
        value: [1 or batch, ...].
        batch: entries that are needed, at least 1.
        socket: the input that `value` came from, for the message.
        other: the input that sets `batch`, for the message.
    Returns: [batch, ...].
    Raises: ShapeError for any other number of entries.
    """
    if value.shape[0] == batch:
        return value
    if value.shape[0] == 1:
        return value.expand(batch, *value.shape[1:])
    raise ShapeError(f"{socket} has {value.shape[0]} entries but {other} has {batch}: pass 1 or {batch}")


def common_batch(**values: Tensor) -> int:
    """The batch size that fits all `values`, of which those of size 1 are repeated. Names are sockets, for the message."""
    sizes = {name: value.shape[0] for name, value in values.items()}
    batch = max(sizes.values())
    wrong = {name: size for name, size in sizes.items() if size not in (1, batch)}
    if wrong:
        given = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ShapeError(f"batch sizes do not fit: {given}: each must be 1 or {batch}")
    return batch


def same_size(a: Tensor, b: Tensor, first: str, second: str) -> None:
    """Check that two IMAGE or MASK tensors share height and width.

    Args:
        a, b: [B, H, W, 3] or [B, H, W].
        first, second: the inputs that they came from, for the message.
    Raises: ShapeError for sizes that differ.
    """
    if a.shape[1:3] != b.shape[1:3]:
        raise ShapeError(
            f"{first} is {a.shape[2]} x {a.shape[1]} pixels but {second} is {b.shape[2]} x {b.shape[1]}: "
            "give both the same size"
        )


def padded_length(length: int, factor: int) -> int:
    """The smallest multiple of `factor` that holds `length`."""
    return -(-length // factor) * factor


def _reflect_index(length: int, target: int, device: torch.device) -> Tensor:
    """0, 1, ..., length - 1, length - 2, ...: reflection without repeating the edge; a single pixel is repeated."""
    index = torch.arange(target, device=device)
    if length == 1:
        return index * 0
    period = 2 * (length - 1)
    index = index % period
    return torch.where(index < length, index, period - index)


def pad_to_factor(value: Tensor, factor: int) -> Tensor:
    """IMAGE [B, H, W, C] or MASK [B, H, W] padded right and below by reflection to multiples of `factor`."""
    height, width = value.shape[1:3]
    tall, wide = padded_length(height, factor), padded_length(width, factor)
    if tall != height:
        value = value.index_select(1, _reflect_index(height, tall, value.device))
    if wide != width:
        value = value.index_select(2, _reflect_index(width, wide, value.device))
    return value


def crop_to(value: Tensor, height: int, width: int) -> Tensor:
    """The exact inverse of `pad_to_factor`: the first `height` rows and `width` columns of dimensions 1 and 2."""
    if value.shape[1] < height or value.shape[2] < width:
        raise ShapeError(
            f"cannot crop {value.shape[2]} x {value.shape[1]} pixels to {width} x {height}: the image is smaller"
        )
    return value[:, :height, :width]


@dataclass(frozen=True)
class Sources:
    """Which image each candidate was made from.

    Attributes:
        index: for every candidate the index of its source.
        images: number of sources; some may have no candidate left.
    """

    index: list[int]
    images: int


def candidate_sources(images: int, copies: int) -> Sources:
    """The sources of repeated images: 0, 1, ..., 0, 1, ..."""
    return Sources([candidate % images for candidate in range(images * copies)], images)


def checked_sources(sources: Sources, batch: int, socket: str) -> Sources:
    """The sources of a batch of `batch` candidates that carries `sources`; `socket` names it for the message.

    Raises: ShapeError where a node changed the batch after the sources were written, so that they may be of others.
    """
    if len(sources.index) == batch:
        return sources
    if sources.images == 1:
        return candidate_sources(1, batch)
    raise ShapeError(
        f"{socket} has {batch} entries but carries the sources of {len(sources.index)} candidates: a node changed its batch "
        "after 'Noise Latent to Sigma'; choose or repeat images before that node, or candidates after the edit"
    )


def with_sources(value: Tensor, sources: Sources | None, socket: str, other: str) -> Tensor:
    """`value` [images, ...] with one entry for every candidate; one entry stays one, because it serves all.

    A value with as many entries as there are candidates was repeated already and stays as it is.

    Args:
        value: what belongs to the sources: latents, images or masks.
        sources: from `checked_sources`; None leaves `value` alone.
        socket, other: names of `value` and of the candidates, for the message.
    Returns: [candidates, ...]; `value` itself where one entry serves all or nothing is to be done.
    Raises: ShapeError for another number of entries, and for a repeated value whose candidates were reordered since.
    """
    if sources is None or len(value) == 1:
        return value
    index, images = sources.index, sources.images
    if len(value) == images:
        return value if index == list(range(images)) else value[index]
    if len(value) == len(index) and index == [i % images for i in range(len(index))]:
        return value
    raise ShapeError(
        f"{socket} has {len(value)} entries but {other} has {len(index)} candidates of {images} sources: connect the "
        f"{images} that were noised, in their order, or 1"
    )


# --------------------------------------------------------------------------------------- mistakes in the mask of an edit
def check_edit_mask(mask: Tensor, socket: str = "mask") -> Tensor:
    """MASK [B, H, W] of the pixels to edit. Warns for empty ones among others, and for those that keep nothing.

    Raises: ShapeError for anything but a MASK; ParameterError where every mask is empty.
    """
    mask = check_mask(mask, socket)
    highest = mask.flatten(1).amax(1)
    if not (highest > 0).any():
        hint = f" {UNPAINTED}" if tuple(mask.shape[1:]) == PLACEHOLDER else ""
        raise ParameterError(f"{socket} is empty, so nothing would be edited{hint}: paint the region to edit, 1 = edit")
    for index in (highest == 0).nonzero().flatten().tolist():
        log.warning("%s %d of the batch is empty: that image will not be edited", socket, index)
    if (mask >= 0.5).all():
        log.warning(
            "%s covers the whole image: nothing is kept; paint only the region to edit, or invert the mask", socket
        )
    return mask


def check_mask_of_image(mask: Tensor, size: tuple[int, int], socket: str = "mask") -> None:
    """Refuse a MASK [B, H, W] of another size than the image's (height, width). Raises ShapeError."""
    if tuple(mask.shape[1:]) != tuple(size):
        raise ShapeError(
            f"{socket} is {mask.shape[2]} x {mask.shape[1]} pixels but the image is {size[1]} x {size[0]}: give the mask of "
            f"this image {UNPAINTED}"
        )


def check_mask_of_grid(mask: Tensor, grid: tuple[int, int], factor: int | None, socket: str = "mask") -> None:
    """Refuse a MASK [B, H, W] that cannot belong to an image of this latent grid.

    Args:
        mask: the pixel mask.
        grid: height and width in latent pixels.
        factor: image pixels per latent pixel; None accepts every whole factor.
        socket: of the mask, for the message.
    Raises: ShapeError.
    """
    height, width = mask.shape[1:]
    factors = [factor] if factor else range(1, LARGEST_FACTOR + 1)
    if not any(_covers(height, grid[0], pixels) and _covers(width, grid[1], pixels) for pixels in factors):
        scale = f" of {factor} pixels" if factor else ""
        raise ShapeError(
            f"{socket} is {width} x {height} pixels, which does not fit the latent of {grid[1]} x {grid[0]} latent "
            f"pixels{scale}: give the mask of the image that was encoded {UNPAINTED}"
        )


def _covers(length: int, latent_pixels: int, factor: int) -> bool:
    """Whether an image side of `length` pixels is encoded in that many latent pixels: padded, or cropped by ComfyUI."""
    return latent_pixels * factor in (padded_length(length, factor), length // factor * factor)
