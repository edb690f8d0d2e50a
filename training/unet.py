"""Stages `latents` and `unet`: cache the scenes' latents, then train the U-Net and the text encoder together.

eps prediction on SD's schedule (scaled linear, 1000 steps), min-SNR-5 weights, stratified timesteps, 10 % caption drop.
Attention (self and cross) sits at half and quarter resolution, and at full resolution in the up blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hosts.bundled.scenes import render, sample_scene, scene_rng
from .loop import Trainer, cosine_lr, run_steps, step_generator
from .text import WIDTH, CompactTextModel, pad_ids
from .vae import SCALING_FACTOR

log = logging.getLogger("editkit.training")

CONFIG = {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SHARES = (0.04, 0.60, 0.36)  # of scenes with no, one and two objects
PAIRS_FROM, PAIRS_SHARE = 0.55, 0.6  # single objects are learned by then; binding each colour to its shape takes longer


def alphas_cumprod() -> Tensor:
    """SD's noise schedule, [1000] float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@torch.inference_mode()
def cache_latents(folder: Path, count: int, *, size: int = 96, autocast: bool = False) -> None:
    """Encode `count` training scenes to folder/latents.safetensors: scaled posterior means [count, 4, h, w]."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    rng = np.random.default_rng(7)
    objects = rng.choice(3, size=count, p=SHARES)
    latents, captions = [], []
    for start in range(0, count, 64):
        scenes = [
            sample_scene(scene_rng(20_000_000 + i), int(objects[i])) for i in range(start, min(count, start + 64))
        ]
        images = np.stack([render(scene, size) for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean = vae.encode(torch.from_numpy(images).movedim(-1, 1) * 2 - 1).latent_dist.mean
        latents.append(mean.float() * SCALING_FACTOR)
        captions += [scene.caption for scene in scenes]
    tensors = {"latents": torch.cat(latents).contiguous()}
    save_file(tensors, folder / "latents.safetensors", metadata={"captions": "\n".join(captions)})


def load_latents(folder: Path) -> tuple[Tensor, list[str]]:
    path = folder / "latents.safetensors"
    with safe_open(path, "pt") as file:
        captions = file.metadata()["captions"].split("\n")
    return load_file(path)["latents"], captions


def build() -> tuple[UNet2DConditionModel, CompactTextModel]:
    return UNet2DConditionModel(**CONFIG), CompactTextModel()


def named_parameters(unet: torch.nn.Module, text: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    named = {f"unet.{name}": value for name, value in unet.named_parameters()}
    return named | {f"text.{name}": value for name, value in text.named_parameters()}


def scenes_of_step(count: int, pairs: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Numbers [batch] of the scenes that a step learns from, a share of them (PAIRS_SHARE) from `pairs`, if there are any.

    Args:
        count: of all scenes.
        pairs: numbers of scenes with two objects, [P].
        batch: scenes a step.
        generator: of the draw.
    Returns: [batch], int64.
    Raises: nothing.
    Source: this repository; single objects are learned first, and binding each colour to its shape takes longer.
    """
    index = torch.randint(count, (batch,), generator=generator)
    if len(pairs):
        many = round(PAIRS_SHARE * batch)
        index[:many] = pairs[torch.randint(len(pairs), (many,), generator=generator)]
    return index


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of 0..999, shuffled."""
    t = ((torch.arange(count) + torch.rand(count, generator=generator)) * 1000 / count).long().clamp(0, 999)
    return t[torch.randperm(count, generator=generator)]


def denoising_loss(
    unet: UNet2DConditionModel,
    text: CompactTextModel,
    latents: Tensor,
    captions: list[str],
    *,
    seed: int,
    steps: int,
    batch: int,
) -> Callable[[int], Tensor]:
    """The loss as a function of the step alone: which scenes, timesteps, noises and dropped captions it sees."""
    device = next(unet.parameters()).device
    latents, abar = latents.to(device), alphas_cumprod().to(device)
    ids = pad_ids([*captions, ""]).to(device)
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) / snr
    pairs = torch.tensor([i for i, caption in enumerate(captions) if " left of " in caption])

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        index = scenes_of_step(len(captions), pairs if step >= PAIRS_FROM * steps else pairs[:0], batch, generator)
        t = stratified_timesteps(batch, generator).to(device)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator).to(device)
        drop = torch.rand(batch, generator=generator) < 0.1
        signal = abar[t][:, None, None, None]
        noised = signal.sqrt() * latents[index.to(device)] + (1 - signal).sqrt() * noise
        context = text(ids[torch.where(drop, len(captions), index).to(device)])
        eps = unet(noised, t, context).sample
        error = F.mse_loss(eps, noise, reduction="none").mean(dim=(1, 2, 3))
        return (error * weight[t]).mean()

    return loss_of_step


def train(
    folder: Path,
    steps: int,
    *,
    seed: int = 0,
    lr: float = 1.5e-3,
    batch: int = 64,
    device: str = "cpu",
    on_step: Callable[[int, Trainer], None] | None = None,
    on_step_every: int = 1000,
) -> None:
    """Train to `steps` (resuming) and save folder/unet and folder/text_encoder.safetensors from the EMA."""
    torch.manual_seed(seed)
    unet, text = build()
    unet.to(device), text.to(device)
    trainer = Trainer(named_parameters(unet, text), lr, ema=0.9985)
    checkpoint = folder / "unet_train.safetensors"
    trainer.resume(checkpoint)
    loss_of_step = denoising_loss(unet, text, *load_latents(folder), seed=seed + 1, steps=steps, batch=batch)
    for step in run_steps(
        trainer, steps, loss_of_step, checkpoint=checkpoint, lr=lambda s: cosine_lr(s, steps, hold=0.3)
    ):
        if on_step and step % on_step_every == 0:
            on_step(step, trainer)
    trainer.adopt_ema()
    unet.save_pretrained(folder / "unet")
    save_file(
        {name: value.contiguous() for name, value in text.model.state_dict().items()},
        folder / "text_encoder.safetensors",
    )
