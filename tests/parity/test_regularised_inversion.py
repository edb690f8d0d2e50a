"""Regularised inversion against pix2pix-zero's loop (ddim_inv.py), transcribed with its gradients by autograd.

The script draws its shifts with `randrange`; here both take ours, in the script's order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from editkit.pipelines.inversion.ddim import InversionOptions, invert
from editkit.pipelines.inversion.regularisation import Regularisation
from editkit.tests.toys import ToyDenoiser, prompt, random_latent


def auto_corr_loss(x: Tensor, shifts: Iterator[int]) -> Tensor:
    loss = torch.zeros((), dtype=x.dtype)
    for channel in range(x.shape[1]):
        noise = x[:, channel : channel + 1]
        while True:
            shift = next(shifts)
            loss = loss + (noise * torch.roll(noise, shifts=shift, dims=2)).mean() ** 2
            loss = loss + (noise * torch.roll(noise, shifts=shift, dims=3)).mean() ** 2
            if noise.shape[2] <= 8:
                break
            noise = F.avg_pool2d(noise, kernel_size=2)
    return loss


def kl_divergence(x: Tensor) -> Tensor:
    return x.var() + x.mean() ** 2 - 1 - torch.log(x.var() + 1e-7)


def regularised(eps: Tensor, draws: Tensor, weight: float) -> Tensor:
    """The published inner loop over one image; `draws` are its shifts [steps, rolls, channels, sizes]."""

    def descended(value: Tensor, loss) -> Tensor:
        leaf = value.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        return gradient

    for rolls in draws:
        for shifts in rolls:
            found = descended(eps, lambda x, s=shifts: auto_corr_loss(x, iter(s.flatten().tolist())))
            eps = eps - weight * found / len(rolls)
        eps = eps - weight * descended(eps, kl_divergence)
    return eps


def test_regularised_inversion_is_the_published_loop():
    chosen = Regularisation(steps=3, rolls=2)
    latent, sigmas = random_latent(1, 4, 16, 16, seed=2).double(), torch.tensor([5.0, 2.0, 0.7, 0.0])

    def eps_of(x: Tensor, sigma: float) -> Tensor:
        return torch.sin(x / (1 + sigma * sigma) ** 0.5 + x.mean()) + 0.3

    denoiser = ToyDenoiser(lambda z, sigma, value: z - sigma * eps_of(z, sigma))
    found = invert(denoiser, latent, prompt(), sigmas, options=InversionOptions("next", regularisation=chosen))
    x = latent  # variance-preserving, as the script's
    for step, (low, high) in enumerate([(0.0, 0.7), (0.7, 2.0), (2.0, 5.0)]):
        at_low, at_high = 1 / (1 + low * low), 1 / (1 + high * high)
        eps = eps_of(x / at_high**0.5, high)
        eps = regularised(eps, chosen._shifts(eps, step)[:, :, 0], 20.0)
        clean = (x - (1 - at_low) ** 0.5 * eps) / at_low**0.5
        x = at_high**0.5 * clean + (1 - at_high) ** 0.5 * eps
        assert torch.allclose(found.latent(2 - step), x / at_high**0.5, rtol=1e-7)
