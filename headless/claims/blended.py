"""What Blended Latent Diffusion can do on the bundled model: its claims as one table.

`editkit claims blended` prints it: 64 trials for each claim, checked by the oracle, which knows no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...pipelines.blended.composite import composite_source
from ...pipelines.blended.pipeline import EditSettings
from ...pipelines.evaluation.clip_ranking import rank_by_text
from . import trials as t
from .backgrounds import Edit, background_claims, background_table, print_table
from .claim import Claim, print_claims, share

SETTINGS = EditSettings(steps=50, strength=1.0, guidance_scale=3.0, candidates=1)


def composited(model: Any, trials: Sequence[t.Trial], latents: Tensor) -> tuple[Tensor, float]:
    """Decoded edits over their sources, and the largest change outside any mask."""
    sources, masks = t.images_of(trials)
    return composite_source(model.codec.decode(latents), sources, masks)


def edit_claims(model: Any, count: int = 64) -> list[Claim]:
    """New object, new background; nothing outside changes."""
    claims, change = [], 0.0
    for name, make, check, floor in (
        ("new object in a box", t.new_object, t.object_right, 0.95),
        ("new background", t.new_background, t.background_right, 0.80),
    ):
        trials = [make(i) for i in range(count)]
        images, outside = composited(model, trials, t.edit_all(model, trials, SETTINGS))
        change = max(change, outside)
        claims.append(share(name, [check(image, trial) for image, trial in zip(images, trials, strict=True)], floor))
    claims.append(Claim("largest change outside", change, f"{change:g}, wanted 0", change == 0))
    return claims


def rank_claims(model: Any, ranker: Any, count: int = 64, candidates: int = 8) -> list[Claim]:
    """The best ranked candidate against the mean of all, with prompts that name only the new object.

    Args:
        model, ranker: the bundled ones.
        count: trials.
        candidates: images per trial.

    Returns: one claim.
    """
    best, mean = [], []
    for index in range(count):
        trial = t.new_object_alone(index)
        settings = replace(SETTINGS, seed=1000 * index)
        latents = t.edit_all(model, [trial] * candidates, settings)
        images, _ = composited(model, [trial] * candidates, latents)
        ranking = rank_by_text(images, trial.prompt, ranker, mask=torch.from_numpy(trial.mask)[None])
        hits = [t.new_object_right(image, trial) for image in images]
        mean.append(sum(hits) / candidates)
        best.append(hits[int(ranking.order[0])])
    top, average = sum(best) / count, sum(mean) / count
    text = f"{top:.1%} against a mean of {average:.1%} over {count} x {candidates}: {100 * (top - average):+.1f} points, wanted +10"
    return [Claim("best of 8 by rank", top - average, text, top - average >= 0.10 or average >= 0.85)]


def edits(model: Any, count: int = 64) -> Iterator[Edit]:
    """New objects in a box, before their backgrounds are brought back."""
    trials = [t.new_object(i) for i in range(count)]
    latents = t.edit_all(model, trials, SETTINGS)
    for index, trial in enumerate(trials):
        source, mask = t.images_of([trial])
        yield Edit(latents[index : index + 1], source, mask, partial(t.new_object_right, trial=trial))


def main(count: int = 64) -> bool:
    """Everything, printed; True if every claim holds."""
    from ...hosts.bundled import ranker_folder
    from ...hosts.diffusers.loading import load_bundled
    from ...hosts.diffusers.open_clip_ranker import load_ranker

    model = load_bundled()
    good = print_claims(edit_claims(model, count))
    good &= print_claims(rank_claims(model, load_ranker(ranker_folder()), count))
    table = background_table(model, edits(model, count))
    print_table(table)
    return good & print_claims(background_claims(table))
