"""The images that ship with EditKit: scenes of the bundled model's grammar, each with a mask and its caption."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...pipelines.core.errors import LoadError, ParameterError

FOLDER = Path(__file__).parent / "examples"
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
    """An image file as IMAGE [1, H, W, 3]. Raises LoadError if it cannot be read."""
    return _load(path, "RGB") / 255


def load_mask(path: str | Path) -> Tensor:
    """An image file as MASK [1, H, W]: bright = edit; of an image with transparency, transparent = edit."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            has_alpha = "A" in file.getbands()
    except (OSError, UnidentifiedImageError) as error:
        raise LoadError(f"{path} cannot be read as an image ({error})") from error
    if has_alpha:
        return 1 - _load(path, "RGBA")[..., 3] / 255
    return _load(path, "L")[..., 0] / 255


def _load(path: str | Path, mode: str) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            array = np.asarray(ImageOps.exif_transpose(file).convert(mode), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise LoadError(f"{path} cannot be read as an image ({error})") from error
    return torch.from_numpy(array.reshape(1, *array.shape[:2], -1).copy())
