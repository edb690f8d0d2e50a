"""Our LATENTs beside the host's own, in its own nodes; and memory that the host may take back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import comfy.model_base
import comfy.model_management as management
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_latent
from torch import Tensor

import nodes as stock
from editkit.hosts import latent as _latent
from editkit.hosts.comfyui import memory as _host_memory
from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.host import in_comfyui, open_denoiser, sampling_of
from editkit.hosts.latent import finished_out, latent_in, latent_out
from editkit.hosts.sockets import context_of
from editkit.pipelines.core.guidance import guided
from editkit.pipelines.core.sigmas import euler_step
from editkit.tests.comfyui.host.tiny import cond, latent


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A stand-in for a host that keeps its tensors on another device than the one that computes."""
    device = torch.device("meta")
    monkeypatch.setattr(_latent, "intermediate_device", lambda: device)
    return device


def held(model, seed: int = 1, sigma: float = 0.0) -> _latent.DeviceLatent:
    return latent_out(latent(seed, 2, 8, 8), sampling_of(model), sigma, {})


NATIVE = {
    "LatentComposite": lambda ours, own: stock.LatentComposite().composite(own, ours, 16, 16, 0),
    "LatentComposite into ours": lambda ours, own: stock.LatentComposite().composite(ours, own, 16, 16, 16),
    "LatentBlend": lambda ours, own: stock.LatentBlend().blend(ours, own, 0.3),
    "LatentBatch": lambda ours, own: (
        nodes_latent.LatentBatch.execute(ours, own).result
        if hasattr(nodes_latent.LatentBatch, "execute")
        else nodes_latent.LatentBatch().batch(ours, own)
    ),
    "RepeatLatentBatch": lambda ours, own: stock.RepeatLatentBatch().repeat(ours, 3),
    "LatentFromBatch": lambda ours, own: stock.LatentFromBatch().frombatch(ours, 1, 1),
    "LatentUpscale": lambda ours, own: stock.LatentUpscaleBy().upscale(ours, "bilinear", 2.0),
    "LatentFlip": lambda ours, own: stock.LatentFlip().flip(ours, "x-axis: vertically"),
    "SetLatentNoiseMask": lambda ours, own: stock.SetLatentNoiseMask().set_mask(ours, torch.ones(1, 64, 64)),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_nodes_take_our_latents(model, elsewhere: torch.device, name: str) -> None:
    own = {"samples": latent(2, 2, 8, 8).to(elsewhere)}
    result = NATIVE[name](held(model), own)[0]
    assert result["samples"].device == elsewhere
    assert result["samples"].ndim == 4


def test_a_mask_keeps_our_tensor(model, elsewhere: torch.device) -> None:
    ours = held(model)
    masked = stock.SetLatentNoiseMask().set_mask(ours, torch.ones(1, 64, 64))[0]
    assert masked.z is ours.z
    assert masked["noise_mask"].shape == (1, 1, 64, 64)


def test_native_decode_reads_it(model, vae) -> None:
    ours = finished_out(latent(3, 1, 4, 4), {})
    assert torch.equal(stock.VAEDecode().decode(vae, ours)[0], vae.decode(latent(3, 1, 4, 4)))


def continued(model, z: Tensor, sigmas: list[float]) -> Tensor:
    positive, negative = context_of(cond(1), "positive"), context_of(cond(2), "negative")
    with open_denoiser(model, z.shape, [positive, negative]) as denoiser:
        for sigma, target in pairwise(sigmas):
            z = euler_step(z, guided(denoiser, z, sigma, positive, negative, 3.0), sigma, target)
    return z


def sampled(model, sigmas: Tensor, noise: Tensor, start: Tensor) -> Tensor:
    return comfy.samplers.sample(
        model, noise, cond(1), cond(2), 3.0, model.load_device, comfy.samplers.sampler_object("euler"), sigmas,
        model.model_options, latent_image=start, disable_pbar=True, seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_leftover_noise_passes_both_ways(folder: Path, kind: str) -> None:
    """Half of a run ours and half the host's equals the whole run, whichever begins."""
    model = _host_native.build_bundled(folder, model_type=comfy.model_base.ModelType[kind])[0]
    sampling = sampling_of(model)
    sigmas, source, noise = sampling.schedule(6, 0.9), latent(5, 1, 8, 8), torch.randn(1, 4, 8, 8)
    whole = sampled(model, sigmas, noise, source)
    grid = sigmas.tolist()
    start = sampling.noise(sampling.scale_in(source), noise, grid[0])
    halfway = latent_out(continued(model, start, grid[:4]), sampling, grid[3], {})
    ours_first = sampled(model, sigmas[3:], torch.zeros_like(noise), halfway["samples"])
    theirs = {"samples": sampled(model, sigmas[:4], noise, source)}
    theirs_first = sampling.scale_out(continued(model, latent_in(theirs, sampling, grid[3]), grid[3:]))
    for result in (ours_first, theirs_first):
        assert float((result - whole).abs().max() / whole.abs().max()) <= 1e-4


def test_evictable_memory_comes_back() -> None:
    value = torch.randn(2, 4, 8, 8)
    kept = _host_memory.Evictable(value)
    patchers = [entry.model for entry in management.current_loaded_models]
    assert kept.patcher in patchers
    assert kept.patcher.loaded_size() == value.nelement() * 4
    assert torch.equal(kept.get(), value)
    assert kept.get().data_ptr() == value.data_ptr()  # neither kept nor read by copying
    management.unload_all_models()
    assert kept.patcher.loaded_size() == 0
    assert torch.equal(kept.get(), value)
    del kept, patchers
    management.cleanup_models()


def test_on_the_cpu_nothing_is_registered(model) -> None:
    before = len(management.current_loaded_models)
    assert held(model).z.device.type == "cpu"
    assert len(management.current_loaded_models) == before


def test_rankers_are_managed() -> None:
    class Check(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    class Ranker:
        model = Check()

        def embed_images(self, images: Tensor) -> Tensor:
            return images.mean(dim=(1, 2)) * self.model.weight

        def embed_texts(self, texts: list[str]) -> Tensor:
            return self.model.weight.expand(len(texts), 3)

    managed = _host_memory.ManagedRanker(Ranker())
    assert managed.embed_images(torch.ones(2, 4, 4, 3)).shape == (2, 3)
    assert managed.embed_texts(["a"]).shape == (1, 3)
    assert managed.device == management.get_torch_device()
    assert any(entry.model is managed._patcher for entry in management.current_loaded_models)


def test_real_comfyui_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_comfyui()
    monkeypatch.delattr(comfy.samplers.CFGGuider, "inner_sample")
    assert not in_comfyui()
