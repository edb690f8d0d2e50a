"""Inversion and DiffEdit on native MODELs: the headless latents, the host's own samplers, and MODELs left as they were."""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.bundled import tiny_folder
from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.comfyui.bundled import build_bundled
from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.comfyui.host import ComfyUIHost
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.host import batch_that_fits, open_denoiser, text_encoder_of
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.hosts.trajectory import trajectory_in
from editkit.pipelines.core.errors import FamilyError, MismatchError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.diffedit.edit import masked_decode
from editkit.pipelines.diffedit.mask import diffedit_mask
from editkit.pipelines.inversion.ddim import invert, reconstruct
from editkit.pipelines.sdedit import sdedit
from editkit.tests.comfyui.host.tiny import cond, digest, latent, same_weights
from editkit.tests.nodes.graph import call

STEPS, CFG = 10, 4.0


@pytest.fixture(scope="module")
def shipped():
    with torch.inference_mode():
        return build_bundled(tiny_folder())


@pytest.fixture(scope="module")
def example():
    return load_example("red_circle")


@pytest.fixture(scope="module")
def headless():
    return load_bundled()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Started:
    """What every edit here begins with, on the shipped model."""

    def __init__(self, shipped, example, steps: int = STEPS):
        self.model, clip, self.vae = shipped
        encode = text_encoder_of(clip).encode
        texts = (example.caption, example.prompt, "")
        self.source, self.target, self.empty = (conditioning_of(encode(text)) for text in texts)
        self.latent = call("EncodeImage", image=example.image, vae=self.vae)[0]
        self.sigmas = call("EditSigmas", model=self.model, steps=steps, strength=1.0)[0]

    def inverted(self, **options):
        return call(
            "InvertDDIM", model=self.model, positive=self.source, latent=self.latent, sigmas=self.sigmas, **options
        )  # fmt: skip

    def mask(self, **options):
        prompts = {"source": self.source, "target": self.target}
        return call("DiffEditMask", model=self.model, latent=self.latent, **prompts, maps=4, **options)

    def decoded(self, trajectory, mask, **options):
        return call(
            "MaskedDecode", model=self.model, positive=self.target, negative=self.empty, cfg=CFG, trajectory=trajectory,
            latent_mask=mask, **options,
        )[0]  # fmt: skip


@pytest.fixture
def start(shipped, example):
    return Started(shipped, example)


def test_diffedit_gives_the_headless_latents(start, example, headless):
    source, target, empty = (headless.text.encode(text) for text in (example.caption, example.prompt, ""))
    z = headless.codec.encode(example.image)
    _, latent_pixels, _, soft = start.mask()
    wanted = diffedit_mask(headless.denoiser, z, source, target, seeds=[0], maps=4)
    assert (soft - wanted.heat).abs().max() <= 1e-3 and 0 < latent_pixels.mean() < 1
    held = start.inverted()[0]
    trajectory = invert(headless.denoiser, z, source, headless.denoiser.schedule(STEPS))
    assert relative(trajectory_in(held).latents, trajectory.latents) <= 1e-3
    schedule, prompts = constant_schedule(latent_pixels), EditPrompts(target, empty, CFG)
    edited = masked_decode(headless.denoiser, trajectory, schedule, prompts)
    assert relative(start.decoded(held, latent_pixels)["samples"], edited) <= 1e-3


def test_sdedit_gives_the_headless_latents(start, example, headless):
    target, empty = (headless.text.encode(text) for text in (example.prompt, ""))
    z = headless.codec.encode(example.image)
    options = {"steps": STEPS, "strength": 0.6, "sampler": "dpmpp_2m"}
    ours = call(
        "SDEdit", model=start.model, positive=start.target, negative=start.empty, latent=start.latent, cfg=CFG, seed=5,
        **options,
    )[0]  # fmt: skip
    wanted = sdedit(headless.denoiser, z, EditPrompts(target, empty, CFG), seeds=[5], **options)
    assert relative(ours["samples"], wanted) <= 1e-3


def test_outside_the_mask_the_latent_is_the_sources_bit_for_bit(start):
    _, latent_pixels, *_ = start.mask()
    held, noised, *_ = start.inverted()
    edited = start.decoded(held, latent_pixels)["samples"]
    blended = call(
        "BlendedDenoise", model=start.model, positive=start.target, negative=start.empty, cfg=CFG, sigmas=start.sigmas,
        latent=noised, source_latent=start.latent, schedule=latent_pixels, trajectory=held,
    )[0]["samples"]  # fmt: skip
    outside = (latent_pixels == 0)[0]
    for result in (edited, blended):
        assert torch.equal(result[..., outside], start.latent["samples"][..., outside])
        assert not torch.allclose(result[..., ~outside], start.latent["samples"][..., ~outside], atol=0.1)
    assert torch.equal(blended, start.decoded(held, latent_pixels, encoding_ratio=1.0)["samples"])


def test_the_whole_method_in_one_node(start):
    held, (_, latent_pixels, *_) = start.inverted()[0], start.mask()
    edited, _, found, _ = call(
        "DiffEdit", model=start.model, latent=start.latent, source=start.source, target=start.target, negative=start.empty,
        cfg=CFG, steps=STEPS, maps=4,
    )  # fmt: skip
    assert torch.equal(found, latent_pixels)
    assert relative(edited["samples"], start.decoded(held, latent_pixels)["samples"]) <= 1e-5


def test_stock_samplers_take_the_noised_latent_up_at_its_sigma(shipped, example):
    """SamplerCustom on the same SIGMAS, and KSampler (Advanced) on the scheduler that has them: no noise added."""
    start = Started(shipped, example, steps=20)
    held, noised, *_ = start.inverted()
    sampler = KSamplerSelect().get_sampler("euler")[0]
    prompts = (start.target, start.empty)
    custom = SamplerCustom().sample(start.model, False, 0, CFG, *prompts, sampler, start.sigmas, noised)[0]
    advanced = stock_nodes.KSamplerAdvanced().sample(
        start.model, "disable", 0, 20, CFG, "euler", "ddim_uniform", *prompts, noised, 0, 10000, "disable"
    )[0]  # fmt: skip
    target, empty = (context_of(prompt, "prompt") for prompt in prompts)
    trajectory = trajectory_in(held)
    with open_denoiser(start.model, trajectory.source.shape, [target, empty]) as denoiser:
        wanted = denoiser.scale_out(reconstruct(denoiser, trajectory, target, negative=empty, guidance_scale=CFG))
    for result in (custom, advanced):
        assert relative(result["samples"], wanted) <= 1e-3
    assert relative(wanted, start.latent["samples"]) > 0.05


def test_the_reconstruction_is_measured(shipped, example):
    start = Started(shipped, example, steps=50)
    _, _, psnr, inner, report = start.inverted(mode="implicit", vae=start.vae, image=example.image)
    assert psnr > 38 and inner > 45 and "the VAE alone" in report


def test_other_kinds_of_models(folder):
    """v and flow models: the implicit inversion comes back, and a flow model has no mode 'next'."""
    for kind in ("V_PREDICTION", "FLOW"):
        model = _host_native.build_bundled(folder, model_type=comfy.model_base.ModelType[kind])[0]
        image = {"samples": latent(3)}
        sigmas = call("EditSigmas", model=model, steps=8, strength=1.0)[0]
        inputs = dict(model=model, positive=cond(1), latent=image, sigmas=sigmas)
        held, noised, *_ = call("InvertDDIM", mode="implicit", iterations=30, damping=0.5, **inputs)
        trajectory = trajectory_in(held)
        with open_denoiser(model, trajectory.source.shape, [context_of(cond(1), "positive")]) as denoiser:
            back = reconstruct(denoiser, trajectory, context_of(cond(1), "positive"))
        assert relative(back, trajectory.source) <= 0.05, kind
        assert noised.device_tensor.sigma == float(sigmas[0])
        if kind == "FLOW":
            with pytest.raises(FamilyError, match="'implicit' or 'current'"):
                call("InvertDDIM", mode="next", **inputs)


def test_a_trajectory_of_another_model_is_refused(start, example):
    held, latent_pixels = start.inverted()[0], start.mask()[1]
    lora = start.model.clone()
    name = next(iter(lora.model.diffusion_model.state_dict()))
    weight = lora.model.diffusion_model.state_dict()[name]
    lora.add_patches({f"diffusion_model.{name}": ("diff", (torch.ones_like(weight),))})
    with pytest.raises(MismatchError, match="another model"):
        call(
            "MaskedDecode", model=lora, positive=start.target, negative=start.empty, trajectory=held, latent_mask=latent_pixels
        )  # fmt: skip


def test_the_mask_takes_the_rows_that_memory_has(start, monkeypatch):
    """2.5 latents fit, so two noises go through the model at a time, each prompt by itself."""
    calls, shape, plenty = [], start.latent["samples"].shape, start.mask()
    free = 1.5 * 2.5 * start.model.memory_required([1, *shape[1:]])

    def little(device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", little)
    assert batch_that_fits(start.model, shape) == 2
    inner, predict = start.model.model, start.model.model.apply_model
    monkeypatch.setattr(inner, "apply_model", lambda x, *a, **k: calls.append(len(x)) or predict(x, *a, **k))
    short = start.mask()
    assert calls == [2, 2, 2, 2]
    assert torch.allclose(short[3], plenty[3], atol=1e-5)
    free = 0
    assert batch_that_fits(start.model, shape) == 1


@pytest.mark.parametrize("fault", [comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("node", ["invert", "mask", "decode", "sdedit", "diffedit"])
def test_faults_leave_the_model_bit_identical(start, node, fault, monkeypatch):
    held = start.inverted()[0] if node == "decode" else None
    inner, options = start.model.model, repr(start.model.model_options)
    before = digest(inner)

    def failing(total, model=None):
        def report(done, total, preview=None):
            if done == 2:
                raise fault()

        return report

    monkeypatch.setattr(ComfyUIHost, "progress", lambda self, total, model: failing(total))
    both = dict(model=start.model, latent=start.latent, negative=start.empty, cfg=CFG)
    runs = {
        "invert": start.inverted,
        "mask": start.mask,
        "decode": lambda: start.decoded(held, torch.ones(1, 12, 12)),
        "sdedit": lambda: call("SDEdit", positive=start.target, **both),
        "diffedit": lambda: call("DiffEdit", source=start.source, target=start.target, **both),
    }
    with pytest.raises(fault):
        runs[node]()
    assert same_weights(inner, before) and repr(start.model.model_options) == options
    assert inner.current_patcher is None or not inner.current_patcher.is_injected
