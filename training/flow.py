"""Stage `flow`: the flow transformer, over the shipped autoencoder and text encoder, which stay as they are.

Rectified flow in SD3's layout (Esser et al. 2024): x_sigma = (1 - sigma) x0 + sigma noise, the network predicts the
velocity noise - x0. Sigmas are logit-normal and then shifted (section 3.1, equation 23), one from each of `batch` equal
parts of the distribution; 10 % of the captions are dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ..hosts.bundled import FLOW_TEXT_LENGTH, tiny_folder
from .loop import Trainer, cosine_lr, run_steps, step_generator
from .text import WIDTH, CompactTextModel, pad_ids
from .unet import PAIRS_FROM, load_latents, scenes_of_step

log = logging.getLogger("editkit.training")

SHIFT = 2.0  # 36 image tokens tell colours and shapes apart only at high noise, so more of the run belongs there
POSITIONS = 24  # patches a side that have a position; an image takes those in the middle
FASTEST, SLOWEST = 1.5, 0.1  # radians per patch
HEAD = 64  # channels of an attention head: ComfyUI's SD3 knows no other
CONFIG = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": HEAD,
    "caption_projection_dim": 3 * HEAD,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": POSITIONS,
    "qk_norm": "rms_norm",
}


def positions(side: int, width: int) -> Tensor:
    """Sinusoids of a patch's row and column, [1, side x side, width], from FASTEST to SLOWEST radians per patch.

    SD3's own table is made for 64 patches a side: over 6 patches its sinusoids hardly move. The table is part of the
    weights, so both hosts read this one.
    """
    quarter = width // 4
    rates = FASTEST * (SLOWEST / FASTEST) ** (torch.arange(quarter) / (quarter - 1))
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def build() -> SD3Transformer2DModel:
    """A new transformer: every block begins as the identity (adaLN-Zero, Peebles and Xie 2023, section 3.2)."""
    model = SD3Transformer2DModel(**CONFIG)
    model.pos_embed.pos_embed.copy_(positions(POSITIONS, model.inner_dim))
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(part.weight)
        if isinstance(part, nn.Linear) and name.startswith("time_text_embed"):
            nn.init.normal_(part.weight, std=0.02)
    return model


@torch.inference_mode()
def encode_captions(captions: list[str]) -> tuple[Tensor, Tensor]:
    """The shipped text encoder's tokens [N, FLOW_TEXT_LENGTH, WIDTH] and pooled vectors [N, WIDTH]."""
    text = CompactTextModel().eval()
    prefix = "" if any(key.startswith("embeddings") for key in text.model.state_dict()) else "text_model."
    stored = load_file(tiny_folder() / "text_encoder" / "model.safetensors")
    text.model.load_state_dict({prefix + key.removeprefix("text_model."): row.float() for key, row in stored.items()})
    tokens, pooled = [], []
    for ids in pad_ids(captions)[:, :FLOW_TEXT_LENGTH].split(256):
        made = text.model(text.row_of_id[ids])
        tokens.append(made.last_hidden_state)
        pooled.append(made.pooler_output)
    return torch.cat(tokens), torch.cat(pooled)


def shifted(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def stratified_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """[count] shifted logit-normal sigmas in (0, 1), one from each of `count` equal parts, shuffled."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)).float()
    return shifted(torch.sigmoid(normal))[torch.randperm(count, generator=generator)]


def velocity_loss(
    model: SD3Transformer2DModel,
    latents: Tensor,
    captions: list[str],
    *,
    seed: int,
    steps: int,
    batch: int,
) -> Callable[[int], Tensor]:
    """The loss as a function of the step alone: which scenes, sigmas, noises and dropped captions it sees.

    Args:
        model: the transformer.
        latents: scaled latents [N, 4, h, w].
        captions: N captions.
        seed: of the draws.
        steps: length of the whole run; two-object scenes are drawn more often after PAIRS_FROM of it.
        batch: scenes a step.

    Returns: a function of the step, giving the mean squared error of the velocity.

    Raises: nothing.

    Source: Esser et al. 2024, section 3.1, equation 14 without further weights.
    """
    device = next(model.parameters()).device
    latents = latents.to(device)
    unique = sorted({*captions, ""})
    row = {caption: i for i, caption in enumerate(unique)}
    rows = torch.tensor([row[caption] for caption in captions])
    tokens, pooled = (value.to(device) for value in encode_captions(unique))
    pairs = torch.tensor([i for i, caption in enumerate(captions) if " left of " in caption])

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        index = scenes_of_step(len(captions), pairs if step >= PAIRS_FROM * steps else pairs[:0], batch, generator)
        sigma = stratified_sigmas(batch, generator).to(device)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(device)
        drop = torch.rand(batch, generator=generator) < 0.1
        words = torch.where(drop, row[""], rows[index]).to(device)
        x0, weight = latents[index.to(device)], sigma[:, None, None, None]
        velocity = model(
            hidden_states=(1 - weight) * x0 + weight * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=tokens[words],
            pooled_projections=pooled[words],
        ).sample
        return F.mse_loss(velocity, noise - x0)

    return loss_of_step


def train(
    folder: Path,
    steps: int,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    batch: int = 16,
    device: str = "cpu",
    on_step: Callable[[int, Trainer], None] | None = None,
    on_step_every: int = 1000,
) -> None:
    """Train to `steps` (resuming) and save folder/transformer from the EMA.

    Args:
        folder: work folder; holds latents.safetensors and the checkpoint.
        steps: optimiser steps in all, at least 1; the learning rate's course depends on it.
        seed: of the initial weights and of the draws.
        lr: peak learning rate of AdamW.
        batch: scenes a step.
        device: torch device.
        on_step: called with the step and the trainer.
        on_step_every: how often, in steps.

    Returns: nothing; the files are written.

    Raises: FileNotFoundError without latents.safetensors.

    Source: Esser et al. 2024, sections 3 and 5.
    """
    torch.manual_seed(seed)
    model = build().to(device)
    trainer = Trainer(dict(model.named_parameters()), lr, ema=0.9995)
    checkpoint = folder / "flow_train.safetensors"
    trainer.resume(checkpoint)
    loss_of_step = velocity_loss(model, *load_latents(folder), seed=seed + 2, steps=steps, batch=batch)
    for step in run_steps(
        trainer,
        steps,
        loss_of_step,
        checkpoint=checkpoint,
        lr=lambda s: cosine_lr(s, steps, warmup=400, hold=0.3),
        save_every=1000,
        log_every=200,
    ):
        if on_step and step % on_step_every == 0:
            on_step(step, trainer)
    trainer.adopt_ema()
    model.save_pretrained(folder / "transformer")
