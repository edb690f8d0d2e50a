"""Images of any size through a VAE: padded by reflection before it, cropped after it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .noise import seeded_noise
from .protocols import LatentCodec
from .shapes import crop_to, pad_to_factor, refuse_nan


def encode_image(codec: LatentCodec, image: Tensor, *, seeds: Sequence[int] | None = None) -> Tensor:
    """Encode an image [B, H, W, 3] in [0, 1] of any size, padded to whole latent pixels.

    Args:
        codec: the VAE.
        image: as above.
        seeds: one per image, for a sample of the posterior; None = its mean.
    Returns: clean latents [B, C, ceil(H / factor), ceil(W / factor)], unscaled.
    """
    padded = pad_to_factor(image, codec.factor)
    if seeds is None:
        return codec.encode(padded)
    shape = (codec.channels, padded.shape[1] // codec.factor, padded.shape[2] // codec.factor)
    return codec.encode(padded, noise=seeded_noise(shape, seeds, codec.device))


def decode_image(codec: LatentCodec, latent: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Decode clean latents [B, C, h, w], unscaled, and crop the image to `size` (height, width); None keeps all of it.

    Raises: ShapeError for an image smaller than `size`, and where the VAE answers with NaN or infinity.
    """
    image = codec.decode(latent)
    refuse_nan(image, "the decoded image")
    return image if size is None else crop_to(image, *size)
