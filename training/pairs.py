"""Images and captions for the ranker: what is true of which image, what is false, and what cannot be told.

The ranker sees edits through a mask (outside is black), so views show whole scenes and boxes around one object; it must
tell good candidates from broken ones, so views also show faded, merged and missing objects. Captions name the whole
scene, its objects, or its background; false captions differ from a true one by a single word or by the order of objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..hosts.bundled.scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    PATTERNS,
    SHAPES,
    Scene,
    SceneObject,
    grid,
    object_coverage,
    render_background,
    sample_scene,
)

COUNTS = (0.05, 0.60, 0.35)  # of scenes with no, one and two objects
MASKED_SHARE, BROKEN_SHARE = 0.4, 1 / 8


@dataclass(frozen=True)
class Caption:
    """Words for objects (left to right) and for the background; either may be left out, not both."""

    objects: tuple[str, ...]
    background: str | None

    @property
    def text(self) -> str:
        objects = " left of ".join(f"{'an' if words[0] in 'aeiou' else 'a'} {words}" for words in self.objects)
        return (
            f"{objects} on {self.background}" if self.objects and self.background else objects or str(self.background)
        )


@dataclass(frozen=True)
class View:
    """An image of `scene`: which of its objects can be seen, whether the rest is black, whether an object is spoilt."""

    scene: Scene
    image: np.ndarray
    visible: tuple[str, ...]
    masked: bool = False
    broken: bool = False


def full_caption(scene: Scene) -> Caption:
    return Caption(tuple(item.words for item in scene.objects), scene.background_words)


def one_word_changes(scene: Scene) -> list[Scene]:
    """Every scene that differs in one colour, one shape, the background's colour or its pattern."""
    changed = []
    for i, item in enumerate(scene.objects):
        changed += [scene.with_object(i, colour=colour) for colour in OBJECT_COLOURS if colour != item.colour]
        changed += [scene.with_object(i, shape=shape) for shape in SHAPES if shape != item.shape]
    changed += [replace(scene, background=name) for name in BACKGROUND_COLOURS if name != scene.background]
    return changed + [replace(scene, pattern=name) for name in PATTERNS if name != scene.pattern]


def relation(view: View, caption: Caption) -> int:
    """1: `caption` is true of `view`; -1: it is false; 0: it cannot be told, so neither may be learned."""
    scene = view.scene
    seen = set(view.visible)
    named = caption.objects
    if caption.background not in (None, scene.background_words):
        return -1
    whole = tuple(item.words for item in scene.objects)
    if not named:
        return 0 if view.masked or view.broken else 1
    if view.broken or not seen:
        return -1
    if named == whole:
        return 1
    if len(named) == 1 and named[0] in seen:
        return 0 if caption.background and not view.masked and len(whole) > 1 else 1
    return 0 if view.masked and seen & set(named) else -1


def relations(views: Sequence[View], captions: Sequence[Caption]) -> np.ndarray:
    """[views, captions] of `relation`, int8."""
    return np.array([[relation(view, caption) for caption in captions] for view in views], np.int8)


# ------------------------------------------------------------------------------------------------------ images
@lru_cache(maxsize=64)
def _empty(background: str, pattern: str, size: int) -> np.ndarray:
    return render_background(background, pattern, size)


def paint(scene: Scene, size: int, covers: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """`scenes.render` with a cached background and, optionally, other coverages [size, size] than the shapes'."""
    image = _empty(scene.background, scene.pattern, size)
    for i, item in enumerate(scene.objects):
        cover = (object_coverage(item, size) if covers is None else covers[i])[..., None]
        image = image * (1 - cover) + np.asarray(OBJECT_COLOURS[item.colour], np.float32) / 255 * cover
    return image


def window(scene: Scene, index: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A box or an ellipse [size, size] of booleans that shows object `index` whole and no other object."""
    item = scene.objects[index]
    axis = (np.arange(size) + 0.5) / size
    left, right, up, down = rng.uniform(1.02, 1.7, size=4) * item.radius
    x, y = axis[None, :] - item.x, axis[:, None] - item.y
    if rng.random() < 0.3:
        inside = (x / max(left, right)) ** 2 + (y / max(up, down)) ** 2 <= 1.1
    else:
        inside = (x >= -left) & (x <= right) & (y >= -up) & (y <= down)
    if len(scene.objects) == 2:
        inside = inside & ((axis[None, :] < 0.5) == (item.x < 0.5))
    return inside


def _blob(item: SceneObject, size: int, rng: np.random.Generator) -> np.ndarray:
    """A coverage that is no shape of the grammar: a closed curve with random harmonics, unlike `item`."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    true = object_coverage(item, size) >= 0.5
    for _ in range(8):
        x, y = (axis - value - rng.uniform(-0.25, 0.25) * item.radius for value in (item.x, item.y))
        angle = np.arctan2(y[:, None], x[None, :])
        outline = rng.uniform(0.6, 0.95) * item.radius * np.ones_like(angle)
        for k in range(1, 6):
            outline *= 1 + rng.uniform(-0.35, 0.35) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        cover = np.clip((outline - np.hypot(x[None, :], y[:, None])) * size + 0.5, 0, 1).astype(np.float32)
        blob = cover >= 0.5
        if (blob & true).sum() < 0.6 * (blob | true).sum():
            break
    return cover


def _half(item: SceneObject, size: int, rng: np.random.Generator) -> np.ndarray:
    """The coverage of less than half of `item`, cut at a straight line."""
    x, y = grid(size)
    angle, cut = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, -0.15) * item.radius
    side = (x - item.x) * np.cos(angle) + (y - item.y) * np.sin(angle)
    return object_coverage(item, size) * (side < cut)


def spoil(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """A bad candidate for `scene`: its objects bent to blobs, faded into the background, cut, or missing.

    A few blobs stay near a shape: label noise of well under one percent.
    """
    kind = rng.integers(4)
    if kind == 0:
        return paint(scene, size, [_blob(item, size, rng) for item in scene.objects])
    if kind == 1:
        fade = rng.uniform(0.15, 0.45)
        return paint(scene, size, [object_coverage(item, size) * fade for item in scene.objects])
    if kind == 2:
        return paint(scene, size, [_half(item, size, rng) for item in scene.objects])
    return _empty(scene.background, scene.pattern, size)


def view_of(scene: Scene, size: int, rng: np.random.Generator, *, broken: bool = False) -> View:
    """A random view: the whole scene or one object through a mask. The black outside is applied by `augment`."""
    image = spoil(scene, size, rng) if broken else paint(scene, size)
    words = tuple(item.words for item in scene.objects)
    if not scene.objects or rng.random() >= MASKED_SHARE:
        return View(scene, image, words, broken=broken)
    index = int(rng.integers(len(scene.objects)))
    image = np.where(window(scene, index, size, rng)[..., None], image, -1.0).astype(np.float32)
    return View(scene, image, words[index : index + 1], True, broken)


def views_of_step(rng: np.random.Generator, count: int, size: int) -> list[View]:
    """`count` views: scenes, each beside a one-word variant of itself, and spoilt copies of some."""
    spoilt = int(count * BROKEN_SHARE)
    scenes: list[Scene] = []
    while len(scenes) < count - spoilt:
        scene = sample_scene(rng, int(rng.choice(3, p=COUNTS)))
        changes = one_word_changes(scene)
        scenes += [scene, changes[rng.integers(len(changes))]]
    scenes = scenes[: count - spoilt]
    views = [view_of(scene, size, rng) for scene in scenes]
    whole = [scene for scene in scenes if scene.objects]
    return views + [view_of(whole[i % len(whole)], size, rng, broken=True) for i in range(spoilt)]


# ------------------------------------------------------------------------------------------------------ captions
def captions_of_step(views: Sequence[View], rng: np.random.Generator) -> list[Caption]:
    """Whole, partial and one-word-wrong captions of `views`, each once."""
    captions: dict[Caption, None] = {}
    for view in views:
        if view.broken:
            continue
        full = full_caption(view.scene)
        changes = one_word_changes(view.scene)
        wrong = [full_caption(changes[i]) for i in rng.integers(len(changes), size=2)]
        captions.update(dict.fromkeys([full, _part(full, view, rng), *wrong, _part(wrong[0], view, rng)]))
        if len(full.objects) == 2 and rng.random() < 0.5:
            captions[Caption(_swap(full.objects, rng), full.background)] = None
    return list(captions)


def _part(full: Caption, view: View, rng: np.random.Generator) -> Caption:
    """Objects only, the visible object only, or the background only."""
    if not full.objects or rng.random() < 0.15:
        return Caption((), full.background)
    if len(full.objects) == 2 and (view.masked or rng.random() < 0.5):
        index = int(rng.integers(2))
        shown = [i for i, words in enumerate(full.objects) if words in view.visible]
        index = shown[0] if view.masked and shown else index
        return Caption(full.objects[index : index + 1], full.background if view.masked and rng.random() < 0.4 else None)
    return Caption(full.objects, None)


def _swap(objects: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    """The order, the colours or the shapes of two objects exchanged."""
    (colour_a, shape_a), (colour_b, shape_b) = (words.split() for words in objects)
    if rng.random() < 0.5:
        return (objects[1], objects[0])
    return (f"{colour_b} {shape_a}", f"{colour_a} {shape_b}")
