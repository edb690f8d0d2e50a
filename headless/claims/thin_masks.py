"""Thin strokes: progressive mask shrinking against the plain loop, and against the simplest baseline.

The baseline edits the dilated mask at every step and composites the result by the drawn mask. `editkit claims thin-masks`
prints them on strokes from `FRESH` on, on which no setting of EditKit was chosen. The ceiling is the verdict on the true
image, composited likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...pipelines.blended.composite import composite_source
from ...pipelines.blended.pipeline import EditSettings
from ...pipelines.core.masks import MaskSchedule, constant_schedule, dilate, dilation_schedule
from . import trials as t
from .blended import SETTINGS
from .claim import Claim, print_claims, rate_text

FRESH = 5_000  # index of the first stroke, far from those on which trial, strength and stages were chosen
SEED = 90_000
KERNEL = 3  # of the baseline, in latent pixels: one more on every side

Schedule = Callable[[Tensor], MaskSchedule]
PLAIN = "plain"
PUBLISHED = "shrinking, equal steps (published)"
LOG_SIGMA = "shrinking, equal log-sigma"
BASELINE = f"dilated by {KERNEL} throughout"
CEILING = "ceiling: the true image"

SCHEDULES: Mapping[str, Schedule] = {
    PLAIN: constant_schedule,
    PUBLISHED: dilation_schedule,
    LOG_SIGMA: lambda mask: dilation_schedule(mask, spacing="log-sigma"),
    BASELINE: lambda mask: constant_schedule(dilate(mask, KERNEL)),
}


def thin_table(
    model: Any, count: int = 64, *, settings: EditSettings = SETTINGS, first: int = FRESH
) -> dict[str, list[bool]]:
    """The verdicts on each schedule and on the true images, composited by the drawn masks, for the same strokes and seeds.

    Args:
        model: the bundled model.
        count: strokes.
        settings: of every edit; the seeds are `SEED` and those after it.
        first: index of the first stroke.
    Returns: verdicts by row name.
    """
    trials = [t.thin_stroke(first + i) for i in range(count)]
    settings = replace(settings, seed=SEED)
    found = {}
    for name, schedule in SCHEDULES.items():
        latents = t.edit_all(model, trials, settings, schedule=schedule)
        found[name] = verdicts(model.codec.decode(latents), trials)
    return {**found, CEILING: verdicts(t.targets_of(trials), trials)}


def verdicts(images: Tensor, trials: Sequence[t.Trial]) -> list[bool]:
    """Whether each stroke of the images, composited over the sources by the drawn masks, has the wanted colour."""
    composited, _ = composite_source(images, *t.images_of(trials))
    return [t.stroke_right(image, trial) for image, trial in zip(composited, trials, strict=True)]


def thin_claims(table: Mapping[str, Sequence[bool]]) -> list[Claim]:
    """Shrinking in stages of equal log-sigma over the plain loop. What the baseline and the paper's stages give is printed."""
    rates = {name: sum(hits) / len(hits) for name, hits in table.items()}
    gain = rates[LOG_SIGMA] - rates[PLAIN]
    text = (
        f"{100 * gain:+.1f} points, wanted +15 (as published {100 * (rates[PUBLISHED] - rates[PLAIN]):+.1f}, "
        f"{BASELINE} {100 * (rates[BASELINE] - rates[PLAIN]):+.1f})"
    )
    return [Claim("thin strokes, log-sigma over plain", gain, text, gain >= 0.15)]


def print_thin_table(table: Mapping[str, Sequence[bool]]) -> None:
    for name, hits in table.items():
        print(f"     {name:<36} {rate_text(hits)}", flush=True)


def main(count: int = 64) -> bool:
    """Every schedule on the same strokes, printed; True if the claim holds."""
    from ...hosts.diffusers.loading import load_bundled

    table = thin_table(load_bundled(), count)
    print_thin_table(table)
    return print_claims(thin_claims(table))
