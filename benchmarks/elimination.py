"""The best of 24 candidates by rank: all run to the end, or only those that rank best after 30 % of the steps.

`python -m editkit.benchmarks elimination --trials 16` prints best-result precision and forward passes. The oracle decides what is
right. Both variants use the same seeds.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..headless.claims import trials as t
from ..pipelines.blended.pipeline import EditSettings, blended_edit
from .cost import CountingUnet

CANDIDATES, KEPT = 24, 8
POINTS, SHARE = 0.02, 0.65


def main(trials: int = 16, steps: int = 50) -> bool:
    """Print both rows; True if elimination is within 2 points at 65 % of the forward passes."""
    from ..hosts.bundled import ranker_folder
    from ..hosts.diffusers.loading import load_bundled
    from ..hosts.diffusers.open_clip_ranker import load_ranker
    from ..pipelines.blended.pipeline import best_device

    model, ranker = load_bundled(best_device()), load_ranker(ranker_folder())
    plain = EditSettings(steps=steps, candidates=CANDIDATES, tune_steps=0)
    edit = partial(blended_edit, model.denoiser, model.codec, model.text, ranker=ranker)
    found = {}
    for name, settings in (("all to the end", plain), (f"best {KEPT} kept", replace(plain, keep=KEPT))):
        counter, right = CountingUnet(model.denoiser.unet), 0
        for index in range(trials):
            trial = t.new_object_alone(index)
            image, mask = t.images_of([trial])
            result = edit(image, mask, trial.prompt, settings=replace(settings, seed=1000 * index))
            right += t.new_object_right(result.image[0], trial)
        counter.remove()
        found[name] = (right / trials, counter.passes / trials)
        print(
            f"{name:<15} best result right {right} of {trials}, {counter.passes / trials:.0f} forward passes",
            flush=True,
        )
    (before, all_passes), (after, passes) = found.values()
    print(f"    {100 * (after - before):+.1f} points at {passes / all_passes:.1%} of the forward passes")
    return after >= before - POINTS and passes <= SHARE * all_passes
