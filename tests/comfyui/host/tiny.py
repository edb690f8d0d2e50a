"""Random models of the bundled layout, as diffusers modules and as files; and conditions for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from editkit.training import unet as unet_stage
from editkit.training import vae as vae_stage
from editkit.training.text import CONFIG as TEXT_CONFIG
from editkit.training.text import WIDTH, CompactTextModel, grammar_ids


def shake(module: torch.nn.Module, seed: int, deviation: float = 0.08) -> torch.nn.Module:
    """Seeded weights everywhere, so that a swapped or forgotten tensor shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(module.named_parameters()):
            noise = torch.randn(value.shape, generator=generator) * deviation
            value.copy_(noise + 1 if value.ndim == 1 and name.endswith("weight") else noise)
            value.copy_(value.half().float())
    return module.eval().requires_grad_(False)


def save_tiny(folder: Path) -> Path:
    """Write unet, vae and text_encoder with seeded weights in float16."""
    with torch.inference_mode(False):
        unet, vae, text = unet_stage.build()[0], vae_stage.build(), CompactTextModel()
        for module, part, seed in ((unet, "unet", 1), (vae, "vae", 2)):
            shake(module, seed).half().save_pretrained(folder / part)
        shake(text.model, 3)
    part = folder / "text_encoder"
    part.mkdir()
    save_file(
        {key: value.half().contiguous() for key, value in text.model.state_dict().items()}, part / "model.safetensors"
    )
    (part / "config.json").write_text(json.dumps({**TEXT_CONFIG, "model_type": "clip_text_model"}))
    (part / "token_ids.json").write_text(json.dumps(grammar_ids()))
    return folder


def tokens(seed: int, rows: int = 1, length: int = 77) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def cond(seed: int, rows: int = 1, **extras: object) -> list:
    """A CONDITIONING of the bundled width."""
    return [[tokens(seed, rows), dict(extras)]]


def latent(seed: int, batch: int = 1, height: int = 12, width: int = 10) -> Tensor:
    """An unscaled latent of deviation about 1 after scaling, like a trained VAE's."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed)) / 0.18215


def digest(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every weight, to compare bit for bit later."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_weights(module: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())
