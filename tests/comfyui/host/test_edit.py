"""The shipped model natively: one blended edit gives the same latents in ComfyUI as headless, and faults change nothing."""

from __future__ import annotations

import random

import pytest
import torch
from skimage import data

from editkit.hosts.bundled import tiny_folder
from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.comfyui.bundled import build_bundled
from editkit.hosts.comfyui.host import ComfyUIHost
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.host import open_denoiser
from editkit.pipelines.blended.pipeline import EditSettings, edit_latents
from editkit.pipelines.core.masks import PAPER_KERNELS
from editkit.tests.nodes.graph import blended_chain, call


@pytest.fixture(scope="module")
def shipped():
    with torch.inference_mode():
        return build_bundled(tiny_folder())


@pytest.fixture(scope="module")
def example():
    return load_example("empty_side")


def test_predictions_of_both_hosts(shipped, example):
    headless = load_bundled()
    context, empty = (headless.text.encode(text) for text in (example.prompt, ""))
    z = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    with open_denoiser(shipped[0], z.shape, [context, empty]) as native:
        for sigma in (14.0, 2.0, 0.1):
            noised = z * (1 + sigma**2) ** 0.5
            ours, theirs = (
                native.denoise(noised, sigma, [context, empty]),
                headless.denoiser.denoise(noised, sigma, [context, empty]),
            )
            # predictions of the network: eps = (z - clean) / sigma
            assert (ours - theirs).abs().max() / sigma <= 1e-4


def test_an_edit_equals_the_headless_one(shipped, example):
    chain = blended_chain(*shipped, example.image, example.mask, example.prompt, steps=10, copies=2, seed=3)
    headless, settings = (
        load_bundled(),
        EditSettings(steps=10, guidance_scale=4.0, candidates=2, seed=3, kernels=PAPER_KERNELS),
    )
    wanted = edit_latents(
        headless.denoiser, headless.codec, headless.text, example.image, example.mask, example.prompt, settings=settings
    )  # fmt: skip
    got = chain["edited"]["samples"]
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


def test_ranges_compose_bit_for_bit(shipped, example):
    whole, parts = (
        blended_chain(*shipped, example.image, example.mask, example.prompt, steps=4, ranges=ranges)["edited"][
            "samples"
        ]
        for ranges in ([(0, 10000)], [(0, 1), (1, 3), (3, 4)])
    )
    assert torch.equal(whole, parts)


def test_photograph_through_the_whole_chain(shipped):
    image = torch.from_numpy(data.chelsea()[100:199, 120:231]).float()[None] / 255
    mask = torch.zeros(1, 99, 111)
    mask[:, 20:50, 30:70] = 1
    chain = blended_chain(*shipped, image, mask, "a red circle on a white background", steps=3, copies=1)
    tuned = call("TuneDecoder", vae=shipped[2], latent=chain["edited"], source=image, mask=mask)
    plain = call("DecodeLatent", latent=chain["edited"], vae=shipped[2])[0]
    outside = (mask == 0)[..., None].expand_as(image)
    before, after = ((result - image)[outside].square().mean() for result in (plain, tuned[1]))
    assert 10 * torch.log10(before / after) >= 5
    result, change = call("CompositeSource", edited=tuned[1], source=image, mask=mask)
    assert change == 0 and torch.equal(result[outside], image[outside]) and result.shape == image.shape


@pytest.mark.parametrize("node", ["loop", "decoder"])
@pytest.mark.parametrize("fault", ["cancel", "memory", "error"])
def test_faults_leave_model_clip_and_vae_bit_identical(shipped, example, node, fault, monkeypatch):
    import comfy.model_management

    model, clip, vae = shipped
    modules = [model.model, clip.cond_stage_model, vae.first_stage_model]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    chain = blended_chain(*shipped, example.image, example.mask, example.prompt, steps=2)
    error = {
        "cancel": comfy.model_management.InterruptProcessingException,
        "memory": torch.cuda.OutOfMemoryError,
        "error": ZeroDivisionError,
    }[fault]
    at = random.Random(f"{node} {fault}").randint(1, 12)  # another iteration for each, the same in every run

    def failing(total, model=None):
        def report(done, total, preview=None):
            if done == at:
                raise error()

        return report

    monkeypatch.setattr(ComfyUIHost, "progress", lambda self, total, model: failing(total))
    with pytest.raises(error):
        if node == "loop":
            blended_chain(*shipped, example.image, example.mask, example.prompt, steps=12)
        else:
            call("TuneDecoder", vae=vae, latent=chain["edited"], source=example.image, mask=example.mask, steps=12)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
