"""Stage `vae`: an 8x autoencoder for the scenes, then latents folded to zero mean and unit deviation.

Architecture: diffusers' AutoencoderKL with four resolutions (so that the factor is 8, as everywhere in the SD family) and
4 norm groups: few channels with many groups would be instance normalisation, which forgets flat colour.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..hosts.bundled.scenes import render, sample_scene, scene_rng
from .loop import Trainer, cosine_lr, run_steps, step_generator

log = logging.getLogger("editkit.training")

SCALING_FACTOR = 0.18215  # SD 1.x's, so that native hosts need no special latent format
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32, 64, 96),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "sample_size": 96,
    "scaling_factor": SCALING_FACTOR,
}


def build() -> AutoencoderKL:
    return AutoencoderKL(**CONFIG)


def initialise(vae: AutoencoderKL, seed: int) -> None:
    """Start near the identity: residual branches small, resampling convolutions near a centre tap.

    A default start stays on a 15 dB plateau for hundreds of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            continue
        weight = module.weight
        fan_in = weight[0].numel()
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (1.6 / fan_in) ** 0.5)
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.05)
            if name.endswith(("conv2", "to_out.0")):
                weight.mul_(0.1)
            if "samplers" in name:
                weight.mul_(0.1)
                centre = weight[..., 1, 1]
                centre.add_(torch.eye(*centre.shape))
            if name == "quant_conv" and module.bias is not None:
                module.bias[4:].fill_(-6.0)  # log-variance: begin almost deterministic


def batch_of_step(step: int, size: int, crop: int, count: int) -> Tensor:
    """`count` crops [count, 3, crop, crop] in [-1, 1], of scenes that only this step sees."""
    images = np.empty((count, crop, crop, 3), np.float32)
    for i in range(count):
        rng = scene_rng(step * 64 + i)
        image = render(sample_scene(rng), size)
        x, y = rng.integers(0, size - crop + 1, size=2)
        images[i] = image[y : y + crop, x : x + crop]
    return torch.from_numpy(images).movedim(-1, 1) * 2 - 1


def reconstruction_loss(made: Tensor, true: Tensor, mse: float) -> Tensor:
    """L1 + `mse` x MSE + half the L1 of the image gradients (edges are what an 8x VAE loses)."""
    difference = made - true
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + mse * difference.square().mean() + 0.5 * edges


def train(
    folder: Path, steps: int, *, seed: int = 0, lr: float = 1.2e-3, size: int = 96, autocast: bool = True
) -> AutoencoderKL:
    """Train to `steps` (resuming), adopt the EMA, fold the latents and save `folder`/vae in diffusers layout."""
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)
    initialise(vae, seed)
    trainer = Trainer(dict(vae.named_parameters()), lr, ema=0.995, weight_decay=0.0)
    checkpoint = folder / "vae_train.safetensors"
    trainer.resume(checkpoint)

    def loss_of_step(step: int) -> Tensor:
        early = step < 0.35 * steps
        crop, count = (48, 24) if early else (size, 8)
        true = batch_of_step(step, size, crop, count)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            posterior = vae.encode(true).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=step_generator(seed, step))
            made = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = reconstruction_loss(made.float(), true, 1.0 if early else 4.0)
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return loss + 2e-4 * kl

    for step in run_steps(
        trainer, steps, loss_of_step, checkpoint=checkpoint, lr=lambda s: cosine_lr(s, steps, hold=0.3)
    ):
        if step % 500 == 0:
            log.info("vae PSNR on 16 held-out scenes: %.2f dB (live weights)", psnr(vae, 16, size))
    trainer.adopt_ema()
    fold(vae, size)
    vae.save_pretrained(folder / "vae")
    log.info("vae PSNR on 64 held-out scenes: %.2f dB", psnr(vae, 64, size))
    return vae


def held_out_images(count: int, size: int, first: int = 0) -> Tensor:
    """`count` held-out scenes [count, 3, size, size] in [-1, 1]."""
    images = [render(sample_scene(scene_rng(first + i, held_out=True)), size) for i in range(count)]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1) * 2 - 1


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int, size: int) -> float:
    """Mean PSNR in dB of the reconstructions of held-out scenes, on images in [0, 1]."""
    true = held_out_images(count, size)
    made = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in true.split(16)])
    error = ((made - true) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def fold(vae: AutoencoderKL, size: int, count: int = 256) -> None:
    """Make scaled latents zero-mean and unit-deviation per channel, exactly, inside the two 1x1 convolutions.

    With raw latent z, statistics m and s, and the scaling factor f: z' = (z - m) / (s f), and the decoder undoes it.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    images = [render(sample_scene(scene_rng(10_000_000 + i)), size) for i in range(count)]
    true = torch.from_numpy(np.stack(images)).movedim(-1, 1) * 2 - 1
    before = vae.decode(vae.encode(true[:4]).latent_dist.mean).sample
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in true.split(16)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    scale = 1 / (deviation * SCALING_FACTOR)
    channels = len(mean)
    quant.weight[:channels].mul_(scale[:, None, None, None])
    quant.bias[:channels].sub_(mean).mul_(scale)
    quant.bias[channels:].add_(2 * scale.log())
    post.bias.add_(post.weight[..., 0, 0] @ mean)
    post.weight.div_(scale[None, :, None, None])
    after = vae.decode(vae.encode(true[:4]).latent_dist.mean).sample
    log.info("fold: deviations %s, decode changed by %.1e", deviation.tolist(), (after - before).abs().max())
