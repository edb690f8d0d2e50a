"""The images that ship with EditKit: scenes of the bundled model's grammar, each with a mask and its caption."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pipelines.core.errors import LoadError, ParameterError, out_of_memory

FOLDER = Path(__file__).parent / "examples"
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of grey with more than 8 bits
DEEPEST = 65535
EXAMPLES = ("empty_side", "one_object", "thin_stroke", "scribble", "red_circle")


@dataclass(frozen=True)
class Example:
    """An image to edit.

    Attributes:
        image: [1, H, W, 3] in [0, 1].
        mask: [1, H, W], 1 = edit.
        caption: the sentence for the image as it is.
        prompt: the sentence for the edited image.
        new_words: the words of `prompt` for what the edit adds.
    """

    image: Tensor
    mask: Tensor
    caption: str
    prompt: str
    new_words: str


def load_example(name: str) -> Example:
    """One of EXAMPLES. Raises ParameterError for another name, LoadError where its files are missing."""
    if name not in EXAMPLES:
        raise ParameterError(f"example is {name!r}: choose one of {', '.join(EXAMPLES)}")
    try:
        words = json.loads((FOLDER / "examples.json").read_text(encoding="utf-8"))[name]
        image, mask = load_image(FOLDER / f"{name}.png"), load_mask(FOLDER / f"{name}.mask.png")
    except (OSError, KeyError) as error:
        raise LoadError(f"example {name!r} is incomplete ({error}): reinstall the pack") from error
    return Example(image, mask, words["caption"], words["prompt"], words["subject"])


def load_image(path: str | Path) -> Tensor:
    """An image file as IMAGE [1, H, W, 3]; transparency is ignored. Raises LoadError if it cannot be read."""
    return _values(path, "RGB")


def load_mask(path: str | Path) -> Tensor:
    """An image file as MASK [1, H, W]: bright = edit; of an image with transparency, transparent = edit."""
    values = _values(path, "mask")
    return values[..., 0] if values.shape[-1] == 1 else 1 - values[..., 3]


def load_transparency(path: str | Path) -> Tensor:
    """The transparency of an image file as MASK [1, H, W], 1 = transparent; zeros where it has none."""
    values = _values(path, "RGBA")
    return 1 - values[..., 3] if values.shape[-1] == 4 else torch.zeros_like(values[..., 0])


def _values(path: str | Path, mode: str) -> Tensor:
    """A file as float32 [1, H, W, C] in [0, 1].

    Args:
        path: the file.
        mode: "RGB" or "RGBA"; "mask" is RGBA where the file has transparency, also of a palette, and grey otherwise.
            Grey of more than 8 bits has one channel in all but "RGB".
    Raises: LoadError for files that are no image, are too large to be one, or have values of unknown range.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            page = ImageOps.exif_transpose(file)
            clear = "A" in page.getbands() or "transparency" in page.info
            if page.mode in DEEP:
                return _deep(np.asarray(page), path, 3 if mode == "RGB" else 1)
            wanted = mode if mode != "mask" else "RGBA" if clear else "L"
            array = np.asarray(page.convert(wanted), dtype=np.float32)
    except LoadError:
        raise
    except Image.DecompressionBombError as error:
        raise LoadError(f"{path} has too many pixels to be read safely ({error}): scale it down first") from error
    except Exception as error:  # damaged files make Pillow raise errors of every kind
        if out_of_memory(error):
            raise
        raise LoadError(f"{path} cannot be read as an image ({error})") from error
    return torch.from_numpy(array.reshape(1, *array.shape[:2], -1).copy()) / 255


def _deep(array: Any, path: str | Path, channels: int) -> Tensor:
    """Grey values of more than 8 bits. Pillow's own conversion would cut them at 255.

    Whole numbers are 16-bit, because no common format has 32; fractions must lie in [0, 1].
    """
    values = torch.from_numpy(array.astype("float64"))
    if array.dtype.kind in "iu":
        values = values / DEEPEST
    if not (torch.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise LoadError(f"{path} holds {array.dtype} values outside 0 to 1 (or 0 to 65535): save it with 8 or 16 bits")
    return values.float()[None, :, :, None].expand(-1, -1, -1, channels).clone()
