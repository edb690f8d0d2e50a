"""The edit window: a part of a large image around a small mask, edited alone and pasted back.

A model edits best at the size that it was trained at, and its cost grows with the pixels. The window keeps the pixels as
they are: nothing is resampled, so cropping and pasting back is the identity. Its corner lies on the latent grid, so that
the same window cuts latents too (docs/methods.md, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.shapes import check_edit_mask, match_batch, padded_length

GRID = 8  # pixels; the factor of most VAEs


@dataclass(frozen=True)
class EditWindow:
    """One rectangle per image, all of one size.

    Attributes:
        image: height and width of the whole image, in pixels.
        size: height and width of the window.
        corners: top and left of the window in each image.
    """

    image: tuple[int, int]
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def crop(self, value: Tensor, socket: str = "image") -> Tensor:
        """The window of each image: IMAGE [B, H, W, 3] or MASK [B, H, W]; one value serves all windows.

        Raises: ShapeError for another size or batch.
        """
        self._check_whole(value, socket)
        value = match_batch(value, len(self.corners), socket, "window") if len(self.corners) > 1 else value
        corners = self._corners_of(len(value), socket)
        height, width = self.size
        parts = [
            part[top : top + height, left : left + width] for part, (top, left) in zip(value, corners, strict=True)
        ]
        return torch.stack(parts)

    def paste(self, edited: Tensor, source: Tensor) -> Tensor:
        """The source with the edited window in its place; every pixel outside keeps its bits.

        Args:
            edited: IMAGE [B, h, w, 3] of the window's size: one per source, or several of one source.
            source: IMAGE [B or 1, H, W, 3] of the whole image's size.
        Returns: IMAGE [B, H, W, 3] on the device of `source`.
        Raises: ShapeError.
        """
        self._check_whole(source, "source")
        if tuple(edited.shape[1:3]) != self.size:
            raise ShapeError(
                f"edited is {edited.shape[2]} x {edited.shape[1]} pixels but the window is {self.size[1]} x {self.size[0]}: "
                "edit the cropped image without resizing it, or resize it back"
            )
        corners = self._corners_of(len(edited), "edited")
        result = match_batch(source, len(edited), "source", "edited").clone()
        height, width = self.size
        for index, (top, left) in enumerate(corners):
            result[index, top : top + height, left : left + width] = edited[index].to(result)
        return result

    def latent(self, latent: Tensor, factor: int) -> Tensor:
        """The window of latents [B, C, h, w] with `factor` image pixels per latent pixel.

        Raises: ParameterError where the window does not lie on that grid.
        """
        if any(place % factor for corner in self.corners for place in corner):
            raise ParameterError(
                f"the window does not lie on a grid of {factor} pixels: crop with a multiple of {factor}"
            )
        height, width = (padded_length(side, factor) // factor for side in self.size)
        corners = self._corners_of(len(latent), "latent")
        parts = [
            part[:, top // factor : top // factor + height, left // factor : left // factor + width]
            for part, (top, left) in zip(latent, corners, strict=True)
        ]
        return torch.stack(parts)

    def _corners_of(self, count: int, socket: str) -> Sequence[tuple[int, int]]:
        """A corner for each of `count` values; one window serves all."""
        if len(self.corners) == 1:
            return self.corners * count
        if len(self.corners) != count:
            raise ShapeError(f"{socket} has {count} entries but the window has {len(self.corners)}: pass as many")
        return self.corners

    def _check_whole(self, value: Tensor, socket: str) -> None:
        if tuple(value.shape[1:3]) != self.image:
            raise ShapeError(
                f"{socket} is {value.shape[2]} x {value.shape[1]} pixels but the window was made for {self.image[1]} x "
                f"{self.image[0]}: give the image that was cropped"
            )


def edit_window(mask: Tensor, *, size: int = 512, context: int = 64, multiple: int = GRID) -> EditWindow:
    """The window around each mask: at least `size` pixels on a side, and `context` pixels more than the mask on each side.

    Args:
        mask: MASK [B, H, W] in [0, 1], 1 = edit; an empty one among others gets the middle of its image.
        size: smallest side of the window in pixels, > 0: the size that the model was trained at.
        context: pixels around the mask that the model sees, >= 0.
        multiple: the corner lies on this grid, in pixels, > 0.
    Returns: a window never larger than the image; larger than `size` where the mask needs it. All masks of a batch share
        the size of the largest.
    Raises: ShapeError, ParameterError.
    """
    mask = check_edit_mask(mask, "mask")
    for name, value, lowest in (("size", size, 1), ("context", context, 0), ("multiple", multiple, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ParameterError(f"{name} is {value!r}: give a whole number of pixels, {lowest} or more")
    height, width = mask.shape[1:]
    rows = _along([_extent(one.amax(1)) for one in mask], height, size, context, multiple)
    columns = _along([_extent(one.amax(0)) for one in mask], width, size, context, multiple)
    corners = tuple(zip(rows[1], columns[1], strict=True))
    return EditWindow((height, width), (rows[0], columns[0]), corners)


def _extent(line: Tensor) -> tuple[int, int]:
    """First and last + 1 of the places above 0; the middle where there is none."""
    found = line.nonzero().flatten()
    if not len(found):
        return len(line) // 2, len(line) // 2
    return int(found[0]), int(found[-1]) + 1


def _along(
    extents: Sequence[tuple[int, int]], length: int, size: int, context: int, multiple: int
) -> tuple[int, list[int]]:
    """Length of the window along one axis, and its start in every image.

    Args:
        extents: first and last + 1 of each mask.
        length: of the image.
        size, context, multiple: as in `edit_window`.
    """
    widest = max(last - first for first, last in extents) + 2 * context + multiple - 1
    window = min(length, padded_length(max(size, widest), multiple))
    if (length - window) % multiple and any(last + context > length - length % multiple for _, last in extents):
        window += (length - window) % multiple  # a mask at the far border: the last start on the grid must reach it
    last_start = (length - window) // multiple * multiple
    starts = []
    for first, last in extents:
        start = (first + last - window) // 2 // multiple * multiple
        start += multiple if start + window < last + context else 0  # the grid moved it too far
        starts.append(min(max(0, start), last_start))
    return window, starts
