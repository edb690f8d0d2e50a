"""StyleDiffusion's learning in every outcome: who receives gradients, what a fault leaves behind, what is refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from editkit.pipelines.core.errors import EditError, FamilyError, MismatchError, ShapeError
from editkit.pipelines.learning.loss_scaling import LossScaling
from editkit.pipelines.learning.optimise import learning_mode
from editkit.pipelines.stylediffusion.inversion import style_invert
from editkit.pipelines.stylediffusion.learning_control import LOSS_SCALE
from editkit.pipelines.stylediffusion.networks import NetworkShape, made_networks
from editkit.tests.toy_values import (
    FEATURES,
    NULL,
    SHORT,
    SOURCE,
    AttentionDenoiser,
    B,
    D,
    S,
    T,
    inverted,
    learned,
    text,
)
from editkit.tests.toys import random_latent


# --------------------------------------------------------------------------------------------------------- gradients
def tensors_with_gradients() -> set[int]:
    leaves = (value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter) and value.is_leaf)
    return {id(value) for value in leaves if value.grad is not None}


def test_after_a_step_only_the_networks_have_gradients(monkeypatch):
    gc.collect()
    denoiser, features, before = AttentionDenoiser(), FEATURES.clone().requires_grad_(True), tensors_with_gradients()
    path, seen = inverted(denoiser), []
    source, null = (replace(c, tokens=c.tokens.clone().requires_grad_(True)) for c in (SOURCE, NULL))
    step = torch.optim.Adam.step

    def spy(adam, *args, **kwargs):
        mine = adam.param_groups[0]["params"]
        assert tensors_with_gradients() - before == {id(value) for value in mine}
        seen.append([tuple(value.shape[1:]) for value in mine])
        return step(adam, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    style_invert(denoiser, path, source, null, features, options=replace(SHORT, inner=1))
    assert seen == [list(NetworkShape(S, T).sizes.values())] * 4
    assert not tensors_with_gradients() - before and all(value.requires_grad for value in denoiser.parameters())


def test_loss_scaling_inside_the_network_changes_nothing_in_float32(monkeypatch):
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    ours = learned(denoiser, path)
    monkeypatch.setattr("editkit.pipelines.stylediffusion.learning_control.LOSS_SCALE", 1.0)
    plain = learned(denoiser, path)
    assert torch.equal(ours.embeddings.scale, plain.embeddings.scale)


def test_gradients_survive_a_network_in_half_precision():
    """A loss so small that its gradients are below what float16 can hold still reaches the values."""
    x = random_latent(3, 5).requires_grad_(True)
    with learning_mode():
        scaling = LossScaling(torch.float16, LOSS_SCALE)
        inside = scaling.enter(x).half()
        loss = 1e-8 * scaling.leave((inside * 2).float()).sum()
        lost = 1e-8 * (x.half() * 2).float().sum()
    assert torch.allclose(torch.autograd.grad(loss, x)[0], torch.full_like(x, 2e-8), rtol=1e-2)
    assert not torch.autograd.grad(lost, x)[0].any()


# ------------------------------------------------------------------------------------------------ every outcome (T20)
class Cancelled(Exception):
    pass


@pytest.mark.parametrize("fault", [Cancelled(), torch.OutOfMemoryError("full"), RuntimeError("a kernel failed")])
@pytest.mark.parametrize("at", [1, 6, 14])
def test_t20_a_fault_leaves_nothing_behind(fault, at, monkeypatch):
    denoiser, networks = AttentionDenoiser(), []
    path, generator = inverted(denoiser), torch.get_rng_state()
    before, made = denoiser.digest(), made_networks

    def kept(*args):
        found = made(*args)
        networks.extend(weakref.ref(value) for value in found.parameters.values())
        return found

    def progress(done, total, preview=None):
        calls.append(done)
        if isinstance(fault, Cancelled) and len(calls) == at:
            raise fault

    calls: list[int] = []
    monkeypatch.setattr("editkit.pipelines.stylediffusion.inversion.made_networks", kept)
    if not isinstance(fault, Cancelled):
        denoiser.fail_at, denoiser.error = at, fault
    with pytest.raises(type(fault)) as caught:
        learned(denoiser, path, progress=progress)
    assert caught.value is fault
    fault.__traceback__ = None
    del caught
    gc.collect()
    assert networks and not any(ref() is not None for ref in networks)
    assert denoiser.digest() == before and torch.equal(torch.get_rng_state(), generator)


def test_progress_counts_to_its_total():
    denoiser, told = AttentionDenoiser(), []
    learned(denoiser, inverted(denoiser), progress=lambda done, total, preview=None: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (16, 16)


# ---------------------------------------------------------------------------------------------------------- mistakes
def test_what_does_not_fit_is_refused():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    with pytest.raises(MismatchError, match="prompt"):
        style_invert(denoiser, path, text(40), NULL, FEATURES)
    with pytest.raises(ShapeError, match="width 12"):
        style_invert(denoiser, path, SOURCE, NULL, random_latent(B, S, D + 1))
    with pytest.raises(ShapeError, match="seeds"):
        learned(denoiser, path, seeds=[1])
    with pytest.raises(EditError, match="image has 3"):
        style_invert(denoiser, path, SOURCE, NULL, random_latent(3, S, D))


def test_a_network_without_maps_to_compare_is_refused_by_name(monkeypatch):
    denoiser = AttentionDenoiser()
    path = inverted(denoiser)
    monkeypatch.setattr("editkit.pipelines.attention.token_maps.MapGrid.has", lambda grid, site: False)
    with pytest.raises(FamilyError, match="'toy'"):
        learned(denoiser, path)
    assert learned(denoiser, path, replace(SHORT, attention_weight=0.0)).map_distance.sum() == 0
