"""U-Nets with the block structure of every family whose attention is controlled, narrow enough for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from editkit.hosts.diffusers.denoiser import DiffusersDenoiser
from editkit.hosts.diffusers.schedules import sigma_table
from editkit.pipelines.core.protocols import Context
from editkit.tests.parity.tiny import SCHEDULER, randomise
from editkit.tests.toys import random_latent

SHARPER = {"to_q": 4.0, "to_k": 4.0, "to_v": 2.0, "to_out.0": 2.0}
D, C, U = "DownBlock2D", "CrossAttnDownBlock2D", ("UpBlock2D", "CrossAttnUpBlock2D")
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {"down_block_types": (C, C, C, D), "up_block_types": (U[0], U[1], U[1], U[1]), "layers_per_block": 2},
    "sd2": {
        "down_block_types": (C, C, C, D), "up_block_types": (U[0], U[1], U[1], U[1]), "layers_per_block": 2,
        "use_linear_projection": True, "upcast_attention": True,
    },
    "sdxl": {
        "down_block_types": (D, C, C), "up_block_types": (U[1], U[1], U[0]), "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    },
    "bundled": {"down_block_types": (D, C, C), "up_block_types": (U[1], U[1], U[1]), "layers_per_block": 1},
}  # fmt: skip


def network(family: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    config = {**FAMILIES[family], **changes}
    levels = len(config["down_block_types"])
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,) * levels, cross_attention_dim=16,
        attention_head_dim=2, norm_num_groups=4, **config,
    )  # fmt: skip
    randomise(model, seed, std=0.15)
    with torch.no_grad():  # attention that is nearly the same everywhere would hide mistakes
        for name, value in model.named_parameters():
            value.mul_(SHARPER.get(".".join(name.split(".")[-3:-1]) if "to_out" in name else name.split(".")[-2], 1.0))
    return model


def denoiser(family: str = "bundled", seed: int = 0, **changes: Any) -> DiffusersDenoiser:
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    return DiffusersDenoiser(
        unet=network(family, seed, **changes), table=sigma_table(SCHEDULER), prediction=prediction, family=family,
        scaling_factor=0.18215, factor=8,
    )  # fmt: skip


def prompt(seed: int, family: str = "bundled", rows: int = 1, **fields) -> Context:
    """A prompt of 7 tokens, with what its family needs besides."""
    pooled = random_latent(rows, 12, seed=seed + 100) if family == "sdxl" else None
    return Context(random_latent(rows, 7, 16, seed=seed), pooled, **fields)
