"""The shipped configurations of checkpoint files fit ComfyUI's full-size networks, name by name and shape by shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from editkit.hosts.diffusers.loading import single_file

SHAPE = {
    "sd1": {"levels": [1, 2, 4, 4], "depths": [1, 1, 1, 0], "middle": 1, "context_dim": 768, "num_heads": 8},
    "sd2": {"levels": [1, 2, 4, 4], "depths": [1, 1, 1, 0], "middle": 1, "context_dim": 1024, "num_head_channels": 64},
    "sdxl": {"levels": [1, 2, 4], "depths": [0, 2, 10], "middle": 10, "context_dim": 2048, "num_head_channels": 64},
}


def native_unet(family: str) -> Any:
    """ComfyUI's published U-Net, without memory."""
    shape = dict(SHAPE[family])
    levels, depths, middle = (shape.pop(key) for key in ("levels", "depths", "middle"))
    labels = {"num_classes": "sequential", "adm_in_channels": 2816} if family == "sdxl" else {"adm_in_channels": None}
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
        "channel_mult": levels, "num_res_blocks": [2] * len(levels), "transformer_depth_middle": middle,
        "transformer_depth": [depth for depth in depths for _ in range(2)], "legacy": False,
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "use_linear_in_transformer": family != "sd1", "num_heads": -1, "num_head_channels": -1,
    }  # fmt: skip
    operations = comfy.ops.disable_weight_init
    return UNetModel(**{**config, **shape, **labels}, device="meta", dtype=torch.float32, operations=operations)


def native_vae() -> Any:
    layout = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.device("meta"):
        return AutoencoderKL(ddconfig=layout, embed_dim=4)


@pytest.mark.parametrize("family", SHAPE)
def test_every_weight_of_the_published_networks_has_its_place(family) -> None:
    config = json.loads((single_file.CONFIGS / f"{family}.json").read_text())
    weights = {single_file.UNET + name: value for name, value in native_unet(family).state_dict().items()}
    weights |= {f"first_stage_model.{name}": value for name, value in native_vae().state_dict().items()}
    networks = {
        single_file.UNET: single_file._unet(Path("model"), config["unet"], weights, torch.float32),
        "first_stage_model.": single_file._vae(Path("model"), config["vae"], weights, torch.float32),
    }
    for prefix, network in networks.items():
        given = sum(value.numel() for name, value in weights.items() if name.startswith(prefix))
        assert given == sum(value.numel() for value in network.parameters()), prefix
