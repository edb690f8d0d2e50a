"""Pictures and captions for the ranker: what is true of which picture, what is false, and what cannot be told.

The ranker sees edits through a mask (outside is black), so views show whole scenes and boxes around one thing; it must
tell good candidates from broken ones, so views also show faded, merged and missing things. Captions name the whole
scene, its things, or its background; false captions differ from a true one by a single word or by the order of things.
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
    render_background,
    sample_scene,
    thing_mask,
)

COUNTS = (0.05, 0.60, 0.35)  # of scenes with no, one and two things
MASKED_SHARE, BROKEN_SHARE = 0.4, 1 / 8


@dataclass(frozen=True)
class Caption:
    """Words for things (left to right) and for the background; either may be left out, not both."""

    things: tuple[str, ...]
    background: str | None

    @property
    def text(self) -> str:
        things = " left of ".join(f"{'an' if words[0] in 'aeiou' else 'a'} {words}" for words in self.things)
        return f"{things} on {self.background}" if self.things and self.background else things or str(self.background)


@dataclass(frozen=True)
class View:
    """A picture of `scene`: which of its things can be seen, whether the rest is black, whether a thing is spoilt."""

    scene: Scene
    image: np.ndarray
    visible: tuple[str, ...]
    masked: bool = False
    broken: bool = False


def full_caption(scene: Scene) -> Caption:
    return Caption(tuple(thing.words for thing in scene.things), scene.background_words)


def one_word_changes(scene: Scene) -> list[Scene]:
    """Every scene that differs in one colour, one shape, the background's colour or its pattern."""
    changed = []
    for i, thing in enumerate(scene.things):
        changed += [scene.with_object(i, colour=colour) for colour in OBJECT_COLOURS if colour != thing.colour]
        changed += [scene.with_object(i, shape=shape) for shape in SHAPES if shape != thing.shape]
    changed += [replace(scene, background=name) for name in BACKGROUND_COLOURS if name != scene.background]
    return changed + [replace(scene, pattern=name) for name in PATTERNS if name != scene.pattern]


def relation(view: View, caption: Caption) -> int:
    """1: `caption` is true of `view`; -1: it is false; 0: it cannot be told, so neither may be learned."""
    scene, seen, named = view.scene, set(view.visible), caption.things
    if caption.background not in (None, scene.background_words):
        return -1
    whole = tuple(thing.words for thing in scene.things)
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


# ------------------------------------------------------------------------------------------------------ pictures
@lru_cache(maxsize=64)
def _empty(background: str, pattern: str, size: int) -> np.ndarray:
    return render_background(background, pattern, size)


def paint(scene: Scene, size: int, covers: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """`scenes.render` with a cached background and, optionally, other coverages [size, size] than the shapes'."""
    image = _empty(scene.background, scene.pattern, size)
    for i, thing in enumerate(scene.things):
        cover = (thing_mask(thing, size) if covers is None else covers[i])[..., None]
        image = image * (1 - cover) + np.asarray(OBJECT_COLOURS[thing.colour], np.float32) / 255 * cover
    return image


def window(scene: Scene, index: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A box or an ellipse [size, size] of booleans that shows thing `index` whole and no other thing."""
    thing = scene.things[index]
    axis = (np.arange(size) + 0.5) / size
    left, right, up, down = rng.uniform(1.02, 1.7, size=4) * thing.radius
    x, y = axis[None, :] - thing.x, axis[:, None] - thing.y
    if rng.random() < 0.3:
        inside = (x / max(left, right)) ** 2 + (y / max(up, down)) ** 2 <= 1.1
    else:
        inside = (x >= -left) & (x <= right) & (y >= -up) & (y <= down)
    if len(scene.things) == 2:
        inside = inside & ((axis[None, :] < 0.5) == (thing.x < 0.5))
    return inside


def _blob(thing: SceneObject, size: int, rng: np.random.Generator) -> np.ndarray:
    """A coverage that is no shape of the grammar: a closed curve with random harmonics, unlike `thing`."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    true = thing_mask(thing, size) >= 0.5
    for _ in range(8):
        x, y = (axis - value - rng.uniform(-0.25, 0.25) * thing.radius for value in (thing.x, thing.y))
        angle = np.arctan2(y[:, None], x[None, :])
        outline = rng.uniform(0.6, 0.95) * thing.radius * np.ones_like(angle)
        for k in range(1, 6):
            outline *= 1 + rng.uniform(-0.35, 0.35) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        cover = np.clip((outline - np.hypot(x[None, :], y[:, None])) * size + 0.5, 0, 1).astype(np.float32)
        blob = cover >= 0.5
        if (blob & true).sum() < 0.6 * (blob | true).sum():
            break
    return cover


def _half(thing: SceneObject, size: int, rng: np.random.Generator) -> np.ndarray:
    """The coverage of less than half of `thing`, cut at a straight line."""
    x, y = grid(size)
    angle, cut = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, -0.15) * thing.radius
    side = (x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle)
    return thing_mask(thing, size) * (side < cut)


def spoil(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """A bad candidate for `scene`: its things bent to blobs, faded into the background, cut, or missing.

    A few blobs stay near a shape: label noise of well under one percent.
    """
    kind = rng.integers(4)
    if kind == 0:
        return paint(scene, size, [_blob(thing, size, rng) for thing in scene.things])
    if kind == 1:
        fade = rng.uniform(0.15, 0.45)
        return paint(scene, size, [thing_mask(thing, size) * fade for thing in scene.things])
    if kind == 2:
        return paint(scene, size, [_half(thing, size, rng) for thing in scene.things])
    return _empty(scene.background, scene.pattern, size)


def view_of(scene: Scene, size: int, rng: np.random.Generator, *, broken: bool = False) -> View:
    """A random view: the whole scene or one thing through a mask. The black outside is applied by `augment`."""
    image = spoil(scene, size, rng) if broken else paint(scene, size)
    words = tuple(thing.words for thing in scene.things)
    if not scene.things or rng.random() >= MASKED_SHARE:
        return View(scene, image, words, broken=broken)
    index = int(rng.integers(len(scene.things)))
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
    whole = [scene for scene in scenes if scene.things]
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
        if len(full.things) == 2 and rng.random() < 0.5:
            captions[Caption(_swap(full.things, rng), full.background)] = None
    return list(captions)


def _part(full: Caption, view: View, rng: np.random.Generator) -> Caption:
    """Things only, the visible thing only, or the background only."""
    if not full.things or rng.random() < 0.15:
        return Caption((), full.background)
    if len(full.things) == 2 and (view.masked or rng.random() < 0.5):
        index = int(rng.integers(2))
        shown = [i for i, words in enumerate(full.things) if words in view.visible]
        index = shown[0] if view.masked and shown else index
        return Caption(full.things[index : index + 1], full.background if view.masked and rng.random() < 0.4 else None)
    return Caption(full.things, None)


def _swap(things: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    """The order, the colours or the shapes of two things exchanged."""
    (colour_a, shape_a), (colour_b, shape_b) = (words.split() for words in things)
    if rng.random() < 0.5:
        return (things[1], things[0])
    return (f"{colour_b} {shape_a}", f"{colour_a} {shape_b}")
