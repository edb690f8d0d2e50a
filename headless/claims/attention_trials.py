"""Attention edits whose right answer is known: two captions of the grammar, and what the oracle must see.

Source and target are drawn from one noise, or the source is the renderer's image, inverted. Pairs whose prompts are aligned
alike run as a batch, each with its own captions and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hosts.bundled import oracle
from ...hosts.bundled.scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, SHAPES, Scene, render, sample_scene, scene_rng
from ...pipelines.attention.p2p import P2PControl, P2POptions
from ...pipelines.attention.pair_control import PairControl
from ...pipelines.attention.pair_loop import PairPrompts, pair_edit
from ...pipelines.attention.prompts.align import align_prompts
from ...pipelines.attention.prompts.prompt_edit import PromptEdit
from ...pipelines.core.noise import seeded_noise, start_latent
from ...pipelines.core.protocols import Context
from ...pipelines.core.trajectory import Trajectory
from ...pipelines.inversion.ddim import invert
from .trials import SIZE, stacked

FIRST = 5_000_000  # of the held-out stream: scenes that no other measure sees
TUNING = 6_000_000  # scenes on which settings were chosen; no claim is made on them


@dataclass(frozen=True)
class Pair:
    """One edit: both scenes, whose captions are the prompts, and the seed of the noise."""

    before: Scene
    after: Scene
    seed: int


def _scene(index: int, first: int) -> tuple[Scene, np.random.Generator]:
    rng = scene_rng(first + index, held_out=True)
    return sample_scene(rng, 1), rng


def colour_swap(index: int, first: int = FIRST) -> Pair:
    """One object gets another colour."""
    scene, rng = _scene(index, first)
    colour = rng.choice([c for c in OBJECT_COLOURS if c != scene.objects[0].colour])
    return Pair(scene, scene.with_object(0, colour=str(colour)), first + index)


def one_of_two(index: int, first: int = FIRST) -> Pair:
    """The left one of two objects gets a colour that neither had."""
    rng = scene_rng(first + index, held_out=True)
    scene = sample_scene(rng, 2)
    left, right = scene.objects
    others = [c for c in OBJECT_COLOURS if c not in (left.colour, right.colour)]
    if left.colour == right.colour:  # a name must mean one of them
        scene = scene.with_object(1, colour=others.pop())
    return Pair(scene, scene.with_object(0, colour=str(rng.choice(others))), first + index)


def shape_swap(index: int, first: int = FIRST) -> Pair:
    """One object becomes another: a large change of structure."""
    scene, rng = _scene(index, first)
    shape = rng.choice([s for s in SHAPES if s != scene.objects[0].shape])
    return Pair(scene, scene.with_object(0, shape=str(shape)), first + index)


def new_attribute(index: int, first: int = FIRST) -> Pair:
    """A plain background becomes striped: the target has one word more."""
    scene, _ = _scene(index, first)
    return Pair(replace(scene, pattern="plain"), replace(scene, pattern="striped"), first + index)


def same_scene(index: int, first: int = FIRST) -> Pair:
    """Nothing changes but a weight."""
    scene, _ = _scene(index, first)
    return Pair(scene, scene, first + index)


# -------------------------------------------------------------------------------------------------------------- running
@dataclass(frozen=True)
class Run:
    """How pairs are sampled; `options` None leaves the target without its source's attention.

    `real`: the source is the rendered image itself, inverted.
    """

    steps: int = 50
    guidance_scale: float = 4.0
    options: P2POptions | None = field(default_factory=P2POptions)
    real: bool = False


Words = Callable[["Pair"], dict[str, Any]]


def edited(
    model: Any, pairs: Sequence[Pair], run: Run, words: Words = lambda pair: {}, batch: int = 32
) -> tuple[Tensor, Tensor]:
    """Sample the sources and targets of `pairs`.

    Args:
        model: the bundled model.
        pairs: the edits; those whose prompts align alike share a batch.
        run: steps, guidance and attention control.
        words: the options of `align_prompts` for a pair.
        batch: pairs per batch, at most.

    Returns: images of sources and targets, [N, S, S, 3] each.
    """
    edits = [align_prompts(model.text, pair.before.caption, pair.after.caption, **words(pair)) for pair in pairs]
    groups: dict[tuple, list[int]] = {}
    for index, edit in enumerate(edits):
        groups.setdefault(_structure(edit), []).append(index)
    out: dict[int, tuple[Tensor, Tensor]] = {}
    for members in groups.values():
        for begin in range(0, len(members), batch):
            part = members[begin : begin + batch]
            images = _sampled(model, [edits[i] for i in part], [pairs[i] for i in part], run)
            out.update(zip(part, zip(*images, strict=True), strict=True))
    sources, targets = zip(*(out[i] for i in range(len(pairs))), strict=True)
    return torch.stack(sources), torch.stack(targets)


def _structure(edit: PromptEdit) -> tuple:
    """Equal for edits that do the same to the same places."""
    arrays = (edit.mapper, edit.alphas, edit.equalizer)
    places = (edit.blend_source, edit.blend_target, edit.keep_source, edit.keep_target)
    return (*(array.numpy().tobytes() for array in arrays), *sorted(edit.step_ranges.items()), *places)


def _sampled(model: Any, edits: Sequence[PromptEdit], pairs: Sequence[Pair], run: Run) -> tuple[Tensor, Tensor]:
    denoiser = model.denoiser
    sigmas = denoiser.schedule(run.steps)
    source, target = (stacked([getattr(edit, name) for edit in edits]) for name in ("source", "target"))
    edit = replace(edits[0], source=source, target=target)
    control: PairControl = PairControl(sigmas) if run.options is None else P2PControl(edit, sigmas, run.options)
    prompts = PairPrompts(source, target, model.text.encode(""), run.guidance_scale)
    start = _inverted(model, pairs, source, sigmas) if run.real else _noise(denoiser, pairs, sigmas)
    result = pair_edit(denoiser, prompts, control, start)
    before, after = (model.codec.decode(denoiser.scale_out(z)).cpu() for z in (result.source, result.edited))
    return before, after


def _noise(denoiser: Any, pairs: Sequence[Pair], sigmas: Tensor) -> Tensor:
    size = int(denoiser.unet.config["sample_size"])
    noise = seeded_noise((denoiser.channels, size, size), [pair.seed for pair in pairs], denoiser.device)
    return start_latent(denoiser, torch.zeros_like(noise), float(sigmas[0]), noise, from_source=False)


def _inverted(model: Any, pairs: Sequence[Pair], source: Context, sigmas: Tensor) -> Trajectory:
    images = torch.from_numpy(np.stack([render(pair.before, SIZE) for pair in pairs]))
    return invert(model.denoiser, model.codec.encode(images), source, sigmas)


# -------------------------------------------------------------------------------------------------------------- verdicts
def objects_mask(image: Tensor) -> np.ndarray:
    """Pixels that the oracle takes for objects, bool [S, S]."""
    pixels = image.numpy()
    background, pattern = oracle.read_background(pixels)
    parts = oracle.components(pixels, background, pattern)
    return np.any(parts, axis=0) if parts else np.zeros(pixels.shape[:2], bool)


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of the objects in two images; 0 where there are none."""
    first, second = objects_mask(a), objects_mask(b)
    return float((first & second).sum() / max(1, (first | second).sum()))


def has_colour(image: Tensor, pair: Pair) -> bool:
    return oracle.read(image.numpy()).has(pair.after.objects[0].colour)


def has_shape(image: Tensor, pair: Pair) -> bool:
    return any(item.shape == pair.after.objects[0].shape for item in oracle.read(image.numpy()).objects)


def has_object_at(image: Tensor, pair: Pair) -> bool:
    item = pair.after.objects[0]
    return oracle.read(image.numpy()).has(item.colour, item.shape)


def all_right(image: Tensor, pair: Pair) -> bool:
    """Everything that the target's caption says."""
    return oracle.read(image.numpy()).agrees(pair.after)


def size_of_objects(image: Tensor) -> float:
    """Their share of the image."""
    return float(objects_mask(image).mean())


def paint(image: Tensor, source: Tensor, pair: Pair) -> float:
    """How far the source's object has the colour that the target's caption names: 0 = the background's, 1 = all of it."""
    inside = objects_mask(source)
    empty = np.asarray(BACKGROUND_COLOURS[pair.after.background], np.float32) / 255
    way = np.asarray(OBJECT_COLOURS[pair.after.objects[0].colour], np.float32) / 255 - empty
    return float((image.numpy()[inside] - empty).mean(0) @ way / (way @ way)) if inside.any() else 0.0


Check = Callable[[Tensor, Pair], bool]


def hits(images: Tensor, pairs: Sequence[Pair], check: Check) -> list[bool]:
    return [check(image, pair) for image, pair in zip(images, pairs, strict=True)]
