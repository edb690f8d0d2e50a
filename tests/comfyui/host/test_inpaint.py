"""Inpainting models (nine input channels): their mask and image reach the network as in the host's own sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.host import open_denoiser, sampling_of
from editkit.hosts.sockets import context_of
from editkit.pipelines.blended.blending import blended_denoise, unscale_over_source
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.tests.comfyui.host.test_model import close, ours, stock
from editkit.tests.comfyui.host.tiny import cond, latent


@pytest.fixture(scope="module")
def inpainting(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The random model with five more input channels, whose weights are not zero."""
    made = tmp_path_factory.mktemp("inpaint") / "unet"
    made.mkdir()
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 9}
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    first = weights["conv_in.weight"]
    more = torch.randn(first.shape[0], 5, 3, 3, generator=torch.Generator().manual_seed(8)).to(first) * 0.2
    weights["conv_in.weight"] = torch.cat([first, more], 1).contiguous()
    (made / "config.json").write_text(json.dumps(config))
    save_file(weights, made / "diffusion_pytorch_model.safetensors")
    with torch.inference_mode():
        model = _host_native._model(made, 0.18215, _host_native.comfy.model_base.ModelType.EPS)
        model.model.set_inpaint()
    return model


def prompts(seed: int) -> list:
    """What InpaintModelConditioning makes: the masked image's latent and the mask, on both prompts."""
    mask = torch.zeros(1, 1, 96, 80)
    mask[:, :, 20:60, 10:50] = 1
    return cond(seed, concat_latent_image=latent(5), concat_mask=mask)


def test_loop_equals_stock_euler_with_and_without_a_masked_image(inpainting):
    noise, source = latent(2) * 0.18215, latent(3)
    sigmas = sampling_of(inpainting).schedule(5)
    results = []
    for positive, negative in ((prompts(1), prompts(4)), (cond(1), cond(4))):
        results.append(ours(inpainting, sigmas, noise, source, positive, negative, 4.0))
        assert close(results[-1], stock(inpainting, sigmas, noise, source, positive, negative, 4.0))
    assert not close(*results, tolerance=1e-2)


def test_blending_keeps_the_outside(inpainting):
    source, mask = latent(3), torch.zeros(1, 12, 10)
    mask[:, 3:8, 2:7] = 1
    schedule, contexts = constant_schedule(mask), [context_of(part, "positive") for part in (prompts(1), prompts(4))]
    sigmas = sampling_of(inpainting).schedule(4)
    with open_denoiser(inpainting, source.shape, contexts, sigmas=sigmas) as denoiser:
        scaled = denoiser.scale_in(source)
        z = denoiser.noise(scaled, torch.randn(scaled.shape, generator=torch.Generator().manual_seed(0)), sigmas[0])
        z = blended_denoise(denoiser, z, scaled, sigmas, schedule, EditPrompts(*contexts, 4.0), seeds=[0])
        result = unscale_over_source(denoiser, z, source, schedule, sigmas)
    keep = (mask == 0)[:, None].expand_as(source)
    assert torch.equal(result[keep], source[keep]) and not torch.equal(result, source)
