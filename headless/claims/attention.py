"""What attention control can do on the bundled model: its claims as one table.

`editkit claims attention` prints it: 64 pairs of captions for each claim, checked by the oracle. Settings are the published
ones, except for the swap of shapes. In 50 steps this model follows the target's words whatever the first steps have done,
which leaves nothing to gain. Shapes are therefore swapped in 4 steps, with the source's attention in every layer for the
first half of them (chosen on other scenes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...pipelines.attention.p2p import P2POptions
from ...pipelines.evaluation.metrics import psnr
from . import attention_trials as t
from .claim import Claim, print_claims, share

RUN = t.Run()
LOOSE = replace(RUN, options=None)
HELD = P2POptions(0.5, 0.5, 0.0, self_divisor=1)
SHAPES = t.Run(steps=4, options=HELD)
SIZE_WEIGHTS = (-2.0, 0.0, 1.0, 2.0, 4.0)
PAINT_WEIGHTS = (-2.0, -1.0, 0.0, 0.5, 1.0)


def pairs_of(make: Callable[[int], t.Pair], count: int) -> list[t.Pair]:
    return [make(index) for index in range(count)]


# ---------------------------------------------------------------------------------------------------------- colour, words
def overlaps(sources: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor([t.overlap(*images) for images in zip(sources, targets, strict=True)])


def swap_claims(model: Any, count: int = 64, *, real: bool = False) -> list[Claim]:
    """An object gets another colour by replacing one word; its shape and place stay."""
    pairs, name = pairs_of(t.colour_swap, count), "real image, new colour" if real else "colour swap"
    sources, targets = t.edited(model, pairs, replace(RUN, real=real))
    _, loose = t.edited(model, pairs, replace(LOOSE, real=real))
    kept, free = float(overlaps(sources, targets).mean()), float(overlaps(sources, loose).mean())
    text = f"{kept:.3f} against {free:.3f} without attention control: {kept - free:+.3f}, wanted 0.80 and +0.15"
    return [
        share(f"{name}: right", t.hits(targets, pairs, t.has_colour), 0.90),
        share(f"{name}: shape kept", t.hits(targets, pairs, t.has_shape), 0.90),
        Claim(f"{name}: IoU", kept, text, kept >= 0.80 and kept - free >= 0.15),
    ]


def blend_claims(model: Any, count: int = 64) -> list[Claim]:
    """LocalBlend on the words of one object's colour keeps the half of the image where the other object is."""
    pairs = pairs_of(t.one_of_two, count)

    def colours(pair: t.Pair) -> dict[str, Any]:
        return {"blend_words": [scene.objects[0].colour for scene in (pair.before, pair.after)]}

    kept: list[Tensor] = []
    rates: list[list[bool]] = []
    choices: tuple[t.Words, ...] = (colours, lambda pair: {})
    for words in choices:
        sources, targets = t.edited(model, pairs, RUN, words)
        half = torch.zeros(targets.shape[:3])
        half[:, :, targets.shape[2] // 2 :] = 1
        kept.append(psnr(targets, sources, half))
        rates.append(t.hits(targets, pairs, t.has_colour))
    gain = kept[0] - kept[1]
    mean, spread = float(gain.mean()), 1.96 * float(gain.std()) / math.sqrt(len(gain))
    text = f"{float(kept[0].mean()):.1f} dB against {float(kept[1].mean()):.1f}: {mean:+.1f} +- {spread:.1f}, wanted +6"
    return [
        Claim("LocalBlend: the other object's half", mean, text, mean >= 6),
        share("LocalBlend: colour right", rates[0], 0.90),
    ]


def refine_claims(model: Any, count: int = 64) -> list[Claim]:
    """A word is added, "striped": the background changes, the object stays."""
    pairs = pairs_of(t.new_attribute, count)
    sources, targets = t.edited(model, pairs, RUN)
    _, loose = t.edited(model, pairs, LOOSE)
    kept, free = float(overlaps(sources, targets).mean()), float(overlaps(sources, loose).mean())
    text = f"{kept:.3f} against {free:.3f} without attention control, wanted 0.80 and above it"
    return [
        share("word added: everything right", t.hits(targets, pairs, t.all_right), 0.90),
        Claim("word added: IoU", kept, text, kept >= 0.80 and kept > free),
    ]


# --------------------------------------------------------------------------------------------------------------- weights
def weighted(model: Any, pairs: Sequence[t.Pair], word: Callable[[t.Pair], str], weight: float, steps: int) -> Any:
    """Edits of `pairs` with one word weighted (P2P, reweighting).

    Args:
        model: the bundled model.
        pairs: the edits.
        word: the word of a pair that gets `weight`.
        weight: the factor c on its cross-attention maps.
        steps: of the sampler.

    Returns: images of sources and targets, [N, S, S, 3] each.
    """
    run = replace(RUN, steps=steps, options=P2POptions(cross_until=1.0))
    return t.edited(model, pairs, run, lambda pair: {"weights": {word(pair): weight}})


def weight_claims(model: Any, count: int = 64, steps: int = 25) -> list[Claim]:
    """Means over the pairs must rise from weight to weight: the object's size with its noun, its paint with its colour."""
    pairs = pairs_of(t.same_scene, count)
    size, painted = [], []
    for weight in SIZE_WEIGHTS:
        _, targets = weighted(model, pairs, lambda pair: pair.after.objects[0].shape, weight, steps)
        size.append(sum(map(t.size_of_objects, targets)) / count)
    for weight in PAINT_WEIGHTS:
        sources, targets = weighted(model, pairs, lambda pair: pair.after.objects[0].colour, weight, steps)
        painted.append(sum(map(t.paint, targets, sources, pairs)) / count)
    return [
        rising("weight of the noun: size", SIZE_WEIGHTS, size),
        rising("weight of the colour: paint", PAINT_WEIGHTS, painted),
    ]


def rising(name: str, weights: Sequence[float], values: Sequence[float]) -> Claim:
    text = ", ".join(f"{weight:g}: {value:.3f}" for weight, value in zip(weights, values, strict=True))
    return Claim(name, values[-1] - values[0], text, all(a < b for a, b in zip(values, values[1:], strict=False)))


# ---------------------------------------------------------------------------------------------------------------- P2Plus
def sign_test(better: int, worse: int) -> float:
    """McNemar's exact test: the two-sided probability that chance splits the discordant pairs at least as unevenly."""
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(max(better, worse), total + 1)) / 2**total
    return min(1.0, 2 * tail)


def compared(name: str, hits: Sequence[Sequence[bool]], margin: float) -> Claim:
    """Success rates of two methods on the same pairs, and the test of their difference."""
    first, second = hits
    better = sum(a and not b for a, b in zip(first, second, strict=True))
    worse = sum(b and not a for a, b in zip(first, second, strict=True))
    gain = (better - worse) / len(first)
    text = (
        f"{sum(first) / len(first):.1%} against {sum(second) / len(second):.1%} of {len(first)}: {100 * gain:+.1f} points, "
        f"wanted {100 * margin:+.0f}; {better} better, {worse} worse, two-sided p = {sign_test(better, worse):.3g}"
    )
    return Claim(name, gain, text, gain >= margin)


def shape_claims(model: Any, count: int = 256) -> list[Claim]:
    """Another shape: P2Plus for half of the steps against Prompt-to-Prompt; the caption's shape must be there."""
    pairs = pairs_of(t.shape_swap, count)
    images = [
        t.edited(model, pairs, replace(SHAPES, options=replace(HELD, uncond_self_until=until)))[1]
        for until in (0.5, 0.0)
    ]
    shapes, objects = ([t.hits(part, pairs, check) for part in images] for check in (t.has_shape, t.has_object_at))
    return [
        compared("P2Plus over P2P: shape right", shapes, 0.05),
        compared("P2Plus over P2P: and colour kept", objects, 0.0),
    ]


def main(count: int = 64) -> bool:
    """Everything, printed; True if every claim holds."""
    from ...hosts.diffusers.loading import load_bundled
    from ...pipelines.blended.pipeline import best_device

    model, good = load_bundled(best_device()), True
    good &= print_claims(swap_claims(model, count))
    good &= print_claims(swap_claims(model, count, real=True))
    good &= print_claims(blend_claims(model, count))
    good &= print_claims(refine_claims(model, count))
    good &= print_claims(weight_claims(model, count))
    return good & print_claims(shape_claims(model, 4 * count))
