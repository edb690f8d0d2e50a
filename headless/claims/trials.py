"""Blended edits whose right answer is known: scenes of the grammar, a mask, a prompt, and what the oracle must see.

Trials of one kind run as a batch: every image has its own mask, prompt and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hosts.bundled import oracle
from ...hosts.bundled.scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    PATTERNS,
    SHAPES,
    Scene,
    grid,
    object_mask,
    render,
    sample_scene,
    scene_rng,
    shape_distance,
)
from ...pipelines.blended.pipeline import EditSettings, sample_blended
from ...pipelines.core.guidance import EditPrompts
from ...pipelines.core.masks import MaskSchedule, dilation_schedule, downsample
from ...pipelines.core.protocols import Context

FIRST = 3_000_000  # of the held-out stream: scenes that no other measure sees
SIZE = 96


@dataclass(frozen=True)
class Trial:
    """source [S, S, 3] and mask [S, S] (1 = edit) with the scene that the edit should show."""

    source: np.ndarray
    mask: np.ndarray
    prompt: str
    before: Scene
    target: Scene


def _rng(index: int, kind: int) -> np.random.Generator:
    return scene_rng(FIRST + kind * 10_000 + index, held_out=True)


def new_object(index: int) -> Trial:
    """A second object into a box over the empty right half; the prompt describes the whole scene."""
    rng = _rng(index, 0)
    target = sample_scene(rng, 2)
    before = replace(target, objects=target.objects[:1])
    x, y = grid(SIZE)
    mask = (x >= 0.5) & (x < 0.99) & (np.abs(y - 0.5) <= 0.47)
    return Trial(render(before, SIZE), mask.astype(np.float32), target.caption, before, target)


def new_object_alone(index: int) -> Trial:
    """The same, with a prompt that names only the new object: the model must guess the rest."""
    trial = new_object(index)
    item = trial.target.objects[1]
    return replace(trial, prompt=replace(trial.target, objects=(item,)).caption.split(" on ")[0])


def new_background(index: int) -> Trial:
    """Everything but the object and a margin of 1 pixel becomes another background; the prompt names that alone."""
    rng = _rng(index, 1)
    before = sample_scene(rng, 1)
    colours = [c for c in BACKGROUND_COLOURS if c != before.background]
    target = replace(before, background=str(rng.choice(colours)), pattern=str(rng.choice(PATTERNS)))
    item = before.objects[0]
    x, y = grid(SIZE)
    near = shape_distance(item.shape, x - item.x, y - item.y, item.radius) < 1 / SIZE
    return Trial(render(before, SIZE), 1 - near.astype(np.float32), target.background_words, before, target)


def thin_stroke(index: int) -> Trial:
    """A stroke of 2 to 6 pixels over an empty image, where the prompt wants an object (BLD, section 4.3).

    The stroke runs through the middle of a place where the object would fit. What matters is the colour along it.
    """
    rng = _rng(index, 2)
    target = sample_scene(rng, 1)
    before, item = replace(target, objects=()), target.objects[0]
    width, angle = rng.uniform(2, 6), rng.uniform(0, np.pi)
    x, y = grid(SIZE)
    dx, dy = x - item.x, y - item.y
    across = np.abs(dx * np.sin(angle) - dy * np.cos(angle)) <= width / 2 / SIZE
    along = np.abs(dx * np.cos(angle) + dy * np.sin(angle)) <= 0.75 * item.radius
    mask = across & along
    return Trial(render(before, SIZE), mask.astype(np.float32), target.caption, before, target)


def swap(index: int) -> Trial:
    """The one object becomes another of another colour and shape, with no mask drawn; `mask` is where it is now."""
    rng = _rng(index, 3)
    before = sample_scene(rng, 1)
    item = before.objects[0]
    colour = str(rng.choice([c for c in OBJECT_COLOURS if c != item.colour]))
    shape = str(rng.choice([s for s in SHAPES if s != item.shape]))
    target = before.with_object(0, colour=colour, shape=shape)
    return Trial(render(before, SIZE), object_mask(before, SIZE), target.caption, before, target)


def recolour(index: int) -> Trial:
    """The one object gets another colour and stays where it is; no mask is drawn."""
    rng = _rng(index, 5)
    before = sample_scene(rng, 1)
    item = before.objects[0]
    return _renamed(before, colour=str(rng.choice([c for c in OBJECT_COLOURS if c != item.colour])))


def reshape(index: int) -> Trial:
    """The one object gets another shape, its colour and place stay; no mask is drawn."""
    rng = _rng(index, 6)
    before = sample_scene(rng, 1)
    item = before.objects[0]
    return _renamed(before, shape=str(rng.choice([s for s in SHAPES if s != item.shape])))


def _renamed(before: Scene, **changes: object) -> Trial:
    target = before.with_object(0, **changes)
    return Trial(render(before, SIZE), object_mask(before, SIZE), target.caption, before, target)


# ------------------------------------------------------------------------------------------------------------ running
def images_of(trials: Sequence[Trial]) -> tuple[Tensor, Tensor]:
    """Sources [N, S, S, 3] and masks [N, S, S]."""
    return torch.from_numpy(np.stack([t.source for t in trials])), torch.from_numpy(np.stack([t.mask for t in trials]))


def targets_of(trials: Sequence[Trial]) -> Tensor:
    """What the edits should show [N, S, S, 3]."""
    return torch.from_numpy(np.stack([render(trial.target, SIZE) for trial in trials]))


def stacked(contexts: Sequence[Context]) -> Context:
    """One context with a row per image."""
    return Context(torch.cat([context.tokens for context in contexts]))


def edit_all(
    model: Any,
    trials: Sequence[Trial],
    settings: EditSettings,
    *,
    schedule: Callable[[Tensor], MaskSchedule] | None = None,
    batch: int = 16,
) -> Tensor:
    """Blended edits of all trials.

    Args:
        model: the bundled model.
        trials: their images must have one size.
        settings: trial i uses the seed `settings.seed` + i.
        schedule: gives the mask schedule of latent masks [B, h, w]; None takes that of the settings.
        batch: trials per batch, at most.

    Returns: edited latents [N, C, h, w], unscaled.
    """
    parts = []
    for start in range(0, len(trials), batch):
        parts.append(_edit_batch(model, trials[start : start + batch], settings, settings.seed + start, schedule))
    return torch.cat(parts)


def _edit_batch(
    model: Any,
    trials: Sequence[Trial],
    settings: EditSettings,
    seed: int,
    make_schedule: Callable[[Tensor], MaskSchedule] | None,
) -> Tensor:
    denoiser, codec = model.denoiser, model.codec
    images, masks = images_of(trials)
    source = codec.encode(images)
    height, width = source.shape[-2:]
    latent_pixels = downsample(masks, height, width, settings.mask_mode, settings.mask_threshold, factor=codec.factor)
    if make_schedule is None:
        schedule = dilation_schedule(latent_pixels.mask, settings.kernels, spacing=settings.stage_spacing)
    else:
        schedule = make_schedule(latent_pixels.mask)
    prompts = EditPrompts(
        stacked([model.text.encode(trial.prompt) for trial in trials]), model.text.encode(""), settings.guidance_scale
    )
    sigmas = denoiser.schedule(settings.steps, settings.strength)
    seeds = [seed + i for i in range(len(trials))]
    return sample_blended(denoiser, source, sigmas, schedule, prompts, seeds=seeds, options=settings.options)


# ------------------------------------------------------------------------------------------------------------ verdicts
def object_right(image: Tensor, trial: Trial) -> bool:
    """The new object is there with its colour and shape, and the old one still is."""
    words = [item.words for item in oracle.read(image.numpy()).objects]
    return words == [item.words for item in trial.target.objects]


def new_object_right(image: Tensor, trial: Trial) -> bool:
    """The new object is there with its colour and shape, whatever else is."""
    item = trial.target.objects[-1]
    return oracle.read(image.numpy()).has(item.colour, item.shape)


def new_colour_right(image: Tensor, trial: Trial) -> bool:
    """There is one object, and it has the new colour."""
    return [item.colour for item in oracle.read(image.numpy()).objects] == [trial.target.objects[0].colour]


def background_right(image: Tensor, trial: Trial) -> bool:
    """Colour and pattern of the background, and the object as it was."""
    return oracle.read(image.numpy()).agrees(trial.target)


def stroke_right(image: Tensor, trial: Trial) -> bool:
    """Most pixels inside the stroke are nearer to the wanted colour than to any other, the source's included."""
    inside = trial.mask > 0.5
    pixels, before = image.numpy()[inside], trial.source[inside]
    to_colours = np.linalg.norm(pixels[:, None] - oracle.object_palette(), axis=-1)
    wanted = oracle.COLOUR_NAMES.index(trial.target.objects[0].colour)
    changed = to_colours[:, wanted] < np.linalg.norm(pixels - before, axis=-1)
    return float(((to_colours.argmin(-1) == wanted) & changed).mean()) > 0.5


def object_overlap(image: Tensor, trial: Trial) -> float:
    """Intersection over union of the object's true mask before and what stands out from the background now."""
    pixels = image.numpy()
    now, before = oracle.foreground(pixels, *oracle.read_background(pixels)), trial.mask > 0.5
    return float((now & before).sum() / max(1, (now | before).sum()))
