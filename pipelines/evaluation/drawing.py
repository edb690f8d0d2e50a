"""Pictures about pictures: comparison sheets and loss curves, for previews, the demo and the training card."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INK, PAPER, LINE, ACCENT = (32, 33, 36), (255, 255, 255), (214, 217, 222), (26, 115, 232)


def to_pil(image: Tensor) -> Any:
    """[H, W, 3] or [H, W] in [0, 1] as a PIL picture, rounded to 8 bits."""
    from PIL import Image

    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array)


def save_image(image: Tensor, path: Path) -> Path:
    """Write one picture as PNG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path)
    return path


@cache
def label_font(size: int) -> Any:
    """The font of every picture of ours, `size` pixels high: the one that Pillow brings."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def sheet(tiles: Sequence[tuple[str, Tensor]], *, columns: int = 4, tile: int = 192) -> Tensor:
    """Labelled pictures in a grid, [1, H, W, 3]; each is scaled to fit `tile` pixels, small ones without smoothing.

    Args:
        tiles: label and picture [H, W, 3] or [H, W]; a label may have two lines.
    """
    from PIL import Image, ImageDraw

    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    gap, label = 12, 38
    page = Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + label + gap) + gap), PAPER)
    draw, font = ImageDraw.Draw(page), label_font(13)
    for index, (text, image) in enumerate(tiles):
        x, y = gap + index % columns * (tile + gap), gap + index // columns * (tile + label + gap)
        picture = to_pil(image).convert("RGB")
        factor = tile / max(picture.size)
        size = tuple(max(1, round(side * factor)) for side in picture.size)
        page.paste(picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=LINE)
        draw.multiline_text((x, y + tile + 4), text, fill=INK, font=font, spacing=2)
    return from_pil(page)


def curve(values: Sequence[float], title: str, *, width: int = 480, height: int = 240) -> Tensor:
    """A falling curve on a logarithmic axis, [1, height, width, 3]: the losses of an optimisation."""
    import math

    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(page), label_font(12)
    left, top, right, bottom = 64, 28, width - 14, height - 26
    draw.text((left, 7), title, fill=INK, font=font)
    draw.rectangle((left, top, right, bottom), outline=LINE)
    logs = [math.log10(max(value, 1e-12)) for value in values]
    if logs:
        low, high = min(logs), max(logs)
        span = max(high - low, 1e-6)
        for level in (low, (low + high) / 2, high):
            y = bottom - (level - low) / span * (bottom - top)
            draw.line((left, y, right, y), fill=LINE)
            draw.text((6, y - 7), f"{10**level:.2e}", fill=INK, font=font)
        points = [
            (left + (right - left) * i / max(1, len(logs) - 1), bottom - (v - low) / span * (bottom - top))
            for i, v in enumerate(logs)
        ]
        draw.line(points if len(points) > 1 else [points[0], points[0]], fill=ACCENT, width=2)
    draw.text((left, bottom + 6), f"{len(values)} iterations", fill=INK, font=font)
    return from_pil(page)


def under(top: Tensor, lines: Sequence[str], *, size: int) -> Tensor:
    """An IMAGE [1, H, W, 3] with lines of text below it; widened where the text is broader."""
    from PIL import Image, ImageDraw

    picture, font, gap = to_pil(top[0]), label_font(size), 12
    step = round(size * 1.5)
    width = max(picture.width, *(round(font.getlength(line)) + 2 * gap for line in lines), 1)
    page = Image.new("RGB", (width, picture.height + step * len(lines) + gap), PAPER)
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((gap, picture.height + step * number), line, fill=INK, font=font)
    return from_pil(page)


def from_pil(page: Any) -> Tensor:
    """A PIL picture as an IMAGE [1, H, W, 3] in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(page, dtype=np.float32) / 255)[None].clone()
