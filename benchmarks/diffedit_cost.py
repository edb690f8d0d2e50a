"""What DiffEdit and inversion cost against the forward passes that they need, in one run on one machine.

`python -m editkit.benchmarks diffedit-cost` prints forward passes and times. Per image DiffEdit needs 2 n passes for the
mask, r N for the inversion and 2 r N to decode: 140 for n = 10, N = 50, r = 0.8. The published flow also guides the mask and
the inversion, which takes 200 (docs/methods.md, section 6). All sides take turns, and the fastest round of each counts. On a
CPU the processor's time is measured, which other programs disturb least.

In small batches a call of this tiny network costs the same for one latent as for two, so fewer passes save nothing; the bare
passes of both flows show it. The gain over the published flow has a limit only where the bare passes allow that gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.masks import constant_schedule
from ..pipelines.core.noise import seeded_noise
from ..pipelines.core.protocols import Context
from ..pipelines.core.sigmas import executed_steps
from ..pipelines.diffedit.edit import DiffEditSettings, diffedit, masked_decode
from ..pipelines.diffedit.mask import strength_sigma
from ..pipelines.inversion.ddim import InversionOptions, invert
from .cost import LIMIT, CountingUnet, alternating, finished

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
    """4 n passes for a guided mask, 2 r N for a guided inversion, 2 r N to decode with the published background."""
    denoiser = work.model.denoiser
    scale = SETTINGS.guidance_scale
    maps = SETTINGS.maps
    z, sigma = denoiser.scale_in(work.latent), strength_sigma(denoiser, SETTINGS.strength)
    noises = [seeded_noise(z.shape[1:], work.seeds, z.device, draw=j) for j in range(maps)]
    noised = torch.cat([denoiser.noise(z, noise, sigma) for noise in noises])
    contexts = [work.null, work.source, work.null, work.target]
    four = denoiser.denoise(noised, sigma, contexts)
    source, target = (
        denoiser.combine(noised, sigma, four[i + 1], four[i], scale, [contexts[i + 1], contexts[i]]) for i in (0, 2)
    )
    mask, _ = SETTINGS.rule((target - source).abs().view(maps, *z.shape).mean(dim=(0, 2)))
    trajectory = invert(
        denoiser,
        work.latent,
        work.source,
        denoiser.schedule(SETTINGS.steps),
        ratio=SETTINGS.ratio,
        negative=work.null,
        guidance_scale=scale,
        options=InversionOptions("next"),
    )
    prompts = EditPrompts(work.target, work.null, scale)
    masked_decode(denoiser, trajectory, constant_schedule(mask), prompts, ratio=SETTINGS.ratio, legacy_offset=True)


def inversion(work: Job) -> None:
    invert(work.model.denoiser, work.latent, work.source, work.model.denoiser.schedule(SETTINGS.steps))


def bare(work: Job, calls: Sequence[tuple[int, float]]) -> Callable[[Job], None]:
    """Nothing but network calls: (latents per image, sigma) each, prepared beforehand."""
    denoiser, batch = work.model.denoiser, len(work.latent)
    largest = batch * max(count for count, _ in calls)
    latents = denoiser.scale_in(work.latent).repeat(largest // batch, 1, 1, 1).to(denoiser.dtype)
    tokens = work.target.tokens.to(denoiser.device, denoiser.dtype).expand(largest, -1, -1).contiguous()
    made = [(batch * count, denoiser.timestep(sigma)) for count, sigma in calls]

    @torch.no_grad()
    def run(_: Job) -> None:
        for count, timestep in made:
            denoiser.unet(latents[:count], timestep, tokens[:count], return_dict=False)

    return run


def floors(work: Job) -> dict[str, Callable[[Job], None]]:
    """The forward passes of the three runs, in the same batch shapes."""
    denoiser = work.model.denoiser
    sigmas = denoiser.schedule(SETTINGS.steps).tolist()[:-1]
    visited = sigmas[len(sigmas) - executed_steps(SETTINGS.steps, SETTINGS.ratio) :]
    mask_sigma = strength_sigma(denoiser, SETTINGS.strength)
    inverting = [(1, sigma) for sigma in visited[::-1]]
    guided_inverting = [(2, sigma) for sigma in visited[::-1]]
    decoding = [(2, sigma) for sigma in visited]
    return {
        "ours": bare(work, [(2 * SETTINGS.maps, mask_sigma), *inverting, *decoding]),
        "published": bare(work, [(4 * SETTINGS.maps, mask_sigma), *guided_inverting, *decoding]),
        "inversion": bare(work, [(1, sigma) for sigma in sigmas[::-1]]),
    }


@dataclass(frozen=True)
class Line:
    """Seconds of a run over those of another; `limit` None where the ratio has none."""

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


def passes_per_image(run: Callable[[Job], None], work: Job) -> float:
    """Forward passes per image."""
    counter = CountingUnet(work.model.denoiser.unet)
    try:
        run(work)
        return counter.passes / len(work.latent)
    finally:
        counter.remove()


def lines(model: Any, batch: int, rounds: int) -> list[Line]:
    """DiffEdit over its floor and over the published flow, the bare passes of both, and inversion over its floor."""
    work = job(model, batch)
    runs: dict[str, Callable[[Job], None]] = {"ours": ours, "published": published, "inversion": inversion}
    runs |= {f"bare {name}": run for name, run in floors(work).items()}
    begun = [finished(partial(run, work), model.denoiser.device) for run in runs.values()]
    clock = time.process_time if model.denoiser.device.type == "cpu" else time.perf_counter
    seconds = dict(zip(runs, (min(times) for times in alternating(begun, rounds, clock)), strict=True))

    def line(name: str, one: str, other: str, limit: float | None) -> Line:
        return Line(name, seconds[one], seconds[other], limit)

    bare_passes = line("bare passes, DiffEdit over published", "bare ours", "bare published", None)
    limit = 1 / FASTER if bare_passes.ratio <= 1 / FASTER else None
    return [
        line("DiffEdit over its bare passes", "ours", "bare ours", LIMIT),
        line("DiffEdit over the published flow", "ours", "published", limit),
        bare_passes,
        line("inversion over its bare passes", "inversion", "bare inversion", LIMIT),
    ]


def main(runs: Sequence[tuple[int, int]] = ((1, 7), (24, 3))) -> bool:
    """Print the table for each (images, rounds); True if every ratio keeps its limit."""
    from ..hosts.diffusers.loading import load_bundled
    from ..pipelines.blended.pipeline import best_device

    model = load_bundled(best_device())
    sides = {"DiffEdit": ours, "published flow": published, "inversion": inversion}
    passes = {name: passes_per_image(run, job(model, 1)) for name, run in sides.items()}
    print("forward passes per image: " + ", ".join(f"{name} {count:.0f}" for name, count in passes.items()))
    good = passes["DiffEdit"] == 140 and passes["inversion"] == SETTINGS.steps
    for batch, rounds in runs:
        print(f"{f'batch {batch}':<41} {'seconds':>8} {'of':>8} {'ratio':>6} {'limit':>6}")
        for line in lines(model, batch, rounds):
            good &= line.passed
            print(line, flush=True)
    return good
