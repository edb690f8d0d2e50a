"""Random networks of every supported layout, small enough to run in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.08) -> torch.nn.Module:
    """Give every tensor a size that matters: default starts have zero output layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * std + (1.0 if value.ndim == 1 else 0.0) * 0.5)
    return module.eval().requires_grad_(False)


def unet(width: int = 16, *, sdxl: bool = False, seed: int = 0) -> UNet2DConditionModel:
    extra = {}
    if sdxl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 12,
        }
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=8, **extra,
    )  # fmt: skip
    return randomise(model, seed)  # type: ignore[return-value]


def vae(seed: int = 1) -> AutoencoderKL:
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
        sample_size=32, scaling_factor=0.18215,
    )  # fmt: skip
    return randomise(model, seed)  # type: ignore[return-value]


SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def write_scheduler(folder: Path, **fields: object) -> None:
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **fields}))
