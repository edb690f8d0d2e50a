"""Denoisers with closed forms: the laws are held on these before any network is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from editkit.pipelines.core.guidance import mix
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.core.sigmas import even_sigmas, leading_sigmas


def sd_table() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    return ((1 - abar) / abar).sqrt().float()


class ToyDenoiser:
    """A `Denoiser` whose denoised latent is `rule(z, sigma, value)`, value = mean of the context's tokens.

    Counts the latents it evaluates, per context (`forward_passes`), and its calls; `flow` switches to rectified flow.
    """

    channels = 4

    def __init__(
        self,
        rule: Callable[[Tensor, float, float], Tensor],
        *,
        flow: bool = False,
        scale: float = 1.0,
        channels: int = 4,
    ):
        self.rule, self.flow, self.scale = rule, flow, scale
        self.forward_passes = self.calls = 0
        self.family = "toy-flow" if flow else "toy"
        self.channels = channels

    device = torch.device("cpu")
    fingerprint = "toy"

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        if self.flow:
            return even_sigmas(torch.linspace(0.001, 1, 1000), steps, strength)
        return leading_sigmas(sd_table(), steps, strength)

    def noise(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return (1 - sigma) * clean + sigma * noise if self.flow else clean + sigma * noise

    def denoise(self, z: Tensor, sigma: float, contexts: Sequence[Context]) -> Tensor:
        self.forward_passes += len(contexts) * z.shape[0]
        self.calls += 1
        return torch.stack([self.rule(z, float(sigma), float(c.tokens.mean())) for c in contexts])

    def combine(
        self, z: Tensor, sigma: float, cond: Tensor, uncond: Tensor, scale: float, contexts: Sequence[Context]
    ) -> Tensor:
        return mix(cond, uncond, scale)

    def scale_in(self, latent: Tensor) -> Tensor:
        return latent * self.scale

    def scale_out(self, z: Tensor) -> Tensor:
        return z / self.scale


def prompt(value: float = 0.0) -> Context:
    """A context that only carries a number."""
    return Context(torch.full((1, 2, 3), value), text=str(value))


def linear(a: float) -> Callable[[Tensor, float, float], Tensor]:
    return lambda z, sigma, value: a * z


def point(mu: Tensor) -> Callable[[Tensor, float, float], Tensor]:
    return lambda z, sigma, value: mu.expand_as(z)


def gaussian(s: float = 1.0) -> Callable[[Tensor, float, float], Tensor]:
    return lambda z, sigma, value: z * s * s / (s * s + sigma * sigma)


def pointwise() -> Callable[[Tensor, float, float], Tensor]:
    """Non-linear, pointwise, and it depends on sigma and on the prompt."""
    return lambda z, sigma, value: torch.tanh(z / (1 + sigma)) + 0.1 * value


def neighbourly() -> Callable[[Tensor, float, float], Tensor]:
    """Non-linear, and every latent pixel depends on the whole latent, as attention and norms do."""
    return lambda z, sigma, value: torch.tanh(z / (1 + sigma) + z.mean(dim=(1, 2, 3), keepdim=True)) + 0.1 * value


def random_latent(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
