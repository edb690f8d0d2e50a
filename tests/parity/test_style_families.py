"""StyleDiffusion through real U-Nets of every family that is controlled, and in half precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.pipelines.inversion.ddim import invert
from editkit.pipelines.stylediffusion.edit import StyleEditOptions, style_edit
from editkit.pipelines.stylediffusion.inversion import StyleOptions, style_invert
from editkit.tests.parity.attention_nets import denoiser, prompt
from editkit.tests.toy_attention import replace_edit
from editkit.tests.toys import random_latent

LATENT_PIXELS, FEATURES = 16, random_latent(1, 9, 16, seed=5)
OPTIONS = StyleOptions(inner=6, inner_decay=0.0, init="identity", tolerance=0.0, tolerance_growth=0.0)


def scene(model, family: str):
    source, null = prompt(1, family), prompt(2, family)
    with torch.no_grad():
        path = invert(model, random_latent(1, 4, LATENT_PIXELS, LATENT_PIXELS, seed=3), source, model.schedule(3))
    return source, null, path


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "bundled"])
def test_values_are_learned_and_the_network_stays(family):
    model = denoiser(family)
    model.unet.requires_grad_(True)  # as a careless user's
    weights = {name: value.clone() for name, value in model.unet.state_dict().items()}
    source, null, path = scene(model, family)
    bare, found = (
        style_invert(model, path, source, null, FEATURES, options=o) for o in (replace(OPTIONS, inner=1), OPTIONS)
    )
    assert found.losses[0] < 0.9 * bare.losses[0] and found.map_distance.min() > 0
    assert all(torch.equal(value, weights[name]) for name, value in model.unet.state_dict().items())
    assert all(value.grad is None for value in model.unet.parameters())
    edit = replace_edit(source, prompt(4, family))
    edited = style_edit(model, found.embeddings, edit, null, options=StyleEditOptions(0.5)).edited
    assert torch.isfinite(edited).all() and not torch.allclose(edited, path.source)


def first_gradients(monkeypatch, dtype: torch.dtype) -> torch.Tensor:
    """What the last layer of the networks is told first."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.optim.Adam, "step", lambda adam: found.append(adam.param_groups[0]["params"][-2].grad.flatten())
        )
        model = denoiser("bundled")
        model.unet.to(dtype).requires_grad_(False)
        source, null, path = scene(model, "bundled")
        style_invert(model, path, source, null, FEATURES, options=StyleOptions(inner=1))
    return found[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_told_the_same(monkeypatch, dtype):
    exact, found = first_gradients(monkeypatch, torch.float32), first_gradients(monkeypatch, dtype)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.98
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.1)
