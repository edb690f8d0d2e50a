"""The loss of background reconstruction: the source outside the mask, the edit inside it (BLD, section 4.2).

    edit        MSE(D(z) m, edited m)
    background  weight MSE(D(z) (1 - m), source (1 - m))

Both are means over all elements of images in [-1, 1] (docs/methods.md, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import EditError, ShapeError
from ..core.protocols import LatentCodec
from ..core.shapes import check_image, check_latent, check_mask, common_batch, match_batch, padded_length, same_size
from ..evaluation.metrics import psnr_outside
from ..learning.optimise import own

EDIT = 0  # index of each term in the loss
BACKGROUND = 1


@dataclass(frozen=True)
class BackgroundLoss:
    """Checked inputs of one batch size.

    Attributes:
        latent: [B, C, h, w], unscaled.
        source: the image to restore outside the mask, [B, 3, H, W] in [-1, 1].
        edited: the image to keep inside the mask, [B, 3, H, W] in [-1, 1]; None until `prepared`.
        mask: [B, 1, H, W], 1 = edit.
        weight: of the background against the edit.
    """

    latent: Tensor
    source: Tensor
    edited: Tensor | None
    mask: Tensor
    weight: float

    def prepared(self, first: Tensor) -> BackgroundLoss:
        """A copy that learning may use, on the device of the first decode; without an edit, the decode is to be kept."""
        device = first.device
        edited = self._crop(first).float().clone() if self.edited is None else own(self.edited, device)
        return BackgroundLoss(self.latent, own(self.source, device), edited, own(self.mask, device), self.weight)

    def __call__(self, decoded: Tensor) -> Tensor:
        """The two terms [2] of a decoded image [B, 3, H', W'], which may be padded."""
        decoded = self._crop(decoded).float()
        edited = decoded.detach() if self.edited is None else self.edited
        edit = ((decoded - edited) * self.mask).square().mean()
        background = ((decoded - self.source) * (1 - self.mask)).square().mean()
        return torch.stack([edit, self.weight * background])

    def squares(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The loss as one weighted square per number, over some rows of pixels: sum w (D - t / w)^2 + constant.

        Returns: w [B, 1, rows, W] and t [B, 3, rows, W].
        """
        if self.edited is None:
            raise EditError("the loss does not know the edit yet: call prepared first")
        mask = self.mask[:, :, rows]
        inside, outside = mask.square(), self.weight * (1 - mask).square()
        return inside + outside, inside * self.edited[:, :, rows] + outside * self.source[:, :, rows]

    def image(self, decoded: Tensor) -> Tensor:
        """A decoded image as IMAGE [B, H, W, 3] in [0, 1], without padding."""
        return (self._crop(decoded).float().movedim(1, -1) * 0.5 + 0.5).clamp(0, 1).contiguous()

    def psnr(self, image: Tensor) -> float:
        """Mean PSNR of IMAGE outside the mask, over the images that have an outside."""
        source = self.source.movedim(1, -1) * 0.5 + 0.5
        return float(psnr_outside(image, source, self.mask[:, 0]).nanmean())

    def _crop(self, decoded: Tensor) -> Tensor:
        height, width = self.mask.shape[-2:]
        return decoded[..., :height, :width]


def background_loss(
    codec: LatentCodec, latent: Tensor, source: Tensor, edited: Tensor | None, mask: Tensor, weight: float
) -> BackgroundLoss:
    """Check the inputs of `tune_decoder` or `tune_latent` and bring them to one batch size.

    Args:
        codec: the VAE.
        latent: [B, C, h, w], unscaled.
        source: IMAGE [B, H, W, 3] to restore outside the mask.
        edited: IMAGE to keep inside the mask, or None.
        mask: MASK [B, H, W], 1 = edit.
        weight: of the background against the edit, >= 0.
    Returns: the loss.
    Raises: ShapeError.
    """
    latent = check_latent(latent, "latent", codec.channels)
    source = check_image(source, "source")
    mask = check_mask(mask, "mask")
    same_size(source, mask, "source", "mask")
    batched = {"latent": latent, "source": source, "mask": mask}
    if edited is not None:
        edited = batched["edited"] = check_image(edited, "edited")
        same_size(edited, source, "edited", "source")
    batch = common_batch(**batched)
    _check_latent_size(codec, latent, source)
    return BackgroundLoss(
        match_batch(latent, batch, "latent", "source"),
        _channels_first(source, batch),
        None if edited is None else _channels_first(edited, batch),
        match_batch(mask, batch, "mask", "source")[:, None],
        weight,
    )


def _check_latent_size(codec: LatentCodec, latent: Tensor, source: Tensor) -> None:
    height, width = source.shape[1:3]
    needed_height = padded_length(height, codec.factor) // codec.factor
    needed_width = padded_length(width, codec.factor) // codec.factor
    if tuple(latent.shape[-2:]) != (needed_height, needed_width):
        raise ShapeError(
            f"latent is {latent.shape[3]} x {latent.shape[2]} latent pixels but source, {width} x {height} pixels, needs "
            f"{needed_width} x {needed_height} with this VAE: encode the same image, or resize source and mask"
        )


def _channels_first(image: Tensor, batch: int) -> Tensor:
    """IMAGE [B, H, W, 3] in [0, 1] as [B, 3, H, W] in [-1, 1]."""
    return match_batch(image, batch, "image", "latent").movedim(-1, 1) * 2 - 1
