"""Gradients that float16 could not hold come through a network in float16 all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editkit.pipelines.core.protocols import Context
from editkit.pipelines.learning.loss_scaling import LossScaling
from editkit.tests.toys import random_latent

SMALL = 1e-9  # far below float16's smallest number, 6e-8


def gradients(dtype: torch.dtype, *, help_it: bool = True, factor: float = SMALL) -> tuple[Tensor, Tensor]:
    """Of a small loss behind a little network, with respect to its input and to the prompt."""
    weight, text = random_latent(6, 6, seed=1) / 3, random_latent(6, 6, seed=2) / 3
    z, tokens = random_latent(2, 6, seed=3).requires_grad_(True), random_latent(1, 2, 6, seed=4).requires_grad_(True)
    span = LossScaling(dtype if help_it else None)
    x, (context,) = span.enter(z), span.contexts([Context(tokens)])
    inside = torch.tanh(x.to(dtype) @ weight.to(dtype)) + context.tokens[0].to(dtype) @ text.to(dtype)
    loss = factor * span.leave(x - inside.float()).square().sum()
    return torch.autograd.grad(loss, [z, tokens])


def test_small_gradients_arrive():
    exact, lost = gradients(torch.float32), gradients(torch.float16, help_it=False)
    for found, expected in zip(gradients(torch.float16), exact, strict=True):
        assert (found - expected).norm() < 5e-3 * expected.norm()
    assert not lost[1].any()


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e12])
def test_the_range_follows_the_loss(factor):
    exact = gradients(torch.float32)
    for found, expected in zip(gradients(torch.float16, factor=factor), exact, strict=True):
        assert (found / factor - expected / SMALL).norm() < 5e-3 * (expected / SMALL).norm()


def test_a_gradient_of_zero_stays_zero():
    assert not any(found.any() for found in gradients(torch.float16, factor=0.0))


def test_it_leaves_alone_what_needs_no_help():
    z, context = random_latent(1, 4).requires_grad_(True), Context(random_latent(1, 2, 3))
    for dtype in (torch.float32, torch.bfloat16, None):
        assert LossScaling(dtype).enter(z) is z
    with torch.no_grad():
        assert LossScaling(torch.float16).enter(z) is z
    assert LossScaling(torch.float16).contexts([context])[0] is context
