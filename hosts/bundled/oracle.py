"""The oracle: reads an image of the grammar back into words, without any weights.

It knows the renderer's palette and shapes and nothing of the model, so it can check an edit: the background, the
colours, the shapes and their places. `tests/behaviour` and `evaluate` first test the oracle itself on clean renders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    PATTERNS,
    SHAPES,
    Scene,
    SceneObject,
    object_coverage,
    render_background,
)

MIN_AREA = 0.008  # of the image: smaller components are specks, not objects
MIN_IOU = 0.65  # a shape counts only if its best template overlaps at least this much
COLOUR_NAMES = tuple(OBJECT_COLOURS)


@dataclass(frozen=True)
class Reading:
    """A scene as the oracle reads it.

    Attributes:
        background, pattern: of the background.
        objects: from left to right; a shape that fits no template is called "blob".
        overlaps: intersection over union of each object with its template, 0 to 1.
    """

    background: str
    pattern: str
    objects: tuple[SceneObject, ...]
    overlaps: tuple[float, ...]

    def agrees(self, scene: Scene) -> bool:
        """Whether everything that the caption of `scene` says is right: background, pattern, count, colours, shapes, order."""
        return self.background_agrees(scene) and [t.words for t in self.objects] == [t.words for t in scene.objects]

    def background_agrees(self, scene: Scene) -> bool:
        return (self.background, self.pattern) == (scene.background, scene.pattern)

    def has(self, colour: str, shape: str | None = None) -> bool:
        return any(t.colour == colour and shape in (None, t.shape) for t in self.objects)


@lru_cache(maxsize=8)
def _backgrounds(size: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    names = [(colour, pattern) for colour in BACKGROUND_COLOURS for pattern in PATTERNS]
    return names, np.stack([render_background(*name, size) for name in names])


def object_palette() -> np.ndarray:
    """[8, 3] in [0, 1], in the order of COLOUR_NAMES."""
    return np.asarray(list(OBJECT_COLOURS.values()), np.float32) / 255


def read_background(image: np.ndarray, where: np.ndarray | None = None) -> tuple[str, str]:
    """Colour and pattern of the background of `image` [S, S, 3], read from the pixels where `where` [S, S] is true.

    The L1 distance is truncated, so that objects cost the same under every hypothesis.
    """
    names, images = _backgrounds(image.shape[0])
    cost = np.minimum(np.abs(images - image[None]).mean(-1), 0.12)
    if where is not None:
        cost = cost[:, where]
    return names[int(cost.reshape(len(names), -1).mean(-1).argmin())]


def read(image: np.ndarray) -> Reading:
    """The scene in `image` (float [S, S, 3] in [0, 1], square)."""
    image = np.clip(np.asarray(image, np.float32), 0, 1)
    background, pattern = read_background(image)
    objects, overlaps = [], []
    for mask in components(image, background, pattern):
        item, overlap = _name(image, mask)
        objects.append(item)
        overlaps.append(overlap)
    order = np.argsort([item.x for item in objects], kind="stable")
    return Reading(background, pattern, tuple(objects[i] for i in order), tuple(overlaps[i] for i in order))


def foreground(image: np.ndarray, background: str, pattern: str) -> np.ndarray:
    """Pixels nearer to an object colour than to the empty scene, [S, S] bool."""
    empty = render_background(background, pattern, image.shape[0])
    to_empty = np.linalg.norm(image - empty, axis=-1)
    to_object = np.linalg.norm(image[:, :, None] - object_palette(), axis=-1).min(-1)
    mask = to_empty > np.maximum(to_object, 0.12)
    return dilated(eroded(mask))


def strange_share(image: np.ndarray) -> float:
    """Fraction of the pixels of `image` [S, S, 3] that have neither the background's nor an object's colour.

    At most 0.02 for rendered scenes; 0.6 and more for photographs, noise and gradients.
    """
    empty = render_background(*read_background(image), image.shape[0])
    to_empty = np.linalg.norm(image - empty, axis=-1)
    to_object = np.linalg.norm(image[:, :, None] - object_palette(), axis=-1).min(-1)
    return float((np.minimum(to_empty, to_object) > 0.12).mean())


def components(image: np.ndarray, background: str, pattern: str) -> list[np.ndarray]:
    """Connected objects as boolean masks [S, S], specks dropped."""
    mask = foreground(image, background, pattern)
    return [part for part in connected(mask) if part.sum() >= MIN_AREA * mask.size]


def eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels of `mask` [S, S] whose four neighbours are in it too; outside the image is nothing."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def dilated(mask: np.ndarray) -> np.ndarray:
    """`mask` [S, S] and the four neighbours of its pixels."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected components of `mask` [H, W], in the order of their first pixels."""
    padded = np.pad(mask, 1)  # so that the neighbours of a pixel at the rim do not lie in the next row
    width = padded.shape[1]
    waiting = dict.fromkeys(np.flatnonzero(padded).tolist())
    parts = []
    while waiting:
        found = [next(iter(waiting))]
        del waiting[found[0]]
        for pixel in found:  # the list grows while it is read
            neighbours = [n for n in (pixel - width, pixel - 1, pixel + 1, pixel + width) if n in waiting]
            found += neighbours
            for neighbour in neighbours:
                del waiting[neighbour]
        part = np.zeros(padded.size, bool)
        part[found] = True
        parts.append(part.reshape(padded.shape)[1:-1, 1:-1])
    return parts


def _name(image: np.ndarray, mask: np.ndarray) -> tuple[SceneObject, float]:
    """Colour of the inside (the rim is blended with the background) and the best fitting shape template."""
    inside = eroded(mask)
    pixels = image[inside if inside.any() else mask]
    colour = read_colour(pixels)
    rows, columns = np.nonzero(mask)
    size = mask.shape[0]
    top, bottom = rows.min() / size, (rows.max() + 1) / size
    left, right = columns.min() / size, (columns.max() + 1) / size
    best, best_overlap = SceneObject("blob", colour, (left + right) / 2, (top + bottom) / 2, (right - left) / 2), 0.0
    for shape in SHAPES:
        for item in _candidates(shape, colour, left, right, top, bottom):
            template = object_coverage(item, size) >= 0.5
            overlap = (template & mask).sum() / max(1, (template | mask).sum())
            if overlap > best_overlap:
                best, best_overlap = item, float(overlap)
    if best_overlap < MIN_IOU:
        best = SceneObject("blob", colour, best.x, best.y, best.radius)
    return best, best_overlap


def read_colour(pixels: np.ndarray) -> str:
    """The object colour that most of `pixels` [N, 3] are nearest to."""
    nearest = np.linalg.norm(pixels[:, None] - object_palette(), axis=-1).argmin(-1)
    return COLOUR_NAMES[int(np.bincount(nearest, minlength=len(COLOUR_NAMES)).argmax())]


# Extent of a shape of radius 1 about its centre: half width, up, down.
_EXTENTS = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.86, 0.86, 0.86),
    "ring": (1.0, 1.0, 1.0),
    "triangle": (0.866, 1.0, 0.5),
    "cross": (0.95, 0.95, 0.95),
    "star": (0.999, 1.05, 0.849),
}


def _candidates(shape: str, colour: str, left: float, right: float, top: float, bottom: float) -> list[SceneObject]:
    """Templates whose bounding box matches: by the mean of both sides, a little smaller and a little larger."""
    half_width, up, down = _EXTENTS[shape]
    radius = 0.5 * ((right - left) / (2 * half_width) + (bottom - top) / (up + down))
    x = (left + right) / 2
    y = (top + bottom) / 2 + radius * (up - down) / 2
    return [SceneObject(shape, colour, x, y, radius * factor) for factor in (0.95, 1.0, 1.05)]


def self_test(count: int = 300, size: int = 96, first: int = 0) -> float:
    """Share of clean held-out renders that are read wholly right."""
    from .scenes import render, sample_scene, scene_rng

    scenes = [sample_scene(scene_rng(first + i, held_out=True)) for i in range(count)]
    return float(np.mean([read(render(scene, size)).agrees(scene) for scene in scenes]))
