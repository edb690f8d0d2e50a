"""Report of an edit: a table of metrics and a page of images, for every image of a batch (docs/methods.md, section 12)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ParameterError
from ..core.protocols import Ranker
from ..core.shapes import check_image, check_mask, common_batch, match_batch, same_size
from . import metrics
from .clip_ranking import text_scores
from .drawing import captioned, sheet

TILE = 224  # longer side of an image on the page, in pixels
BRIGHTEST = 0.25  # change of a channel that the page shows as white


@dataclass(frozen=True)
class Row:
    """One metric of every image: float32 [B] on the CPU, NaN where it is not defined."""

    name: str
    values: Tensor
    digits: int = 4


@dataclass(frozen=True)
class Measures:
    """The metrics of an edit, and what they compare: IMAGEs [B, H, W, 3] and, if there is one, the MASK [B, H, W]."""

    rows: tuple[Row, ...]
    source: Tensor
    edited: Tensor
    mask: Tensor | None

    def value(self, name: str) -> Tensor:
        """The values of the row whose name begins with `name`. Raises KeyError."""
        for row in self.rows:
            if row.name.startswith(name):
                return row.values
        raise KeyError(name)

    def table(self) -> str:
        """One line per metric, separated by tabs: name, a value per image, and the mean of a batch."""
        count = len(self.edited)
        heads = [f"image {index + 1}" for index in range(count)] + ["mean"] * (count > 1)
        lines = ["\t".join(["measure", *heads])]
        for row in self.rows:
            values = [*row.values.tolist(), *([float(row.values.nanmean())] if count > 1 else [])]
            lines.append("\t".join([row.name, *(_number(value, row.digits) for value in values)]))
        return "\n".join(lines)

    def report(self) -> Tensor:
        """One page per image, IMAGE [B, H', W', 3]: source, edited, mask and change, with the metrics below."""
        pages = [self._page(index) for index in range(len(self.edited))]
        height, width = (max(page.shape[axis] for page in pages) for axis in (1, 2))
        report = torch.ones(len(pages), height, width, 3)
        for index, page in enumerate(pages):
            report[index, : page.shape[1], : page.shape[2]] = page[0]
        return report

    def _page(self, index: int) -> Tensor:
        change = (self.edited[index] - self.source[index]).abs().amax(-1)
        tiles = [("source", self.source[index]), ("edited", self.edited[index])]
        if self.mask is not None:
            tiles.append(("mask", self.mask[index]))
        tiles.append((f"change (white: {BRIGHTEST:g} or more)", (change / BRIGHTEST).clamp(max=1)))
        lines = [f"{row.name}: {_number(float(row.values[index]), row.digits)}" for row in self.rows]
        return captioned(sheet(tiles, columns=2, tile=TILE), lines, size=20)


def measure_edit(
    source: Tensor, edited: Tensor, *, mask: Tensor | None = None, text: str = "", ranker: Ranker | None = None
) -> Measures:
    """Compare edited images with their source, and with a text (docs/methods.md, section 12).

    Args:
        source, edited: IMAGEs [B, H, W, 3] in [0, 1] of one size; a batch of 1 is repeated.
        mask: MASK [1 or B, H, W], 1 = edit; adds the metrics inside, outside and at the border of it.
        text: what the edited image should show, unchanged; adds the metrics of `ranker`. Each needs the other.
        ranker: embeds images and text.
    Returns: one row per metric with a value per image, and the IMAGEs and the MASK at one batch size, on the CPU.
    Raises: ShapeError for sizes and batches that differ; ParameterError for a text without a ranker or the reverse.
    """
    source, edited = check_image(source, "source").cpu(), check_image(edited, "edited").cpu()
    same_size(edited, source, "edited", "source")
    images = {"edited": edited, "source": source}
    if mask is not None:
        mask = check_mask(mask, "mask").cpu()
        same_size(mask, edited, "mask", "edited")
        images["mask"] = mask
    batch = common_batch(**images)
    if bool(text.strip()) != (ranker is not None):
        missing = "ranker is not connected" if ranker is None else "text is empty"
        raise ParameterError(f"{missing}: to compare with a text give both a text and a ranker, or neither")
    source, edited = match_batch(source, batch, "source", "edited"), match_batch(edited, batch, "edited", "source")
    mask = None if mask is None else match_batch(mask, batch, "mask", "edited")
    rows = [
        Row("PSNR (dB)", metrics.psnr(edited, source), 2),
        Row("SSIM (11 x 11 Gaussian, RGB)", metrics.ssim(edited, source)),
        *([] if mask is None else _masked_rows(source, edited, mask)),
        *([] if ranker is None else _text_rows(source, edited, text, ranker)),
    ]
    return Measures(tuple(rows), source, edited, mask)


def _masked_rows(source: Tensor, edited: Tensor, mask: Tensor) -> list[Row]:
    return [
        Row("PSNR inside the mask (dB)", metrics.psnr(edited, source, mask), 2),
        Row("PSNR outside the mask (dB)", metrics.psnr_outside(edited, source, mask), 2),
        Row("PSNR outside, over the frame (dB)", metrics.psnr_outside(edited, source, mask, over_frame=True), 2),
        Row("MSE inside the mask (x 1000)", 1000 * metrics.mse(edited, source, mask)),
        Row("MSE outside the mask (x 1000)", 1000 * metrics.mse(edited, source, 1 - mask)),
        Row("MSE outside, over the frame (x 1000)", 1000 * metrics.mse(edited, source, 1 - mask, over_frame=True)),
        Row("SSIM of windows outside the mask", metrics.ssim(edited, source, (mask == 0).float())),
        Row("largest change outside (of 255)", metrics.change_outside(edited, source, mask) * 255, 2),
        Row("seam (step at the border, 0 to 1)", metrics.seam_contrast(edited, source, mask)),
    ]


def _text_rows(source: Tensor, edited: Tensor, text: str, ranker: Ranker) -> list[Row]:
    """The cosine similarity in the three forms that tables print, and that of the source for comparison."""
    before, after = text_scores(source, text, ranker).cpu(), text_scores(edited, text, ranker).cpu()
    return [
        Row("text: cosine", after),
        Row("text: CLIPScore, 2.5 x cosine", metrics.clip_score(after)),
        Row("text: 100 x cosine", 100 * after, 2),
        Row("text: cosine of the source", before),
    ]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
