"""Stage `ranker`: a small CLIP in open_clip's own format, trained on true and false captions of rendered images.

The image tower is open_clip's ModifiedResNet (convolutions learn shapes from far fewer images than patches do), the
text tower its causal transformer on CLIP's ids. Only the embedding rows of the grammar are trained and stored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..hosts.bundled.scenes import Scene, sample_scene, scene_rng
from .loop import Trainer, cosine_lr, run_steps, step_generator, write_json
from .pairs import View, captions_of_step, full_caption, one_word_changes, paint, relations, views_of_step
from .text import BOS, EOS, LENGTH, VOCABULARY, encode_ids, grammar_ids

log = logging.getLogger("editkit.training")

SIZE = 96
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "custom_text": True,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 10, "head_width": 40, "image_size": SIZE},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 64, "heads": 4, "layers": 2},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as loaders expect
PREPROCESS = {"size": [SIZE, SIZE], "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
FIRST_SCENE = 40_000_000  # of this stage's scenes in the training stream
TRAINED_LENGTH = 24  # tokens: the longest caption has 17, and the text attention is causal


def build() -> Any:
    """The model as it is trained: one embedding row per id of the grammar, `TRAINED_LENGTH` positions."""
    from open_clip.model import CustomTextCLIP

    config = {key: value for key, value in MODEL_CONFIG.items() if key != "custom_text"}
    text = {**config["text_cfg"], "vocab_size": len(grammar_ids()), "context_length": TRAINED_LENGTH}
    return CustomTextCLIP(**{**config, "text_cfg": text})


@cache
def _rows() -> dict[int, int]:
    return {token: row for row, token in enumerate(grammar_ids())}


def compact_ids(texts: Sequence[str]) -> Tensor:
    """Rows of the compact embedding, [N, TRAINED_LENGTH].

    Rows ascend with the ids, so the end token stays the largest, which is how open_clip finds it.
    """
    rows = [[_rows()[token] for token in (BOS, *encode_ids(text), EOS)] for text in texts]
    return torch.tensor([row + [0] * (TRAINED_LENGTH - len(row)) for row in rows])


def normalise(images: Tensor) -> Tensor:
    """[B, 3, S, S] in [0, 1] as the image tower wants it."""
    mean, std = (torch.tensor(value)[:, None, None].to(images) for value in (MEAN, STD))
    return (images - mean) / std


def augment(views: Sequence[View], generator: torch.Generator) -> Tensor:
    """Images [B, 3, S, S] in [0, 1]: blur, exposure and noise as a decoder leaves them, then the black outside."""
    stored = torch.from_numpy(np.stack([view.image for view in views])).movedim(-1, 1)
    inside, images = (stored >= 0).all(dim=1, keepdim=True), stored.clamp(min=0)
    parts = [_blur(part, float(torch.rand((), generator=generator)) * 2.0) for part in images.split(16)]
    shape = (len(views), 1, 1, 1)
    gain = 1 + 0.05 * torch.randn(shape, generator=generator)
    strength = 0.06 * torch.rand(shape, generator=generator) ** 2
    noisy = torch.cat(parts) * gain + strength * torch.randn(stored.shape, generator=generator)
    flat = 0.03 * torch.randn((len(views), 3, 1, 1), generator=generator)
    return (noisy + flat).clamp(0, 1) * inside


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with standard deviation `sigma` pixels; below a third of a pixel nothing happens."""
    if sigma < 0.33:
        return images
    offsets = torch.arange(-5, 6, dtype=torch.float32)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    channels = images.shape[1]
    padded = F.pad(images, (5, 5, 5, 5), mode="replicate")
    padded = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def contrast(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over true pairs of -log p(pair | the false pairs of its row, and of its column).

    `truth` holds 1, -1 and 0 as `pairs.relation`; several captions can be true of one image, and true ones never
    compete with each other.
    """
    false = logits.masked_fill(truth >= 0, -1e4)
    rows = F.softplus(false.logsumexp(1, keepdim=True) - logits)
    columns = F.softplus(false.logsumexp(0, keepdim=True) - logits)
    true = truth > 0
    return 0.5 * (rows + columns)[true].mean()


def train(
    folder: Path, steps: int, *, seed: int = 0, lr: float = 2e-3, batch: int = 64, observe_every: int = 500
) -> None:
    """Train to `steps` (resuming), adopt the EMA, measure batch statistics anew and save folder/ranker."""
    torch.manual_seed(seed)
    model = build()
    trainer = Trainer(dict(model.named_parameters()), lr, ema=0.997)
    checkpoint = folder / "ranker_train.safetensors"
    trainer.resume(checkpoint)

    def loss_of_step(step: int) -> Tensor:
        images, texts, truth = batch_of_step(seed, step, batch)
        images, words = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
        scale = model.logit_scale.clamp(max=float(np.log(100))).exp()
        return contrast(scale * images @ words.T, truth)

    def rate(step: int) -> float:
        return cosine_lr(step, steps, hold=0.3)

    for step in run_steps(trainer, steps, loss_of_step, checkpoint=checkpoint, lr=rate):
        if step % observe_every == 0:
            log.info("ranker on 128 tuning scenes: %s", tuning_accuracy(model))
    trainer.adopt_ema()
    settle_statistics(model, seed, steps)
    save(model, folder / "ranker")
    log.info("ranker at the end, on 128 tuning scenes: %s", tuning_accuracy(model))


def batch_of_step(seed: int, step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images [count, 3, S, S], caption rows [M, L] and their relations [count, M], of one step."""
    rng = scene_rng(FIRST_SCENE + seed * 1_000_000 + step)
    views = views_of_step(rng, count, SIZE)
    captions = captions_of_step(views, rng)
    images = normalise(augment(views, step_generator(seed, step)))
    return images, compact_ids([caption.text for caption in captions]), torch.from_numpy(relations(views, captions))


@torch.no_grad()
def settle_statistics(model: Any, seed: int, steps: int, batches: int = 20) -> None:
    """Means and variances of every batch normalisation, averaged over `batches` fresh training batches.

    The running ones belong to the live weights of the last steps, not to their average.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    for step in range(steps, steps + batches):
        model.encode_image(batch_of_step(seed, step, 64)[0])
    model.eval()


def save(model: Any, folder: Path) -> None:
    """open_clip_config.json, token_ids.json and open_clip_model.safetensors (float16, compact embedding rows).

    Positions that no caption reaches are zero.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half() for name, value in model.state_dict().items() if value.is_floating_point()}
    positions = "text.positional_embedding"
    state[positions] = F.pad(state[positions], (0, 0, 0, LENGTH - TRAINED_LENGTH))
    contiguous = {name: value.contiguous() for name, value in state.items()}
    save_file(contiguous, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "open_clip_config.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS})
    write_json(folder / "token_ids.json", grammar_ids())


# ---------------------------------------------------------------------------------------------------- evaluation
def eight_captions(scene: Scene, rng: np.random.Generator, *, hard: bool) -> list[str]:
    """The caption of `scene` first, then seven others: of random scenes, or (`hard`) with one word changed."""
    true = full_caption(scene).text
    if hard:
        changes = one_word_changes(scene)
        return [true, *(changes[i].caption for i in rng.permutation(len(changes))[:7])]
    others: dict[str, None] = {}
    while len(others) < 7:
        other = sample_scene(rng).caption
        if other != true:
            others[other] = None
    return [true, *others]


@torch.no_grad()
def tuning_accuracy(model: Any, count: int = 128) -> dict[str, float]:
    """Share of held-out tuning scenes whose own caption comes first of eight, random and one-word-changed."""
    scenes = [sample_scene(scene_rng(i, held_out=True)) for i in range(count)]
    training = model.training
    model.eval()
    images = torch.from_numpy(np.stack([paint(scene, SIZE) for scene in scenes])).movedim(-1, 1)
    images = model.encode_image(normalise(images), normalize=True)
    result = {}
    for name, hard in (("random", False), ("one word", True)):
        lists = [eight_captions(scene, np.random.default_rng([5, i]), hard=hard) for i, scene in enumerate(scenes)]
        words = model.encode_text(compact_ids([text for texts in lists for text in texts]), normalize=True)
        scores = torch.einsum("bd,bkd->bk", images, words.view(count, 8, -1))
        result[name] = float((scores.argmax(1) == 0).float().mean())
    model.train(training)
    return result
