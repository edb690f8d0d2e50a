"""The renderer and the oracle: what every verdict about the bundled model stands on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from editkit.hosts.bundled import oracle
from editkit.hosts.bundled.scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    PATTERNS,
    SHAPES,
    Scene,
    SceneObject,
    object_coverage,
    object_mask,
    render,
    render_background,
    sample_scene,
    scene_rng,
)
from editkit.training.pairs import one_word_changes

SIZE = 96


def held_out(count: int, objects: int | None = None) -> list[Scene]:
    return [sample_scene(scene_rng(7_000_000 + i, held_out=True), objects) for i in range(count)]


def test_captions_follow_the_grammar() -> None:
    ring, star = SceneObject("ring", "red", 0.25, 0.5, 0.2), SceneObject("star", "orange", 0.75, 0.5, 0.2)
    assert Scene("pink", "plain", ()).caption == "a pink background"
    assert Scene("pink", "striped", (ring,)).caption == "a red ring on a striped pink background"
    assert Scene("sky", "plain", (ring, star)).caption == "a red ring left of an orange star on a sky background"


def test_the_grammar_is_as_wide_as_it_says() -> None:
    assert (len(SHAPES), len(OBJECT_COLOURS), len(BACKGROUND_COLOURS), len(PATTERNS)) == (6, 8, 8, 2)
    scenes = held_out(600)
    assert {t.shape for s in scenes for t in s.objects} == set(SHAPES)
    assert {t.colour for s in scenes for t in s.objects} == set(OBJECT_COLOURS)
    assert {(s.background, s.pattern) for s in scenes} == set(product(BACKGROUND_COLOURS, PATTERNS))
    assert {len(s.objects) for s in scenes} == {1, 2}


@pytest.mark.parametrize("objects", [0, 1, 2])
def test_scenes_lie_inside_the_frame_from_left_to_right(objects: int) -> None:
    for scene in held_out(100, objects):
        assert len(scene.objects) == objects
        assert [t.x for t in scene.objects] == sorted(t.x for t in scene.objects)
        covers = np.array([np.zeros((SIZE, SIZE)), *(object_coverage(item, SIZE) for item in scene.objects)])
        borders = np.concatenate([covers[:, 0], covers[:, -1], covers[:, :, 0], covers[:, :, -1]], axis=1)
        assert borders.max() == 0, f"{scene.caption}: leaves the frame"
        assert covers.sum(0).max() <= 1, f"{scene.caption}: objects overlap"


def test_the_same_seed_gives_the_same_picture() -> None:
    for seed in range(5):
        first, second = (sample_scene(scene_rng(seed)) for _ in range(2))
        assert first == second
        assert np.array_equal(render(first), render(second))


def test_held_out_and_training_streams_share_no_scene() -> None:
    """Positions are continuous, so equal scenes in both would mean equal streams."""
    training = {sample_scene(scene_rng(seed)) for seed in range(300)}
    held = {sample_scene(scene_rng(seed, held_out=True)) for seed in range(300)}
    assert len(training) == len(held) == 300
    assert not training & held


@pytest.mark.parametrize("size", [48, 96, 131])
def test_pictures_are_float_images_of_any_size(size: int) -> None:
    image = render(held_out(1)[0], size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_area_of_its_outline(shape: str) -> None:
    """Closed forms for radius r: the anti-aliased coverage sums to the area."""
    r = 0.3
    star = 5 * 1.05 * r * 0.48 * r * np.sin(np.pi / 5)
    arm, half = 0.95 * r, 0.34 * r
    areas = {
        "circle": np.pi * r**2,
        "square": (1.72 * r) ** 2,
        "triangle": 3 * np.sqrt(3) / 4 * r**2,
        "ring": np.pi * r**2 * (1 - 0.48**2),
        "star": star,
        "cross": 2 * (2 * arm) * (2 * half) - (2 * half) ** 2,
    }
    cover = object_coverage(SceneObject(shape, "red", 0.5, 0.5, r), 384)
    assert cover.mean() == pytest.approx(areas[shape], rel=0.01)


def test_masks_agree_with_renders() -> None:
    """Inside the mask is the object's colour, outside the empty scene; only the one-pixel rim may be mixed."""
    for scene in held_out(40):
        image, mask = render(scene, SIZE), object_mask(scene, SIZE) > 0
        empty = render_background(scene.background, scene.pattern, SIZE)
        covers = [object_coverage(item, SIZE) for item in scene.objects]
        rim = np.any([(cover > 0) & (cover < 1) for cover in covers], axis=0)
        assert np.allclose(image[~mask & ~rim], empty[~mask & ~rim], atol=1e-6)
        for item, cover in zip(scene.objects, covers, strict=True):
            assert mask[cover == 1].all()
            assert np.allclose(image[cover == 1], np.array(OBJECT_COLOURS[item.colour]) / 255, atol=1e-6)


def test_the_oracle_reads_clean_renders() -> None:
    scenes = held_out(100)
    right = [oracle.read(render(scene, SIZE)).agrees(scene) for scene in scenes]
    assert np.mean(right) >= 0.99


def test_the_oracle_catches_every_changed_word() -> None:
    """An image of any one-word variant must not pass for the scene."""
    for scene in held_out(2, 1) + held_out(1, 2):
        changes = one_word_changes(scene)
        assert len(changes) == 12 * len(scene.objects) + 8
        for changed in changes:
            assert not oracle.read(render(changed, SIZE)).agrees(scene), f"{changed.caption} passed for {scene.caption}"


def test_the_oracle_catches_wrong_order_number_and_blobs() -> None:
    scene = next(s for s in held_out(50, 2) if s.objects[0].words != s.objects[1].words)
    left, right = scene.objects
    swapped = replace(scene, objects=(replace(right, x=left.x), replace(left, x=right.x)))
    assert not oracle.read(render(swapped, SIZE)).agrees(scene)
    for objects in ((left,), (right,), ()):
        assert not oracle.read(render(replace(scene, objects=objects), SIZE)).agrees(scene)
    image = render_background("white", "plain", SIZE)
    image[20:30, 20:80] = image[30:80, 20:28] = np.array(OBJECT_COLOURS["red"], np.float32) / 255
    reading = oracle.read(image)
    assert [t.words for t in reading.objects] == ["red blob"]


def test_the_oracle_survives_blur_and_noise_but_not_grey() -> None:
    """Verdicts about a decoder's images need some tolerance; an image without anything must still fail."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    scenes = held_out(20, 1)
    soft = [gaussian_filter(render(s, SIZE), (0.7, 0.7, 0)) + 0.01 * rng.normal(size=(SIZE, SIZE, 3)) for s in scenes]
    assert np.mean([oracle.read(image).agrees(scene) for image, scene in zip(soft, scenes, strict=True)]) >= 0.95
    flat = np.full((SIZE, SIZE, 3), 0.5, np.float32)
    assert not any(oracle.read(flat).agrees(scene) for scene in scenes)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        object_coverage(SceneObject("hexagon", "red", 0.5, 0.5, 0.2), 16)
    with pytest.raises(ValueError, match="dotted"):
        render_background("white", "dotted", 16)
