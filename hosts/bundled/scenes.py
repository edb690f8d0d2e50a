"""Scenes with a known answer: shapes on plain or striped backgrounds, and the captions that describe them.

The bundled model is trained and measured on these images. A scene is a small immutable record; rendering it
needs only numpy and is anti-aliased analytically (signed distance), so that any resolution shows the same scene.

Lengths are fractions of the image side. Images are float32 [H, W, 3] in [0, 1]. Masks are float32 [H, W], 1 = object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "ring", "star", "cross")

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (249, 130, 20),
    "yellow": (250, 215, 30),
    "green": (30, 140, 60),
    "cyan": (20, 190, 205),
    "blue": (35, 70, 215),
    "purple": (130, 40, 165),
    "black": (18, 18, 22),
}

BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (165, 165, 168),
    "pink": (250, 190, 205),
    "cream": (248, 236, 195),
    "mint": (185, 235, 205),
    "sky": (180, 215, 245),
    "lilac": (212, 196, 240),
    "brown": (150, 112, 84),
}

PATTERNS = ("plain", "striped")

STRIPE_PERIOD = 1 / 6  # of the side: 16 px at 96 px, so that a stripe is one latent pixel of a factor-8 VAE
STRIPE_SHADE = 0.84

SINGLE_RADIUS = (0.198, 0.3125)  # 19 to 30 px at 96 px: smaller shapes do not survive an 8x VAE
PAIR_RADIUS = (0.177, 0.2083)  # 17 to 20 px at 96 px


@dataclass(frozen=True)
class SceneObject:
    """One object: shape, colour, centre and radius (fractions of the side)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Background colour and pattern, and one or two objects from left to right."""

    background: str
    pattern: str
    objects: tuple[SceneObject, ...]

    @property
    def background_words(self) -> str:
        stripe = "striped " if self.pattern == "striped" else ""
        return f"a {stripe}{self.background} background"

    @property
    def caption(self) -> str:
        """The sentence that the model is trained on, for example "a red ring left of a blue star on a pink background"."""
        if not self.objects:
            return self.background_words
        objects = " left of ".join(_article(item.words) for item in self.objects)
        return f"{objects} on {self.background_words}"

    def with_object(self, index: int, **changes: object) -> Scene:
        """A copy whose object number `index` has other fields."""
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)  # type: ignore[arg-type]
        return replace(self, objects=tuple(objects))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as fractions of the side: x and y, each [size, size]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(axis[None, :], (size, size)), np.broadcast_to(axis[:, None], (size, size))


def shape_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance from the outline of a shape centred at the origin.

    Args:
        shape: one of SHAPES.
        dx, dy: positions [size, size] in fractions of the side; y grows downwards.
        radius: in fractions of the side.

    Returns: distances [size, size], negative inside.

    Raises: ValueError for an unknown shape.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.86 * radius
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.74 * radius) - 0.26 * radius
    if shape == "triangle":
        edge = 0.5 * radius
        slope = np.abs(dx) * np.float32(0.8660254) - dy * np.float32(0.5) - edge
        return np.maximum(slope, dy - edge)
    if shape == "cross":
        ax = np.abs(dx)
        ay = np.abs(dy)
        arm = 0.95 * radius
        half = 0.34 * radius
        return np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm))
    if shape == "star":
        return _star_distance(dx, dy, 1.05 * radius, 0.48 * radius)
    raise ValueError(f"shape {shape!r} is none of {SHAPES}")


def _star_distance(dx: np.ndarray, dy: np.ndarray, outer: float, inner: float) -> np.ndarray:
    """Five points, one of them up: the plane is folded onto one tenth of the star, whose edge is one line."""
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(dx, -dy) + tenth) % (2 * tenth) - tenth)
    length = np.hypot(dx, dy)
    px, py = length * np.cos(angle), length * np.sin(angle)
    ex, ey = inner * np.cos(tenth) - outer, inner * np.sin(tenth)
    norm = float(np.hypot(ex, ey))
    return ((px - outer) * ey - py * ex) / norm


def object_coverage(item: SceneObject, size: int) -> np.ndarray:
    """Coverage of `item`, [size, size] in [0, 1], one pixel of anti-aliasing."""
    x, y = grid(size)
    distance = shape_distance(item.shape, x - item.x, y - item.y, item.radius)
    return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)


def render_background(background: str, pattern: str, size: int) -> np.ndarray:
    """The empty scene, [size, size, 3]."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = np.asarray(BACKGROUND_COLOURS[background], np.float32) / 255
    if pattern == "striped":
        _, y = grid(size)
        dark = ((y / STRIPE_PERIOD) % 1.0) >= 0.5
        image[dark] *= STRIPE_SHADE
    elif pattern != "plain":
        raise ValueError(f"pattern {pattern!r} is none of {PATTERNS}")
    return image


def render(scene: Scene, size: int = 96) -> np.ndarray:
    """The image of `scene`, [size, size, 3] in [0, 1]; later objects lie on top."""
    image = render_background(scene.background, scene.pattern, size)
    for item in scene.objects:
        cover = object_coverage(item, size)[..., None]
        colour = np.asarray(OBJECT_COLOURS[item.colour], np.float32) / 255
        image = image * (1 - cover) + colour * cover
    return image.astype(np.float32)


def object_mask(scene: Scene, size: int = 96) -> np.ndarray:
    """The true mask of everything that is not background, [size, size] in {0, 1}."""
    mask = np.zeros((size, size), np.float32)
    for item in scene.objects:
        mask = np.maximum(mask, object_coverage(item, size))
    return (mask >= 0.5).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- sampling
TRAIN_STREAM, HELD_OUT_STREAM = 1, 2  # two streams of the same grammar that never share a seed


def scene_rng(seed: int, *, held_out: bool = False) -> np.random.Generator:
    """The random generator of scene number `seed`; training and held-out scenes come from different streams."""
    return np.random.default_rng([HELD_OUT_STREAM if held_out else TRAIN_STREAM, seed])


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene with `count` objects (0, 1 or 2); None draws one (80 %) or two (20 %)."""
    if count is None:
        count = 2 if rng.random() < 0.2 else 1
    background = str(rng.choice(list(BACKGROUND_COLOURS)))
    pattern = "striped" if rng.random() < 0.35 else "plain"
    if count == 0:
        return Scene(background, pattern, ())
    if count == 1:
        radius = rng.uniform(*SINGLE_RADIUS)
        margin = radius + 0.03
        x, y = rng.uniform(margin, 1 - margin, size=2)
        return Scene(background, pattern, (_sample_object(rng, float(x), float(y), float(radius)),))
    left, right = (_sample_half(rng, side) for side in (0.0, 0.5))
    return Scene(background, pattern, (left, right))


def _sample_half(rng: np.random.Generator, offset: float) -> SceneObject:
    """An object that lies wholly in the left (offset 0) or right (offset 0.5) half."""
    radius = rng.uniform(*PAIR_RADIUS)
    x = offset + rng.uniform(radius + 0.015, 0.5 - radius - 0.015)
    y = rng.uniform(radius + 0.04, 1 - radius - 0.04)
    return _sample_object(rng, float(x), float(y), float(radius))


def _sample_object(rng: np.random.Generator, x: float, y: float, radius: float) -> SceneObject:
    shape = SHAPES[rng.integers(len(SHAPES))]
    colour = list(OBJECT_COLOURS)[rng.integers(len(OBJECT_COLOURS))]
    return SceneObject(shape, colour, x, y, radius)
