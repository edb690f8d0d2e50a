"""Gradients through the shipped model in float16, without a host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editkit.hosts.diffusers.loading import load_bundled
from editkit.tests.toys import random_latent


def gradient(dtype: torch.dtype, factor: float) -> Tensor:
    """Of a weighted sum of a prediction with respect to the prompt, as it comes through a loss `factor` times as large."""
    model = load_bundled()
    context = model.text.encode("a red circle on a gray background")
    denoiser = model.to("cpu", dtype).denoiser
    u = context.tokens.detach().clone().requires_grad_(True)
    clean = denoiser.denoise(2 * random_latent(1, 4, 12, 12), 1.5, [context.with_tokens(u)])[0]
    return torch.autograd.grad(factor * (clean * random_latent(1, 4, 12, 12, seed=1)).sum(), u)[0] / factor


@pytest.mark.parametrize("factor", [1e-12, 1.0])
def test_small_gradients_pass_a_half_precision_model(factor):
    exact = gradient(torch.float32, 1.0)
    assert (gradient(torch.float16, factor) - exact).norm() < 0.03 * exact.norm()
