"""What a blended edit costs against the forward passes that it needs, in one run on one machine.

`python -m editkit.benchmarks cost` prints forward passes and times. Both sides alternate; the ratio is of the medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..pipelines.blended.blending import blended_denoise
from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.masks import dilation_schedule
from ..pipelines.core.noise import seeded_noise

LIMIT = 1.05


class CountingUnet:
    """Counts the forward passes of a U-Net: the latents of each call, and all of them."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.calls: list[int] = []
        self._handle = unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(len(args[0]))

    @property
    def passes(self) -> int:
        return sum(self.calls)

    def remove(self) -> None:
        self._handle.remove()


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time where there is no accelerator to wait for: it does not depend on what else runs."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`run`, and the wait until `device` has done what it queued."""

    def run_and_wait() -> None:
        run()
        wait(device)

    return run_and_wait


def alternating(
    runs: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each run in every round, after one to warm up; they take turns, so that all see the same machine."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds):
        order = range(len(runs)) if round_ % 2 == 0 else range(len(runs) - 1, -1, -1)
        for index in order:
            begun = clock()
            runs[index]()
            times[index].append(clock() - begun)
    return times


def edit_cost(model: Any, batch: int, *, steps: int = 50, rounds: int = 3, latent_pixels: int = 12) -> dict[str, float]:
    """A guided edit of `batch` images against the same U-Net calls alone: forward passes, seconds and their ratio."""
    denoiser = model.denoiser
    sigmas, seeds = denoiser.schedule(steps), list(range(batch))
    source = seeded_noise((denoiser.channels, latent_pixels, latent_pixels), seeds, denoiser.device)
    schedule = dilation_schedule(torch.nn.functional.pad(torch.ones(1, 4, 4), (4, 4, 4, 4)))
    positive, negative = model.text.encode("a red ring on a sky background"), model.text.encode("")
    prompts = EditPrompts(positive, negative, 5.0)
    tokens = torch.cat([positive.tokens.expand(batch, -1, -1), negative.tokens.expand(batch, -1, -1)])
    tokens = tokens.to(denoiser.device, denoiser.dtype)
    counter = CountingUnet(denoiser.unet)

    def edit() -> None:
        blended_denoise(denoiser, source * 14, source, sigmas, schedule, prompts, seeds=seeds)
        wait(denoiser.device)

    @torch.no_grad()
    def bare() -> None:
        latents = source.repeat(2, 1, 1, 1).to(denoiser.dtype)
        for sigma in sigmas[:-1].tolist():
            denoiser.unet(latents, denoiser.timestep(sigma), tokens, return_dict=False)
        wait(denoiser.device)

    edit()
    passes = counter.passes
    counter.remove()
    ours, floor = (statistics.median(times) for times in alternating([edit, bare], rounds))
    return {
        "batch": batch,
        "steps": steps,
        "passes": passes,
        "needed": 2 * steps * batch,
        "edit_s": ours,
        "bare_s": floor,
        "ratio": ours / floor,
    }


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(rounds: int = 5) -> bool:
    """Print the table; True if every ratio keeps the limit."""
    from ..hosts.diffusers.loading import load_bundled
    from ..pipelines.blended.pipeline import best_device

    model, good = load_bundled(best_device()), True
    print(f"{'batch':>5} {'steps':>5} {'passes':>6} {'needed':>6} {'edit s':>8} {'bare s':>8} {'ratio':>6}")
    for batch in (1, 8):
        row = edit_cost(model, batch, rounds=rounds)
        good &= row["ratio"] <= LIMIT and row["passes"] == row["needed"]
        print(
            "{batch:5.0f} {steps:5.0f} {passes:6.0f} {needed:6.0f} {edit_s:8.3f} {bare_s:8.3f} {ratio:6.3f}".format(
                **row
            )
        )
    return good
