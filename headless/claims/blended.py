"""What Blended Latent Diffusion can do on the bundled model: its claims as one table.

`editkit claims blended` prints it: 64 trials for each claim, checked by the oracle, which knows no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...pipelines.blended.composite import blend_pixels, composite_source
from ...pipelines.blended.decoder_tuning import DecoderSettings, LatentSettings, tune_decoder, tune_latent
from ...pipelines.blended.pipeline import EditSettings
from ...pipelines.blended.poisson import blend_poisson
from ...pipelines.core.masks import PAPER_KERNELS
from ...pipelines.evaluation.clip_ranking import rank_by_text
from ...pipelines.evaluation.metrics import psnr_outside, seam_contrast, wilson_interval
from . import trials as t

log = logging.getLogger("editkit.claims")
SETTINGS = EditSettings(steps=50, strength=1.0, guidance_scale=3.0, candidates=1)
# On small latents the last, least noisy steps decide what a thin mask shows. Stages of equal log-sigma leave the drawn mask
# in place for enough of them.
SHRINKING = replace(SETTINGS, kernels=PAPER_KERNELS, stage_spacing="log-sigma")


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
    for name, make, check, floor in (
        ("new object in a box", t.new_object, t.object_right, 0.95),
        ("new background", t.new_background, t.background_right, 0.80),
    ):
        trials = [make(i) for i in range(count)]
        images, outside = composited(model, trials, t.edit_all(model, trials, SETTINGS))
        change = max(change, outside)
        claims.append(share(name, [check(image, trial) for image, trial in zip(images, trials, strict=True)], floor))
    claims += thin_claims(model, count)
    claims.append(Claim("largest change outside", change, f"{change:g}, wanted 0", change == 0))
    return claims


def thin_claims(model: Any, count: int = 64) -> list[Claim]:
    """Progressive shrinking against the plain loop, on the same strokes and seeds."""
    trials, rates = [t.thin_stroke(i) for i in range(count)], []
    for settings in (SETTINGS, SHRINKING, replace(SHRINKING, stage_spacing="steps")):
        images, _ = composited(model, trials, t.edit_all(model, trials, settings))
        rates.append(sum(t.stroke_right(*pair) for pair in zip(images, trials, strict=True)) / count)
    plain, shrinking, equal_steps = rates
    text = (
        f"{shrinking:.1%} against {plain:.1%} of {count}: {100 * (shrinking - plain):+.1f} points, wanted +15 "
        f"({equal_steps:.1%} with equal steps, as published)"
    )
    return [Claim("thin strokes, shrinking over plain", shrinking - plain, text, shrinking - plain >= 0.15)]


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


# ------------------------------------------------------------------------------------------------ background methods
EXACT = 60.0  # dB: where a background counts as exact
VISIBLE = 40.0  # dB: above this, nobody sees a difference


@dataclass(frozen=True)
class Method:
    """A way to bring the background back, trial by trial.

    Attributes:
        psnr: outside the mask, in dB, capped at `EXACT`.    seam: contrast along the mask's edge, 0 to 1.
        kept: the verdict inside the mask is right.
    """

    name: str
    psnr: Tensor
    seam: Tensor
    kept: Tensor

    def total(self, cap: float = VISIBLE) -> Tensor:
        """dB outside the mask minus the seam in units of 1/255, per trial: what the paper weighs, on one scale.

        Pasting is exact outside, so with an uncapped PSNR it would win whatever seam it leaves. Differences above `VISIBLE`
        dB cannot be seen and do not count; `print_table` also gives the sum with the cap at `EXACT`.
        """
        return self.psnr.clamp(max=cap) - self.seam * 255


def background_table(model: Any, count: int = 64) -> list[Method]:
    """Plain decode, tuned decoder, tuned latent, Poisson and pixel blending on the same edits (BLD, figure 4)."""
    trials = [t.new_object(i) for i in range(count)]
    latents = t.edit_all(model, trials, SETTINGS)
    rows: dict[str, list[tuple[float, float, bool]]] = {}
    for index, trial in enumerate(trials):
        latent, (source, mask) = latents[index : index + 1], t.images_of([trial])
        for name, image in background_images(model, latent, source, mask):
            outside = float(psnr_outside(image, source, mask, cap=EXACT))
            seam = float(seam_contrast(image, source, mask))
            rows.setdefault(name, []).append((outside, seam, t.new_object_right(image[0], trial)))
    return [Method(name, *torch.tensor(found, dtype=torch.float64).unbind(1)) for name, found in rows.items()]


def background_images(model: Any, latent: Tensor, source: Tensor, mask: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One edit with each background method.

    Args:
        model: the bundled model.
        latent: of the edit, unscaled [1, C, h, w].
        source: the image [1, H, W, 3] in [0, 1].
        mask: [1, H, W], 1 = edit.

    Returns: names of methods with their images [1, H, W, 3].
    """
    plain = model.codec.decode(latent)
    yield "plain decode", plain
    yield "tuned decoder", tune_decoder(model.codec, latent, source, None, mask, settings=DecoderSettings()).image
    yield "tuned latent", tune_latent(model.codec, latent, source, None, mask, settings=LatentSettings()).image
    yield "poisson", blend_poisson(plain, source, mask)
    yield "pixels", blend_pixels(plain, source, mask)


def background_claims(table: Sequence[Method]) -> list[Claim]:
    by_name = {method.name: method for method in table}
    plain, tuned = by_name.pop("plain decode"), by_name.pop("tuned decoder")
    before, after = float(plain.psnr.mean()), float(tuned.psnr.mean())
    kept = [float(method.kept.mean()) for method in (plain, tuned)]
    claims = [
        Claim(
            "decoder fine-tune outside",
            after - before,
            f"{before:.1f} to {after:.1f} dB: {after - before:+.1f} dB, wanted +5",
            after - before >= 5,
        ),
        Claim("edit kept by the fine-tune", kept[1], f"{kept[1]:.1%} right, {kept[0]:.1%} before", kept[1] >= kept[0]),
    ]
    return claims + [paired_claim(tuned, rival) for rival in by_name.values()]


def paired_claim(tuned: Method, rival: Method) -> Claim:
    """The sum of the tuned decoder over a rival's, paired over the trials."""
    difference = tuned.total() - rival.total()
    mean, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    text = f"{mean:+.3f} (95 % interval {mean - 1.96 * error:+.3f} to {mean + 1.96 * error:+.3f}), wanted above 0"
    return Claim(f"fine-tune over {rival.name}", mean, text, mean > 0)


def print_table(table: Sequence[Method]) -> None:
    print(
        f"{'background method':<16} {'outside dB':>10} {'seam /255':>10} {'edit kept':>10} "
        f"{f'sum to {VISIBLE:.0f}':>10} {f'sum to {EXACT:.0f}':>10}"
    )
    for method in table:
        psnr, seam, kept = (float(value.mean()) for value in (method.psnr, method.seam, method.kept))
        sums = [float(method.total(cap).mean()) for cap in (VISIBLE, EXACT)]
        print(f"{method.name:<16} {psnr:10.2f} {seam * 255:10.3f} {kept:10.1%} {sums[0]:10.3f} {sums[1]:10.3f}")


def print_claims(claims: Sequence[Claim]) -> bool:
    for claim in claims:
        print(f"{'ok  ' if claim.passed else 'FAIL'} {claim.name:<36} {claim.text}")
    return all(claim.passed for claim in claims)


def main(count: int = 64) -> bool:
    """Everything, printed; True if every claim holds."""
    from ...hosts.bundled import ranker_folder
    from ...hosts.diffusers.loading import load_bundled
    from ...hosts.diffusers.open_clip_ranker import load_ranker

    model = load_bundled()
    good = print_claims(edit_claims(model, count))
    good &= print_claims(rank_claims(model, load_ranker(ranker_folder()), count))
    table = background_table(model, count)
    print_table(table)
    return good & print_claims(background_claims(table))
