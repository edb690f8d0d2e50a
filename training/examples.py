"""Stage `examples`: draw the images that ship with the workflows, each with its mask and its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..hosts.bundled.example_images import EXAMPLES
from ..hosts.bundled.scenes import OBJECT_COLOURS, Scene, SceneObject, grid, object_mask, render, shape_distance
from ..pipelines.evaluation.drawing import save_image
from .loop import write_json

SIZE = 96
Drawn = tuple[np.ndarray, np.ndarray, str, str, str]  # image, mask, caption, prompt, what is new


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    x, y = grid(SIZE)
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).astype(np.float32)


def _empty_side() -> Drawn:
    """One object on the left; the mask is a box in the empty right half."""
    scene = Scene("sky", "plain", (SceneObject("ring", "red", 0.26, 0.5, 0.2),))
    target = Scene("sky", "plain", (*scene.objects, SceneObject("star", "yellow", 0.74, 0.5, 0.2)))
    return render(scene, SIZE), _box(0.5, 0.22, 0.98, 0.78), scene.caption, target.caption, "a yellow star"


def _one_object() -> Drawn:
    """One object in the middle; the mask is everything else, and the half pixel of its rim that shows the old background."""
    item = SceneObject("circle", "purple", 0.5, 0.5, 0.27)
    scene = Scene("white", "plain", (item,))
    x, y = grid(SIZE)
    near = shape_distance(item.shape, x - item.x, y - item.y, item.radius) < -0.5 / SIZE
    target = Scene("brown", "striped", (item,))
    return render(scene, SIZE), 1 - near.astype(np.float32), scene.caption, target.caption, target.background_words


def _thin_stroke() -> Drawn:
    """An empty image and a wavy stroke of 4 pixels: thinner than a latent pixel."""
    scene = Scene("cream", "plain", ())
    x, y = grid(SIZE)
    stroke = np.abs(y - 0.5 - 0.07 * np.sin(2 * np.pi * x * 1.5)) < 2 / SIZE
    stroke &= (x > 0.24) & (x < 0.76)
    target = Scene("cream", "plain", (SceneObject("square", "red", 0.5, 0.5, 0.31),))
    return render(scene, SIZE), stroke.astype(np.float32), scene.caption, target.caption, "a red square"


def _scribble() -> Drawn:
    """A user's rough green scribble on an empty image, and a mask around it."""
    scene = Scene("pink", "plain", ())
    image = render(scene, SIZE)
    x, y = grid(SIZE)
    wobble = 0.03 * np.sin(7 * np.arctan2(y - 0.5, x - 0.5))
    blob = np.hypot(x - 0.5, (y - 0.5) * 1.1) < 0.24 + wobble
    image[blob] = np.asarray(OBJECT_COLOURS["green"], np.float32) / 255
    target = Scene("pink", "plain", (SceneObject("triangle", "green", 0.5, 0.5, 0.25),))
    return image, _box(0.12, 0.12, 0.88, 0.88), scene.caption, target.caption, "a green triangle"


def _red_circle() -> Drawn:
    """One object, to become another by words alone; the mask is the object itself."""
    scene = Scene("mint", "plain", (SceneObject("circle", "red", 0.5, 0.5, 0.25),))
    target = scene.with_object(0, shape="square", colour="blue")
    return render(scene, SIZE), object_mask(scene, SIZE), scene.caption, target.caption, "a blue square"


MAKERS = {
    "empty_side": _empty_side,
    "one_object": _one_object,
    "thin_stroke": _thin_stroke,
    "scribble": _scribble,
    "red_circle": _red_circle,
}


def write_examples(folder: Path) -> None:
    """Write NAME.png, NAME.mask.png and examples.json for every example."""
    words = {}
    for name in EXAMPLES:
        image, mask, caption, prompt, new_words = MAKERS[name]()
        save_image(torch.from_numpy(image), folder / f"{name}.png")
        save_image(torch.from_numpy(mask), folder / f"{name}.mask.png")
        words[name] = {"caption": caption, "prompt": prompt, "subject": new_words}
    write_json(folder / "examples.json", words)
