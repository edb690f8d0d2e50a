"""The acceptance measures, one function each: what the shipped files can do on held-out scenes, checked by the oracle.

Held-out scenes come from their own stream (`scenes.scene_rng`); those of the acceptance start at `FIRST` and never meet
the tuning scenes, which are counted from 0.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hosts.bundled import oracle
from ..hosts.bundled.scenes import Scene, render, sample_scene, scene_rng
from ..pipelines.core.guidance import guided
from ..pipelines.core.protocols import Context, Denoiser, LatentCodec, Ranker, TextEncoder
from ..pipelines.core.sigmas import euler_step
from ..pipelines.evaluation.metrics import psnr, wilson_interval
from ..pipelines.inversion.ddim import InversionOptions, invert
from .pairs import Caption, full_caption, one_word_changes, spoil, window
from .ranker import eight_captions

FIRST = 1_000_000  # of the acceptance scenes in the held-out stream
BATCH = 32


@dataclass(frozen=True)
class Row:
    """One line of the table. `low` and `high` bound the value (95 %); `floor` is what it must reach, if anything."""

    name: str
    value: float
    unit: str
    n: int
    low: float
    high: float
    floor: float | None
    seconds: float

    @property
    def passed(self) -> bool | None:
        return None if self.floor is None else self.value >= self.floor

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def share_row(name: str, hits: Iterable[bool], floor: float | None, begun: float) -> Row:
    """A share with Wilson's interval."""
    values = list(hits)
    low, high = wilson_interval(sum(values), len(values))
    return Row(name, sum(values) / len(values), "share", len(values), low, high, floor, time.monotonic() - begun)


def mean_row(name: str, values: Tensor, floor: float | None, begun: float) -> Row:
    """A mean in dB with its normal interval."""
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return Row(name, mean, "dB", len(values), mean - half, mean + half, floor, time.monotonic() - begun)


def held_out(count: int, objects: int | None, part: int) -> list[Scene]:
    """`count` acceptance scenes of measure number `part` (each measure has scenes of its own)."""
    return [sample_scene(scene_rng(FIRST + part * 10_000 + i, held_out=True), objects) for i in range(count)]


def images_of(scenes: Sequence[Scene], size: int) -> Tensor:
    """[N, size, size, 3] in [0, 1]."""
    return torch.from_numpy(np.stack([render(scene, size) for scene in scenes]))


def batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def agreeing(images: Tensor, scenes: Sequence[Scene]) -> list[bool]:
    return [oracle.read(image.numpy()).agrees(scene) for image, scene in zip(images.cpu(), scenes, strict=True)]


# ------------------------------------------------------------------------------------------------------ measures
def oracle_on_renders(count: int, size: int) -> Row:
    begun = time.monotonic()
    scenes = held_out(count, None, 0)
    return share_row("oracle reads clean renders", agreeing(images_of(scenes, size), scenes), 0.99, begun)


def autoencoder(codec: LatentCodec, count: int, size: int) -> tuple[Row, Row]:
    """PSNR of the reconstruction, and whether the oracle still reads it."""
    begun = time.monotonic()
    scenes = held_out(count, None, 1)
    true = images_of(scenes, size)
    made = torch.cat([codec.decode(codec.encode(part)).cpu() for part in true.split(BATCH)])
    quality = mean_row("autoencoder PSNR", psnr(made, true), 32.0, begun)
    begun = time.monotonic()
    return quality, share_row("oracle reads reconstructions", agreeing(made, scenes), 0.98, begun)


def encode_all(text: TextEncoder, prompts: Sequence[str]) -> Context:
    """One context with a row per prompt."""
    encoded = [text.encode(prompt) for prompt in prompts]
    pooled = [context.pooled for context in encoded if context.pooled is not None]
    return Context(torch.cat([context.tokens for context in encoded]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def sample(denoiser: Denoiser, contexts: tuple[Context, Context], noise: Tensor, *, steps: int, scale: float) -> Tensor:
    """DDIM, for flow models Euler, from unit noise [B, C, h, w] to model-scaled latents."""
    sigmas = denoiser.schedule(steps).tolist()
    z = noise.to(denoiser.device) * (1.0 if denoiser.flow else math.sqrt(1 + sigmas[0] ** 2))
    for sigma, target in itertools.pairwise(sigmas):
        z = euler_step(z, guided(denoiser, z, sigma, *contexts, scale), sigma, target)
    return z


def prompts_drawn(model: Any, objects: int, count: int, size: int) -> Row:
    """Everything that the prompt says is in the image: background, pattern, number, colours, shapes, order."""
    begun = time.monotonic()
    scenes, hits = held_out(count, objects, 1 + objects), []
    generator = torch.Generator().manual_seed(FIRST + objects)
    side = size // model.codec.factor
    for part in batches(scenes):
        contexts = encode_all(model.text, [scene.caption for scene in part]), model.text.encode("")
        noise = torch.randn((len(part), model.codec.channels, side, side), generator=generator)
        z = sample(model.denoiser, contexts, noise, steps=25, scale=4.0)
        hits += agreeing(model.codec.decode(model.denoiser.scale_out(z)), part)
    name = {1: "one-object prompts fully right", 2: "two-object prompts fully right"}[objects]
    floors = {1: 0.95, 2: 0.80} if model.denoiser.flow else {1: 0.97, 2: 0.85}
    return share_row(f"flow, {name}" if model.denoiser.flow else name, hits, floors[objects], begun)


@torch.no_grad()
def there_and_back(denoiser: Any, z0: Tensor, context: Context, steps: int) -> Tensor:
    """DDIM inversion (predictions at the next sigma, as in null-text inversion) and sampling, guidance 1.

    `z0` counts as a latent at the smallest training sigma, as in the published code (`set_alpha_to_one` false).
    """
    sigmas = [float(denoiser.table[0]), *reversed(denoiser.schedule(steps).tolist()[:-1])]
    z = z0 * math.sqrt(1 + sigmas[0] ** 2)
    for low, high in itertools.pairwise(sigmas):
        scaled = z * math.sqrt((1 + high**2) / (1 + low**2))
        eps = (scaled - denoiser.denoise(scaled, high, [context])[0]) / high
        z = z + (high - low) * eps
    for high, low in zip(sigmas[:0:-1], sigmas[-2::-1], strict=True):
        z = euler_step(z, denoiser.denoise(z, high, [context])[0], high, low)
    return z / math.sqrt(1 + sigmas[0] ** 2)


def round_trip(model: Any, count: int, size: int) -> Row:
    """50 DDIM steps up and down against the autoencoder's reconstruction."""
    begun = time.monotonic()
    values = []
    for part in batches(held_out(count, None, 4)):
        latents = model.codec.encode(images_of(part, size))
        context = encode_all(model.text, [scene.caption for scene in part])
        back = there_and_back(model.denoiser, model.denoiser.scale_in(latents), context, 50)
        made, true = model.codec.decode(model.denoiser.scale_out(back)), model.codec.decode(latents)
        values.append(psnr(made, true).cpu())
    return mean_row("DDIM round trip, 50 steps", torch.cat(values), 40.0, begun)


def flow_round_trip(model: Any, count: int, size: int) -> Row:
    """Implicit inversion and Euler sampling in 25 steps at guidance 1: how far the image is from the VAE's, in PSNR.

    The value is the PSNR of the round trip less that of the autoencoder, both against the true image.
    """
    begun = time.monotonic()
    values = []
    for part in batches(held_out(count, None, 4)):
        true = images_of(part, size)
        latents = model.codec.encode(true)
        context, sigmas = encode_all(model.text, [scene.caption for scene in part]), model.denoiser.schedule(25)
        options = InversionOptions("implicit", iterations=10)
        start = invert(model.denoiser, latents, context, sigmas, options=options).latents[-1]
        back = euler(model.denoiser, start.to(latents), sigmas.tolist(), context)
        made, plain = model.codec.decode(model.denoiser.scale_out(back)), model.codec.decode(latents)
        values.append((psnr(made, true) - psnr(plain, true)).cpu())
    return mean_row("flow, implicit round trip over the VAE's PSNR", torch.cat(values), -0.5, begun)


@torch.no_grad()
def euler(denoiser: Denoiser, z: Tensor, sigmas: Sequence[float], context: Context) -> Tensor:
    """Euler steps at guidance 1 from the latent z [B, C, h, w] at the first sigma to the last, model scale."""
    for sigma, target in itertools.pairwise(sigmas):
        z = euler_step(z, denoiser.denoise(z, sigma, [context])[0], sigma, target)
    return z


def caption_first(ranker: Ranker, count: int, size: int, *, hard: bool) -> Row:
    """Whether an image's own caption comes first of eight: seven of other scenes, or (`hard`) one word wrong."""
    begun = time.monotonic()
    scenes = held_out(count, None, 5)
    lists = [eight_captions(scene, np.random.default_rng([11, i]), hard=hard) for i, scene in enumerate(scenes)]
    name = "ranker, 8 captions, one word wrong in 7" if hard else "ranker, right one of 8 captions"
    return share_row(name, first_of(ranker, images_of(scenes, size), lists), None if hard else 0.97, begun)


def masked_object_first(ranker: Ranker, count: int, size: int) -> Row:
    """The same through a mask (black outside), captions naming the object only, one word wrong in seven."""
    begun = time.monotonic()
    lists, images = [], []
    for i, scene in enumerate(held_out(count, 1, 6)):
        rng = np.random.default_rng([12, i])
        objects = [changed.objects[0].words for changed in one_word_changes(scene)]
        wrong = sorted({words for words in objects if words != scene.objects[0].words})
        words = [scene.objects[0].words, *rng.permutation(wrong)[:7]]
        lists.append([Caption((str(word),), None).text for word in words])
        images.append(render(scene, size) * window(scene, 0, size, rng)[..., None])
    stack = torch.from_numpy(np.stack(images)).float()
    return share_row("ranker, masked object, one word wrong in 7", first_of(ranker, stack, lists), None, begun)


def good_before_spoilt(ranker: Ranker, count: int, size: int) -> Row:
    """Whether a masked good candidate scores above a masked spoilt one for the same caption.

    Spoilt images that the oracle still reads as the scene are left out.
    """
    begun = time.monotonic()
    hits: list[bool] = []
    for i, scene in enumerate(held_out(2 * count, 1, 7)):
        rng = np.random.default_rng([13, i])
        inside, spoilt = window(scene, 0, size, rng)[..., None], spoil(scene, size, rng)
        if len(hits) == count:
            break
        if not oracle.read(spoilt).agrees(scene):
            pair = torch.from_numpy(np.stack([render(scene, size) * inside, spoilt * inside])).float()
            good, bad = ranker.embed_images(pair) @ ranker.embed_texts([full_caption(scene).text])[0]
            hits.append(bool(good > bad))
    return share_row("ranker, good candidate above a spoilt one", hits, None, begun)


@torch.no_grad()
def first_of(ranker: Ranker, images: Tensor, captions: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each image [N, H, W, 3] scores highest with the first of its captions."""
    hits: list[bool] = []
    for start in range(0, len(images), BATCH):
        lists = captions[start : start + BATCH]
        texts = sorted({text for texts in lists for text in texts})
        vectors = dict(zip(texts, ranker.embed_texts(texts), strict=True))
        for vector, own in zip(ranker.embed_images(images[start : start + BATCH]), lists, strict=True):
            scores = torch.stack([vectors[text] for text in own]) @ vector
            hits.append(int(scores.argmax()) == 0)
    return hits


Measure = Callable[[], Row | tuple[Row, ...]]


def measures(model: Any, ranker: Ranker, flow: Any | None, *, size: int, quick: bool) -> Iterator[Row]:
    """Every row in turn, those of the flow model last, if there is one; `quick` takes an eighth of the scenes."""

    def n(count: int) -> int:
        return count // 8 if quick else count

    todo: list[Measure] = [
        lambda: oracle_on_renders(n(304), size),
        lambda: autoencoder(model.codec, n(64), size),
        lambda: caption_first(ranker, n(256), size, hard=False),
        lambda: caption_first(ranker, n(256), size, hard=True),
        lambda: masked_object_first(ranker, n(256), size),
        lambda: good_before_spoilt(ranker, n(256), size),
        lambda: round_trip(model, n(64), size),
        lambda: prompts_drawn(model, 1, n(256), size),
        lambda: prompts_drawn(model, 2, n(128), size),
    ]
    if flow is not None:
        todo += [
            lambda: flow_round_trip(flow, n(64), size),
            lambda: prompts_drawn(flow, 1, n(256), size),
            lambda: prompts_drawn(flow, 2, n(128), size),
        ]
    for measure in todo:
        rows = measure()
        yield from rows if isinstance(rows, tuple) else (rows,)
