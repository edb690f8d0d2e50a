"""Drawn images: comparison sheets and loss curves, for previews, reports and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INK = (32, 33, 36)
PAPER = (255, 255, 255)
LINE = (214, 217, 222)
ACCENT = (26, 115, 232)
GAP = 12  # pixels between the tiles of a sheet
LABEL = 38  # pixels of a tile's label
SMALLEST_LOSS = 1e-12  # of a curve, whose axis is logarithmic


def to_pil(image: Tensor) -> Any:
    """[H, W, 3] or [H, W] in [0, 1] as a PIL image, rounded to 8 bits."""
    from PIL import Image

    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array)


def from_pil(page: Any) -> Tensor:
    """A PIL image as an IMAGE [1, H, W, 3] in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(page, dtype=np.float32) / 255)[None].clone()


def save_image(image: Tensor, path: Path, texts: Mapping[str, str] | None = None) -> Path:
    """Write one image as PNG, with text chunks by their keyword; folders are made."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_itxt(keyword, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path, pnginfo=info)
    return path


@cache
def label_font(size: int) -> Any:
    """Pillow's own font, `size` pixels high."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def sheet(tiles: Sequence[tuple[str, Tensor]], *, columns: int = 4, tile: int = 192) -> Tensor:
    """Labelled images in a grid, [1, H, W, 3]. Each is scaled to fit; small ones are enlarged without smoothing.

    Args:
        tiles: label and image [H, W, 3] or [H, W] in [0, 1]; a label may have two lines.
        columns: images per line of the grid, at most.
        tile: longer side of a scaled image in pixels.
    """
    from PIL import Image, ImageDraw

    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (tile + GAP) + GAP, rows * (tile + LABEL + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for index, (text, image) in enumerate(tiles):
        x = GAP + index % columns * (tile + GAP)
        y = GAP + index // columns * (tile + LABEL + GAP)
        scaled = _scaled(image, tile)
        page.paste(scaled, (x, y))
        draw.rectangle((x - 1, y - 1, x + scaled.width, y + scaled.height), outline=LINE)
        draw.multiline_text((x, y + tile + 4), text, fill=INK, font=label_font(13), spacing=2)
    return from_pil(page)


def _scaled(image: Tensor, longest: int) -> Any:
    """A PIL image whose longer side has `longest` pixels."""
    from PIL import Image

    original = to_pil(image).convert("RGB")
    factor = longest / max(original.size)
    size = tuple(max(1, round(side * factor)) for side in original.size)
    return original.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def curve(values: Sequence[float], title: str, *, width: int = 480, height: int = 240) -> Tensor:
    """Draw the losses of an optimisation as a curve on a logarithmic axis.

    Args:
        values: losses, above 0, oldest first; none gives an empty frame.
        title: stands above the frame.
        width, height: of the image in pixels.
    Returns: IMAGE [1, height, width, 3], float32 in [0, 1].
    """
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    frame = (64, 28, width - 14, height - 26)
    draw.text((frame[0], 7), title, fill=INK, font=label_font(12))
    draw.rectangle(frame, outline=LINE)
    if values:
        _draw_curve(draw, frame, values)
    draw.text((frame[0], frame[3] + 6), f"{len(values)} iterations", fill=INK, font=label_font(12))
    return from_pil(page)


def _draw_curve(draw: Any, frame: tuple[int, int, int, int], values: Sequence[float]) -> None:
    left, top, right, bottom = frame
    logs = [math.log10(max(value, SMALLEST_LOSS)) for value in values]
    low, high = min(logs), max(logs)
    span = max(high - low, 1e-6)
    for mark in (low, (low + high) / 2, high):
        y = bottom - (mark - low) / span * (bottom - top)
        draw.line((left, y, right, y), fill=LINE)
        draw.text((6, y - 7), f"{10**mark:.2e}", fill=INK, font=label_font(12))
    points = [
        (left + (right - left) * i / max(1, len(logs) - 1), bottom - (value - low) / span * (bottom - top))
        for i, value in enumerate(logs)
    ]
    draw.line(points if len(points) > 1 else [points[0], points[0]], fill=ACCENT, width=2)


def captioned(image: Tensor, lines: Sequence[str], *, size: int) -> Tensor:
    """An IMAGE [1, H, W, 3] with lines of text below it, widened where the text is wider.

    Args:
        lines: the caption.
        size: height of the font in pixels.
    """
    from PIL import Image, ImageDraw

    original = to_pil(image[0])
    font = label_font(size)
    step = round(size * 1.5)
    width = max(original.width, *(round(font.getlength(line)) + 2 * GAP for line in lines), 1)
    page = Image.new("RGB", (width, original.height + step * len(lines) + GAP), PAPER)
    page.paste(original, (0, 0))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((GAP, original.height + step * number), line, fill=INK, font=font)
    return from_pil(page)
