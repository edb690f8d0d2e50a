"""What Blended Latent Diffusion can do on the bundled model: the claims of the README, as one table.

`python -m editkit.benchmarks blended` prints it: 64 trials each, judged by the weight-free oracle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pipelines.background import DecoderSettings, TuneSettings, tune_decoder, tune_latent
from ..pipelines.composite import blend_pixels, composite_source
from ..pipelines.edit import EditSettings
from ..pipelines.masks import PAPER_KERNELS
from ..pipelines.metrics import psnr_outside, seam_contrast, wilson_interval
from ..pipelines.poisson import blend_poisson
from ..pipelines.ranking import rank_by_text
from . import trials as t

log = logging.getLogger("editkit.benchmarks")
SETTINGS = EditSettings(steps=50, strength=1.0, guidance_scale=3.0, candidates=1)
# Half the noise keeps the thing in its place, so that only its colour is in question.
THIN = replace(SETTINGS, strength=0.5, guidance_scale=4.0)


@dataclass(frozen=True)
class Claim:
    """One line: what was measured, its value, and what was promised."""

    name: str
    value: float
    text: str
    passed: bool


def share(name: str, hits: Sequence[bool], floor: float) -> Claim:
    rate, (low, high) = sum(hits) / len(hits), wilson_interval(sum(hits), len(hits))
    text = f"{rate:6.1%} of {len(hits)} (95 % interval {low:.1%} to {high:.1%}), wanted {floor:.0%}"
    return Claim(name, rate, text, rate >= floor)


def composited(model: Any, trials: Sequence[t.Trial], latents: Tensor) -> tuple[Tensor, float]:
    """Decoded edits over their sources, and the largest change outside any mask."""
    sources, masks = t.images_of(trials)
    return composite_source(model.codec.decode(latents), sources, masks)


def edit_claims(model: Any, count: int = 64) -> list[Claim]:
    """New object, new background, thin strokes; nothing outside changes."""
    claims, change = [], 0.0
    for name, make, judge, floor in (
        ("new object in a box", t.new_object, t.object_right, 0.95),
        ("new background", t.new_background, t.background_right, 0.80),
    ):
        trials = [make(i) for i in range(count)]
        images, outside = composited(model, trials, t.edit_all(model, trials, SETTINGS))
        change = max(change, outside)
        claims.append(share(name, [judge(image, trial) for image, trial in zip(images, trials, strict=True)], floor))
    claims += thin_claims(model, count)
    claims.append(Claim("largest change outside", change, f"{change:g}, wanted 0", change == 0))
    return claims


def thin_claims(model: Any, count: int = 64) -> list[Claim]:
    """Progressive shrinking against the plain loop, on the same strokes and seeds."""
    trials, rates = [t.thin_stroke(i) for i in range(count)], {}
    for name, kernels in (("plain loop", (1,)), ("shrinking", PAPER_KERNELS)):
        images, _ = composited(model, trials, t.edit_all(model, trials, replace(THIN, kernels=kernels)))
        rates[name] = [t.stroke_right(image, trial) for image, trial in zip(images, trials, strict=True)]
    plain, shrinking = (sum(rates[name]) / count for name in ("plain loop", "shrinking"))
    text = f"{shrinking:.1%} against {plain:.1%} of {count}: {100 * (shrinking - plain):+.1f} points, wanted +15"
    return [Claim("thin strokes, shrinking over plain", shrinking - plain, text, shrinking - plain >= 0.15)]


def rank_claims(model: Any, ranker: Any, count: int = 64, candidates: int = 8) -> list[Claim]:
    """Best of 8 by rank against the mean of 8, with prompts that name only the new thing."""
    best, mean = [], []
    for index in range(count):
        trial = t.new_object_alone(index)
        settings = replace(SETTINGS, seed=1000 * index)
        latents = t.edit_all(model, [trial] * candidates, settings)
        images, _ = composited(model, [trial] * candidates, latents)
        ranking = rank_by_text(images, trial.prompt, ranker, mask=torch.from_numpy(trial.mask)[None])
        hits = [t.new_thing_right(image, trial) for image in images]
        mean.append(sum(hits) / candidates)
        best.append(hits[int(ranking.order[0])])
    top, average = sum(best) / count, sum(mean) / count
    text = f"{top:.1%} against a mean of {average:.1%} over {count} x {candidates}: {100 * (top - average):+.1f} points, wanted +10"
    return [Claim("best of 8 by rank", top - average, text, top - average >= 0.10 or average >= 0.85)]


# ------------------------------------------------------------------------------------------------ background methods
@dataclass(frozen=True)
class Method:
    """A way to bring the background back, averaged over trials."""

    name: str
    psnr: float
    seam: float
    kept: float

    @property
    def total(self) -> float:
        """dB outside the mask minus the seam in units of 1/255: what the paper weighs, on one scale."""
        return self.psnr - self.seam * 255


def background_table(model: Any, count: int = 64) -> list[Method]:
    """Plain decode, tuned decoder, tuned latent, Poisson and pixel blending on the same edits (BLD, figure 4).

    psnr is capped at 60 dB (exact backgrounds); `kept` is the share of edits whose verdict inside the mask is right.
    """
    trials = [t.new_object(i) for i in range(count)]
    latents = t.edit_all(model, trials, SETTINGS)
    sums: dict[str, list[tuple[float, float, bool]]] = {}
    for index, trial in enumerate(trials):
        latent, (source, mask) = latents[index : index + 1], t.images_of([trial])
        plain = model.codec.decode(latent)
        made: dict[str, Callable[[], Tensor]] = {
            "plain decode": lambda plain=plain: plain,
            "tuned decoder": lambda a=(latent, source, mask): (
                tune_decoder(model.codec, *a[:2], None, a[2], settings=DecoderSettings()).image
            ),
            "tuned latent": lambda a=(latent, source, mask): (
                tune_latent(model.codec, *a[:2], None, a[2], settings=TuneSettings()).image
            ),
            "poisson": lambda a=(plain, source, mask): blend_poisson(*a),
            "pixels": lambda a=(plain, source, mask): blend_pixels(*a),
        }
        for name, make in made.items():
            image = make()
            outside = float(psnr_outside(image, source, mask, cap=60.0))
            seam = float(seam_contrast(image, source, mask))
            sums.setdefault(name, []).append((outside, seam, t.new_thing_right(image[0], trial)))
    return [Method(name, *(sum(v[i] for v in values) / len(values) for i in range(3))) for name, values in sums.items()]


def background_claims(table: Sequence[Method]) -> list[Claim]:
    by_name = {method.name: method for method in table}
    plain, tuned = by_name["plain decode"], by_name["tuned decoder"]
    gain = tuned.psnr - plain.psnr
    rivals = [method for method in table if method.name not in ("plain decode", "tuned decoder")]
    best = max(rivals, key=lambda method: method.total)
    return [
        Claim(
            "decoder fine-tune outside",
            gain,
            f"{plain.psnr:.1f} to {tuned.psnr:.1f} dB: {gain:+.1f} dB, wanted +5",
            gain >= 5,
        ),
        Claim(
            "edit kept by the fine-tune",
            tuned.kept,
            f"{tuned.kept:.1%} right, {plain.kept:.1%} before",
            tuned.kept >= plain.kept,
        ),
        Claim(
            "fine-tune against the rest",
            tuned.total - best.total,
            f"{tuned.total:.1f} against {best.total:.1f} ({best.name})",
            tuned.total > best.total,
        ),
    ]


def print_table(table: Sequence[Method]) -> None:
    print(f"{'background method':<16} {'outside dB':>10} {'seam /255':>10} {'edit kept':>10} {'total':>8}")
    for method in table:
        print(
            f"{method.name:<16} {method.psnr:10.2f} {method.seam * 255:10.3f} {method.kept:10.1%} {method.total:8.2f}"
        )


def print_claims(claims: Sequence[Claim]) -> bool:
    for claim in claims:
        print(f"{'ok  ' if claim.passed else 'FAIL'} {claim.name:<36} {claim.text}")
    return all(claim.passed for claim in claims)


def main(count: int = 64) -> bool:
    """Everything, printed; True if every claim holds."""
    from ..pipelines.backends.folder import load_bundled
    from ..pipelines.backends.openclip import load_ranker
    from ..pipelines.bundled import ranker_folder

    model = load_bundled()
    good = print_claims(edit_claims(model, count))
    good &= print_claims(rank_claims(model, load_ranker(ranker_folder()), count))
    table = background_table(model, count)
    print_table(table)
    return good & print_claims(background_claims(table))
