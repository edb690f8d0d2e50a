"""What the laws of LayerDiffusion are held on: a denoiser linear in its text, and a small real U-Net."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from editkit.hosts.diffusers.denoiser import DiffusersDenoiser
from editkit.pipelines.core.protocols import Context
from editkit.tests.parity.tiny import unet
from editkit.tests.toys import ToyDenoiser, random_latent, sd_table

B, C, H, W, T, D = 2, 4, 6, 5, 3, 8


class TextDenoiser(ToyDenoiser):
    """D = z / (1 + sigma) + the mean text embedding in every latent pixel: its first four numbers, one for each channel.

    Sigmas may differ from image to image; gradients reach the text. `seen` has the token counts of every call.
    """

    def __init__(self, *, flow: bool = False):
        super().__init__(lambda z, sigma, value: z, flow=flow)
        self.seen: list[tuple[int, ...]] = []

    def noise(self, clean: Tensor, noise: Tensor, sigma: Any) -> Tensor:
        return (1 - sigma) * clean + sigma * noise if self.flow else clean + sigma * noise

    def denoise(self, z: Tensor, sigma: Any, contexts: Sequence[Context], control: Any = None) -> Tensor:
        self.forward_passes += len(contexts) * len(z)
        self.calls += 1
        self.seen += [tuple(context.tokens.shape) for context in contexts]
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return torch.stack([z / (1 + sigma) + c.tokens.mean(1)[:, :C, None, None] for c in contexts])


def text(seed: int, rows: int = 1, tokens: int = T) -> Context:
    return Context(random_latent(rows, tokens, D, seed=seed), text=str(seed))


def source(seed: int = 0, batch: int = B) -> Tensor:
    return random_latent(batch, C, H, W, seed=seed)


def object_mask(height: int = H, width: int = W) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, 1:4, 1:3] = 1
    return mask


def network(prediction: str = "epsilon", seed: int = 0) -> DiffusersDenoiser:
    """A random U-Net on 8 x 8 latents, 16 wide text."""
    return DiffusersDenoiser(unet(seed=seed), sd_table(), prediction, "toy", 1.0, 8)


def network_text(seed: int, rows: int = 1) -> Context:
    return Context(random_latent(rows, T, 16, seed=seed), text=str(seed))


def digest(module: nn.Module) -> str:
    made = hashlib.sha256()
    for name, value in module.state_dict().items():
        made.update(name.encode() + value.numpy().tobytes())
    return made.hexdigest()


def patched(module: nn.Module) -> list[str]:
    """Submodules with a hook, or with a `forward` of their own."""
    return [
        name
        for name, part in module.named_modules()
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
    ]
