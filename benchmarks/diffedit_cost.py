"""What DiffEdit and inversion cost against the bare network rows that they cannot avoid, in one run on one machine.

`python -m editkit.benchmarks diffedit-cost` prints rows and times. Per image DiffEdit needs 2 n rows for the mask, r N
to climb and 2 r N to decode: 140 for n = 10, N = 50, r = 0.8. The published flow also guides the mask and the climb, which
takes 200 (methods.md, section 6). All sides take turns, so that they see the same machine; the fastest round of each counts. On
a CPU it is the processor's time that is measured, which other programs disturb least.

In small batches a call of this tiny network costs the same for one row as for two. Fewer rows then save
nothing, as the bare rows of both flows show; the gain over the published flow is judged where those rows themselves allow it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.masks import constant_schedule
from ..pipelines.core.noise import seeded_noise
from ..pipelines.core.protocols import Context
from ..pipelines.core.sigmas import executed
from ..pipelines.diffedit import DiffEditSettings, diffedit, masked_decode, strength_sigma
from ..pipelines.inversion.ddim import InversionOptions, invert
from .cost import LIMIT, CountingUnet, alternating, wait

FASTER = 1.35
SETTINGS = DiffEditSettings()  # n = 10, N = 50, r = 0.8


@dataclass(frozen=True)
class Job:
    """A batch to edit: clean latents [B, C, h, w], one seed each, and the three prompts."""

    model: Any
    latent: Tensor
    source: Context
    target: Context
    null: Context

    @property
    def seeds(self) -> list[int]:
        return list(range(len(self.latent)))


def job(model: Any, batch: int, latent_pixels: int = 12) -> Job:
    noise = seeded_noise((model.denoiser.channels, latent_pixels, latent_pixels), range(batch), model.denoiser.device)
    texts = ("a red circle on a sky background", "a blue square on a sky background", "")
    return Job(model, noise / model.denoiser.scaling_factor, *(model.text.encode(text) for text in texts))


def ours(work: Job) -> None:
    """The whole method, from the clean latent to the edited one."""
    denoiser = work.model.denoiser
    diffedit(denoiser, work.latent, work.source, work.target, work.null, seeds=work.seeds, settings=SETTINGS)


@torch.no_grad()
def published(work: Job) -> None:
    """4 n rows for a guided mask, 2 r N for a guided climb, 2 r N for the decode with its late background."""
    denoiser, scale, maps = work.model.denoiser, SETTINGS.guidance_scale, SETTINGS.maps
    z, sigma = denoiser.scale_in(work.latent), strength_sigma(denoiser, SETTINGS.strength)
    noises = [seeded_noise(z.shape[1:], work.seeds, z.device, draw=j) for j in range(maps)]
    noised = torch.cat([denoiser.noise(z, noise, sigma) for noise in noises])
    prompts = [work.null, work.source, work.null, work.target]
    four = denoiser.denoise(noised, sigma, prompts)
    source, target = (
        denoiser.combine(noised, sigma, four[i + 1], four[i], scale, [prompts[i + 1], prompts[i]]) for i in (0, 2)
    )
    mask, _ = SETTINGS.rule((target - source).abs().view(maps, *z.shape).mean(dim=(0, 2)))
    path = invert(
        denoiser, work.latent, work.source, denoiser.schedule(SETTINGS.steps), ratio=SETTINGS.ratio,
        negative=work.null, guidance_scale=scale, options=InversionOptions("next"),
    )  # fmt: skip
    prompts = EditPrompts(work.target, work.null, scale)
    edited = masked_decode(denoiser, path, constant_schedule(mask), prompts, ratio=SETTINGS.ratio, legacy_offset=True)
    denoiser.scale_out(edited)


def inversion(work: Job) -> None:
    invert(work.model.denoiser, work.latent, work.source, work.model.denoiser.schedule(SETTINGS.steps))


def bare(work: Job, calls: Sequence[tuple[int, float]]) -> Callable[[Job], None]:
    """Nothing but network calls: (latents per image, sigma) each, prepared beforehand."""
    denoiser, batch = work.model.denoiser, len(work.latent)
    largest = batch * max(count for count, _ in calls)
    rows = denoiser.scale_in(work.latent).repeat(largest // batch, 1, 1, 1).to(denoiser.dtype)
    tokens = work.target.tokens.to(denoiser.device, denoiser.dtype).expand(largest, -1, -1).contiguous()
    made = [(batch * count, denoiser.timestep(sigma)) for count, sigma in calls]

    @torch.no_grad()
    def run(_: Job) -> None:
        for count, timestep in made:
            denoiser.unet(rows[:count], timestep, tokens[:count], return_dict=False)

    return run


def floors(work: Job) -> dict[str, Callable[[Job], None]]:
    """The rows of the three runs, in the batch shapes that they come in."""
    denoiser = work.model.denoiser
    levels = denoiser.schedule(SETTINGS.steps).tolist()[:-1]
    part = levels[len(levels) - executed(SETTINGS.steps, SETTINGS.ratio) :]
    sigma = strength_sigma(denoiser, SETTINGS.strength)
    up, guided_up, down = (
        [(1, level) for level in part[::-1]],
        [(2, level) for level in part[::-1]],
        [(2, level) for level in part],
    )
    return {
        "ours": bare(work, [(2 * SETTINGS.maps, sigma), *up, *down]),
        "published": bare(work, [(4 * SETTINGS.maps, sigma), *guided_up, *down]),
        "inversion": bare(work, [(1, level) for level in levels[::-1]]),
    }


@dataclass(frozen=True)
class Line:
    """Seconds of a run over those of another; `limit` None where the ratio is not judged."""

    name: str
    seconds: float
    other_seconds: float
    limit: float | None

    @property
    def ratio(self) -> float:
        return self.seconds / self.other_seconds

    @property
    def passed(self) -> bool:
        return self.limit is None or self.ratio <= self.limit

    def __str__(self) -> str:
        verdict = "    " if self.limit is None else "ok  " if self.passed else "FAIL"
        limit = "     -" if self.limit is None else f"{self.limit:6.3f}"
        return f"{verdict} {self.name:<36} {self.seconds:8.3f} {self.other_seconds:8.3f} {self.ratio:6.3f} {limit}"


def rows_of(run: Callable[[Job], None], work: Job) -> float:
    """Network rows per image."""
    counter = CountingUnet(work.model.denoiser.unet)
    try:
        run(work)
        return counter.rows / len(work.latent)
    finally:
        counter.remove()


def lines(model: Any, batch: int, rounds: int) -> list[Line]:
    """DiffEdit over its floor and over the published flow, the bare rows of both, and inversion over its floor."""
    work = job(model, batch)
    runs = {"ours": ours, "published": published, "inversion": inversion}
    runs |= {f"bare {name}": run for name, run in floors(work).items()}
    begun = [lambda run=run: (run(work), wait(model.denoiser.device)) for run in runs.values()]
    clock = time.process_time if model.denoiser.device.type == "cpu" else time.perf_counter
    seconds = dict(zip(runs, (min(times) for times in alternating(begun, rounds, clock)), strict=True))

    def line(name: str, one: str, other: str, limit: float | None) -> Line:
        return Line(name, seconds[one], seconds[other], limit)

    rows = line("bare rows, DiffEdit over published", "bare ours", "bare published", None)
    return [
        line("DiffEdit over its bare rows", "ours", "bare ours", LIMIT),
        line("DiffEdit over the published flow", "ours", "published", 1 / FASTER if rows.ratio <= 1 / FASTER else None),
        rows,
        line("inversion over its bare rows", "inversion", "bare inversion", LIMIT),
    ]


def main(runs: Sequence[tuple[int, int]] = ((1, 7), (24, 3))) -> bool:
    """Print the table for each (images, rounds); True if every ratio keeps its limit."""
    from ..hosts.diffusers.loading import load_bundled
    from ..pipelines.blended.pipeline import best_device

    model = load_bundled(best_device())
    sides = {"DiffEdit": ours, "published flow": published, "inversion": inversion}
    rows = {name: rows_of(run, job(model, 1)) for name, run in sides.items()}
    print("rows per image: " + ", ".join(f"{name} {count:.0f}" for name, count in rows.items()))
    good = rows["DiffEdit"] == 140 and rows["inversion"] == SETTINGS.steps
    for batch, rounds in runs:
        print(f"{f'batch {batch}':<41} {'seconds':>8} {'of':>8} {'ratio':>6} {'limit':>6}")
        for line in lines(model, batch, rounds):
            good &= line.passed
            print(line, flush=True)
    return good
