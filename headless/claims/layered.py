"""What LayerDiffusion can do on the bundled model: two-part edits, with every part of the method left out in turn.

`editkit claims layered` prints it. A scene has one object, which gets another colour and keeps its shape; the
background becomes another. The prompts name the new colour ("a blue shape") and the new background, and only the image
tells that the object is a star. The reference is the empty new background. Images are sampled from noise, and the oracle
checks four answers: one object, its colour, its shape, and the background with its pattern.

Scenes learn in batches, each with weights of its own (`rowwise.py`). The bundled model is small, so there are fewer steps
and larger learning rates than published; they were chosen on other scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hosts.bundled import oracle
from ...hosts.bundled.scenes import (
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    PATTERNS,
    object_mask,
    render,
    sample_scene,
    scene_rng,
)
from ...pipelines.core.errors import ParameterError
from ...pipelines.core.guidance import EditPrompts, Positive
from ...pipelines.core.noise import seeded_noise
from ...pipelines.core.samplers import predictor, sample
from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.evaluation.metrics import wilson_interval
from ...pipelines.layerdiffusion.embeddings import (
    EmbeddingOptions,
    LayeredEmbeddings,
    layered_embeddings,
    mix_embeddings,
)
from ...pipelines.layerdiffusion.finetune import TuneOptions, layered_tune
from ...pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from ...pipelines.layerdiffusion.reference_background import object_latent_mask
from . import trials as t
from .claim import Claim, print_claims
from .rowwise import RowwiseDenoiser, rowwise

KIND = 80_000  # of the trials' stream
EMBEDDINGS = EmbeddingOptions(steps=100, lr=1e-2, join="average")
TUNING = TuneOptions(plan=TunePlan("lora", rank=8), steps=80, lr=2e-3)
ALPHA = 0.7
STEPS = 26
SCALE = 3.0
BATCH = 16
DRAWS = 2  # images of every scene and variant


def two_part(index: int, first: int = t.FIRST + KIND) -> t.Trial:
    """Another colour for the object and another background behind it."""
    rng = scene_rng(first + index, held_out=True)
    before = sample_scene(rng, 1)
    colour = str(rng.choice([c for c in OBJECT_COLOURS if c != before.objects[0].colour]))
    behind = str(rng.choice([c for c in BACKGROUND_COLOURS if c != before.background]))
    target = replace(before.with_object(0, colour=colour), background=behind, pattern=str(rng.choice(PATTERNS)))
    return t.Trial(render(before, t.SIZE), object_mask(before, t.SIZE), _object_words(colour), before, target)


def _object_words(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} shape"


@dataclass(frozen=True)
class Verdict:
    """Which of the three answers are right in one image."""

    colour: bool
    shape: bool
    background: bool

    @property
    def all(self) -> bool:
        return self.colour and self.shape and self.background


def verdict_of(image: Tensor, trial: t.Trial) -> Verdict:
    found, wanted = oracle.read(image.numpy()), trial.target.objects[0]
    item = found.objects[0] if len(found.objects) == 1 else None
    return Verdict(
        item is not None and item.colour == wanted.colour,
        item is not None and item.shape == wanted.shape,
        found.background_agrees(trial.target),
    )


@dataclass(frozen=True)
class Rates:
    """Shares of the images of one variant."""

    name: str
    verdicts: tuple[Verdict, ...]

    def share(self, part: str = "all") -> float:
        return sum(getattr(verdict, part) for verdict in self.verdicts) / len(self.verdicts)

    def line(self) -> str:
        low, high = wilson_interval(sum(verdict.all for verdict in self.verdicts), len(self.verdicts))
        parts = "".join(f"{self.share(part):>12.1%}" for part in ("colour", "shape", "background"))
        return f"{self.name:<38}{self.share():>9.1%}  {low:5.1%} to {high:5.1%}{parts}"


class Scenes:
    """A batch of scenes, encoded, with the embeddings that stage 1 found."""

    def __init__(self, model: Any, trials: Sequence[t.Trial], first: int) -> None:
        self.model, self.trials = model, trials
        self.seeds = [first + index for index in range(len(trials))]
        self.denoiser: RowwiseDenoiser = rowwise(model.denoiser, len(trials))
        images, masks = t.images_of(trials)
        empty = np.stack([render(replace(trial.target, objects=()), t.SIZE) for trial in trials])
        self.source, self.reference = model.codec.encode(images), model.codec.encode(torch.from_numpy(empty))
        height, width = self.source.shape[-2:]
        self.latent_pixels = object_latent_mask(masks, height, width, model.codec.factor)

    def embed(self, options: EmbeddingOptions = EMBEDDINGS) -> LayeredEmbeddings:
        texts = [
            t.stacked([self.model.text.encode(words) for words in part])
            for part in zip(*((trial.prompt, trial.target.background_words) for trial in self.trials), strict=True)
        ]
        return layered_embeddings(
            self.denoiser, self.reference, texts[0], texts[1], self.latent_pixels, seeds=self.seeds, options=options
        )

    def tune(self, found: LayeredEmbeddings, alpha: float = ALPHA, **changed: Any) -> tuple[RowwiseDenoiser, Any]:
        """The tuned denoiser, and the mix that it was tuned at."""
        if found.background is None:
            raise ParameterError("found has no background embedding: give stage 1 a background text")
        mixed = mix_embeddings(found.object, found.background, alpha)
        options = replace(TUNING, **changed)
        tuning = layered_tune(
            self.denoiser,
            self.source,
            self.reference,
            mixed,
            self.latent_pixels,
            seeds=self.seeds,
            options=options,
        )
        return self.denoiser.with_rows(tuning.changes), mixed

    def draw(self, denoiser: Any, positive: Positive) -> list[Verdict]:
        """Verdicts on images sampled from noise; every variant starts from the same noise."""
        verdicts, sigmas = [], denoiser.schedule(STEPS)
        prompts = EditPrompts(positive, self.model.text.encode(""), SCALE)
        for draw in range(DRAWS):
            noise = seeded_noise(self.source.shape[1:], self.seeds, denoiser.device, draw)
            z = denoiser.noise(torch.zeros_like(noise), noise, float(sigmas[0]))
            z = sample("euler", predictor(denoiser, prompts), z, sigmas)
            images = self.model.codec.decode(denoiser.scale_out(z)).cpu()
            verdicts += [verdict_of(image, trial) for image, trial in zip(images, self.trials, strict=True)]
        return verdicts


FULL = "as published, alpha 0.7"
MIX = "  without iterative guidance (mix only)"
OBJECT_ONLY = "  object's embedding only"
NO_OBJECT, NO_BACKGROUND = "  without L_obj", "  without L_bg"
ALPHA_0 = "  alpha 0"
ALPHA_1 = "  alpha 1"
UNTUNED = "  without fine-tune"


def variants(scenes: Scenes) -> dict[str, list[Verdict]]:
    """Every row of the table for one batch of scenes."""
    found = scenes.embed()
    verdicts = {}

    def alternating(denoiser: Any, mixed: Any) -> Positive:
        return IterativeGuidance(found.object, mixed, denoiser.schedule(STEPS))

    tuned, mixed = scenes.tune(found)
    verdicts[FULL] = scenes.draw(tuned, alternating(tuned, mixed))
    verdicts[MIX] = scenes.draw(tuned, mixed)
    verdicts[OBJECT_ONLY] = scenes.draw(tuned, found.object)
    verdicts[UNTUNED] = scenes.draw(scenes.model.denoiser, alternating(scenes.model.denoiser, mixed))
    for name, changed in (
        (NO_OBJECT, {"object_weight": 0.0}),
        (NO_BACKGROUND, {"background_weight": 0.0}),
        (ALPHA_0, {"alpha": 0.0}),
        (ALPHA_1, {"alpha": 1.0}),
    ):
        tuned, mixed = scenes.tune(found, **changed)
        verdicts[name] = scenes.draw(tuned, alternating(tuned, mixed))
    return verdicts


def table(model: Any, count: int) -> dict[str, Rates]:
    rows: dict[str, list[Verdict]] = {}
    for first in range(0, count, BATCH):
        trials = [two_part(index) for index in range(first, min(first + BATCH, count))]
        for name, verdicts in variants(Scenes(model, trials, first)).items():
            rows.setdefault(name, []).extend(verdicts)
    return {name: Rates(name, tuple(verdicts)) for name, verdicts in rows.items()}


def points(name: str, gain: float, wanted: float) -> Claim:
    text = f"{100 * gain:+.1f} points, wanted {100 * wanted:+.0f} or more"
    return Claim(name, gain, text, gain >= wanted)


def hurts(name: str, whole: Rates, without: Rates, part: str) -> Claim:
    """Without a loss, the part of the image that it protects must suffer.

    Args:
        name: of the claim.
        whole, without: rates with all losses, and without one.
        part: "colour", "shape" or "background".

    Returns: one claim.
    """
    gain = whole.share(part) - without.share(part)
    text = f"{part} right in {without.share(part):.1%} instead of {whole.share(part):.1%}"
    return Claim(name, gain, text, gain > 0)


def claims(rows: dict[str, Rates]) -> list[Claim]:
    full = rows[FULL]
    return [
        points("iterative guidance", full.share() - rows[MIX].share(), 0.10),
        points("alpha 0.7 over alpha 0", full.share() - rows[ALPHA_0].share(), 0.0),
        points("alpha 0.7 over alpha 1", full.share() - rows[ALPHA_1].share(), 0.0),
        hurts("without L_obj the object suffers", full, rows[NO_OBJECT], "shape"),
        hurts("without L_bg the background suffers", full, rows[NO_BACKGROUND], "background"),
    ]


def gradient_claim(model: Any) -> Claim:
    """Stage 1 asks for no gradient of a weight, even of a network whose weights would take one."""
    scenes = Scenes(model, [two_part(0)], 0)
    scenes.denoiser.unet.requires_grad_(True)
    try:
        scenes.embed(replace(EMBEDDINGS, steps=1))
        weights = list(scenes.denoiser.unet.parameters())
        count = sum(weight.grad is not None for weight in weights)
    finally:
        scenes.denoiser.unet.requires_grad_(False)
    return Claim("weight gradients in stage 1", count, f"{count} of {len(weights)} weights, wanted 0", count == 0)


def main(count: int = 32) -> bool:
    """Everything, printed; True if every claim holds."""
    from ...hosts.diffusers.loading import load_bundled

    model = load_bundled()
    rows = table(model, count)
    heads = "".join(f"{part:>12}" for part in ("colour", "shape", "background"))
    print(f"{f'{count} two-part edits, {DRAWS} images each':<38}{'all':>9}  {'95 % interval':<15}{heads}")
    for row in rows.values():
        print(row.line())
    return print_claims([*claims(rows), gradient_claim(model)])
