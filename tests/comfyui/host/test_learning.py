"""A native MODEL opened for learning: gradients pass through it to what is learned, and it is the same afterwards."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import comfy.hooks
import pytest
import torch
from torch import Tensor

from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.comfyui.gradients import OVERWRITE, differentiable_attention, learnable, refuse_learning
from editkit.hosts.host import open_denoiser
from editkit.hosts.sockets import context_of
from editkit.pipelines.core.errors import FamilyError
from editkit.pipelines.learning.optimise import learning_mode
from editkit.tests.comfyui.host.stock_faults import skip_where_weight_hooks_stay
from editkit.tests.comfyui.host.test_model import WEIGHT, Control
from editkit.tests.comfyui.host.tiny import cond, digest, same_weights, tokens

SHAPE = (1, 4, 8, 8)


def state(seed: int = 1) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def gradient(model, seed: int = 2, *, factor: float = 1.0) -> tuple[Tensor, float]:
    """Gradient of `factor` times a weighted sum of the prediction with respect to the prompt, without the factor; and
    the measured slope along a direction, as a multiple of what the gradient says.
    """
    context = context_of(cond(seed), "positive")
    with open_denoiser(model, SHAPE, [context], learning=True) as denoiser, learning_mode():
        z, weight, direction = state().clone(), state(3).clone(), tokens(4).clone()

        def value(u: Tensor) -> Tensor:
            return (denoiser.denoise(z, 1.5, [context.with_tokens(u)])[0] * weight).sum()

        u = tokens(seed).clone().requires_grad_(True)
        found = torch.autograd.grad(factor * value(u), [u])[0] / factor
        with torch.no_grad():
            slope = (value(u + 1e-2 * direction) - value(u - 1e-2 * direction)) / 2e-2
        assert not any(p.requires_grad for p in model.model.parameters())
    return found, float(slope / (found * direction).sum())


def identities(model) -> dict[str, int]:
    kept = [*model.model.named_parameters(), *model.model.named_buffers()]
    return {name: id(value) for name, value in kept}


def test_the_gradient_is_the_slope_and_the_model_stays(model) -> None:
    before, ids = digest(model.model), identities(model)
    found, ratio = gradient(model)
    assert found.abs().max() > 1e-3
    assert ratio == pytest.approx(1, abs=2e-2)
    assert same_weights(model.model, before)
    assert identities(model) == ids  # not copies: the tensors themselves
    assert all(p.grad is None for p in model.model.parameters())


def test_weights_take_no_second_memory(model) -> None:
    context = context_of(cond(1), "positive")
    places = {name: value.data_ptr() for name, value in model.model.named_parameters()}
    with open_denoiser(model, SHAPE, [context], learning=True):
        inside = dict(model.model.named_parameters())
        assert {name: value.data_ptr() for name, value in inside.items()} == places
        assert not any(value.is_inference() for value in inside.values())


def test_plain_runs_make_no_graph(model) -> None:
    context = context_of(cond(1), "positive")
    with open_denoiser(model, SHAPE, [context]) as denoiser:
        clean = denoiser.denoise(state(), 1.5, [context])[0]
        mixed = denoiser.combine(state(), 1.5, clean, clean, 1.0, [context])
    assert not clean.requires_grad and clean.grad_fn is None and clean.is_inference() and mixed.is_inference()


def test_weights_that_ask_for_gradients_get_none(model, folder: Path) -> None:
    with torch.inference_mode(False):  # as a checkpoint that was loaded outside inference mode
        trainable = _host_native.build_bundled(folder)[0]
        trainable.model.requires_grad_(True)
    torch.testing.assert_close(gradient(trainable)[0], gradient(model)[0], atol=1e-6, rtol=1e-4)
    assert all(p.requires_grad and p.grad is None for p in trainable.model.diffusion_model.parameters())


@pytest.mark.parametrize("lowvram", [False, True])
def test_patched_weights_are_in_force(model, folder: Path, lowvram: bool) -> None:
    patched = _host_native.build_bundled(folder)[0].clone()
    shape = patched.model.state_dict()[WEIGHT].shape
    patched.add_patches({WEIGHT: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(5)),))}, 0.5)
    if lowvram:
        patched.load(patched.load_device, lowvram_model_memory=1)
        assert patched.lowvram_patch_counter() > 0
    found, ratio = gradient(patched)
    plain, _ = gradient(model)
    assert ratio == pytest.approx(1, abs=2e-2)
    assert (found - plain).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_small_gradients_pass_a_half_precision_model(model, folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    half = _host_native.build_bundled(folder)[0]
    half.model.diffusion_model.to(dtype)
    half.model.diffusion_model.dtype = dtype
    exact, _ = gradient(model)
    found, _ = gradient(half, factor=1e-12)
    assert (found - exact).norm() < tolerance * exact.norm()


def test_weight_hooks_of_the_positive_leave_no_trace(model) -> None:
    """They are written into the very memory that autograd reads, and taken out of it again."""
    skip_where_weight_hooks_stay()
    before = digest(model.model)
    hook = comfy.hooks.WeightHook(strength_model=0.7, strength_clip=0.0)
    hook.weights, hook.need_weight_init = {WEIGHT: ("diff", (torch.randn_like(before[WEIGHT]),))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    hooked, null = context_of([[tokens(1), {"hooks": group}]], "positive"), context_of(cond(2), "negative")
    found = []
    with open_denoiser(model, SHAPE, [hooked, null], learning=True) as denoiser, learning_mode():
        for _ in range(2):
            with torch.no_grad():
                denoiser.denoise(state().clone(), 1.5, [hooked])
            u = tokens(2).clone().requires_grad_(True)
            value = (denoiser.denoise(state().clone(), 1.5, [null.with_tokens(u)])[0] * state(3)).sum()
            found.append(torch.autograd.grad(value, u)[0])
    torch.testing.assert_close(found[0], gradient(model)[0], atol=1e-6, rtol=1e-4)
    assert torch.equal(found[0], found[1])
    assert same_weights(model.model, before)


class Stop(Exception):
    """Stands for a cancel."""


def test_a_fault_brings_the_weights_back(model) -> None:
    before, ids = digest(model.model), identities(model)
    context = context_of(cond(1), "positive")
    with pytest.raises(Stop), open_denoiser(model, SHAPE, [context], learning=True):
        raise Stop
    assert same_weights(model.model, before)
    assert identities(model) == ids


def test_what_the_host_replaced_meanwhile_stays() -> None:
    part = torch.nn.Linear(2, 2)
    shared = torch.nn.ModuleList([part, torch.nn.Linear(2, 2)])
    shared[1].weight = part.weight
    own, new = part.bias, torch.nn.Parameter(torch.ones(2))
    with learnable([shared]):
        assert shared[1].weight is part.weight
        part.bias = new
    assert part.bias is new
    assert shared[1].bias is not own


def test_attention_without_gradients_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ldm.modules.attention as attention

    q, options = torch.randn(1, 4, 8), {"transformer_options": {}}
    differentiable_attention(options)
    used = []
    monkeypatch.setattr(attention, "attention_pytorch", lambda *_, **__: used.append("pytorch"))
    for name in ("attention_sage", "attention_flash"):
        getattr(attention, name)(q, q, q, 2, transformer_options=options["transformer_options"])
    assert used == ["pytorch", "pytorch"]
    plain = attention.attention_sub_quad(q, q, q, 2, transformer_options=options["transformer_options"])
    torch.testing.assert_close(plain, attention.attention_basic(q, q, q, 2))
    kept = {"transformer_options": {"optimized_attention_override": "another pack's"}}
    differentiable_attention(kept)
    assert kept["transformer_options"]["optimized_attention_override"] == "another pack's"


def test_a_lone_negative_predicts_what_it_predicts_beside_the_positive(model) -> None:
    """A ControlNet of the positive prompt acts on the negative too, whenever and with whatever text it is evaluated."""
    z = state()
    positive = context_of([[tokens(1), {"control": Control(), "control_apply_to_uncond": True}]], "positive")
    negative, bare = context_of(cond(2), "negative"), context_of(cond(2), "negative")
    other = negative.with_tokens(tokens(3))
    with open_denoiser(model, z.shape, [positive, negative]) as denoiser:
        alone = denoiser.denoise(z, 1.5, [negative])[0]
        changed = denoiser.denoise(z, 1.5, [other])[0]
        together = denoiser.denoise(z, 1.5, [positive, negative])[1]
        pair = denoiser.denoise(z, 1.5, [positive, other])[1]
    with open_denoiser(model, z.shape, [bare]) as denoiser:
        without = denoiser.denoise(z, 1.5, [bare])[0]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(changed, pair, atol=1e-5, rtol=1e-4)
    assert (alone - without).abs().max() > 1e-2


def test_guidance_hooks_see_the_prompts_of_the_predictions(model) -> None:
    """As null-text inversion evaluates: the positive once, then a new negative again and again."""
    seen: list[list[Tensor]] = []
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(
        lambda args: seen.append([args[key][0]["cross_attn"] for key in ("cond", "uncond")]) or args["denoised"]
    )
    z, positive, null = state(), context_of(cond(1), "positive"), context_of(cond(2), "negative")
    with open_denoiser(patched, z.shape, [positive, null]) as denoiser:
        clean = denoiser.denoise(z, 1.5, [positive])[0]
        for seed in (3, 4):
            other = null.with_tokens(tokens(seed))
            uncond = denoiser.denoise(z, 1.5, [other])[0]
            denoiser.combine(z, 1.5, clean, uncond, 3.0, [positive, other])
    assert [[torch.equal(a, tokens(1)), torch.equal(b, tokens(s))] for (a, b), s in zip(seen, (3, 4), strict=True)] == [
        [True, True]
    ] * 2


HOMES = {
    "Flux": "comfy.ldm.flux.model",
    "HunyuanVideo": "comfy.ldm.hunyuan_video.model",
}


@pytest.mark.parametrize("kind", OVERWRITE)
def test_networks_that_compute_in_place_are_refused_by_family(kind: str) -> None:
    network_class = getattr(import_module(HOMES[kind]), kind)
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=network_class.__new__(network_class)))
    with pytest.raises(FamilyError, match=f"{OVERWRITE[kind]}.*computes in place.*connect an SD 1.x"):
        refuse_learning(model)


def test_networks_of_stable_diffusion_may_learn(bundled) -> None:
    assert refuse_learning(bundled[0]) is None
