"""The blended MODEL under the host's own samplers: the outside ends at the source, the inside is sampled."""

from __future__ import annotations

from pathlib import Path

import comfy.model_base
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, Noise_EmptyNoise, Noise_RandomNoise, SamplerCustomAdvanced
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.host import blended_model, open_denoiser, sampling_of
from editkit.hosts.sockets import context_of
from editkit.pipelines.blended.blending import blended_denoise
from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import MaskSchedule, constant_schedule, dilation_schedule
from editkit.tests.comfyui.host.tiny import cond, digest, latent, same_weights

SAMPLERS = (
    "euler",
    "dpmpp_2m",
    "dpmpp_sde",
    "uni_pc",
    "ddim",
    "lcm",
    "euler_ancestral",
    "dpmpp_2m_sde",
    "heun",
    "euler_cfg_pp",
)
HEIGHT, WIDTH = 10, 8


def box(batch: int = 1) -> Tensor:
    mask = torch.zeros(batch, HEIGHT, WIDTH)
    for b in range(batch):
        mask[b, 4 + b : 8, 3 : 7 + b] = 1
    return mask


def shrinking(spacing: str = "steps") -> MaskSchedule:
    return dilation_schedule(box(), (5, 3, 1), spacing=spacing)


def run(model, source: Tensor, *, name: str = "euler", scheduler: str = "normal", seed: int = 5, **more) -> Tensor:
    """KSampler on a LATENT."""
    latent_in = {"samples": source, **more.pop("extra", {})}
    arguments = {"steps": 4, "cfg": 3.0, "denoise": 0.8, **more}
    return stock_nodes.common_ksampler(
        model,
        seed,
        arguments.pop("steps"),
        arguments.pop("cfg"),
        name,
        scheduler,
        cond(1),
        cond(2),
        latent_in,
        **arguments,
    )[0]["samples"]


def outside_error(result: Tensor, source: Tensor, mask: Tensor) -> float:
    return float(((result - source) * (mask[:, None] == 0)).abs().max())


@pytest.mark.parametrize(("name", "denoise"), [*((name, 0.7) for name in SAMPLERS), ("euler", 1.0), ("dpmpp_sde", 1.0)])
def test_any_sampler_leaves_the_outside(model, name: str, denoise: float) -> None:
    source = latent(1, 2, HEIGHT, WIDTH)
    blended = blended_model(model, shrinking(), None, None)
    result = run(blended, source, name=name, denoise=denoise)
    assert outside_error(result, source, box()) <= 1e-5
    inside = (result - source) * box()[:, None]
    assert inside.abs().max() > 1
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("kind", ["V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral", "lcm"])
def test_other_parameterisations(folder: Path, kind: str, name: str) -> None:
    model = _host_native.build_bundled(folder, model_type=comfy.model_base.ModelType[kind])[0]
    source = latent(1, 1, HEIGHT, WIDTH)
    result = run(blended_model(model, constant_schedule(box()), None, None), source, name=name, scheduler="simple")
    assert outside_error(result, source, box()) <= 1e-5
    assert ((result - source) * box()[:, None]).abs().max() > 1


def test_full_mask_is_plain_sampling(model) -> None:
    source = latent(2, 1, HEIGHT, WIDTH)
    whole = constant_schedule(torch.ones(1, HEIGHT, WIDTH))
    for name in ("euler", "dpmpp_2m", "euler_ancestral"):
        plain = run(model, source, name=name)
        assert torch.equal(run(blended_model(model, whole, None, None), source, name=name), plain)


def test_empty_mask_returns_the_source(model) -> None:
    source = latent(3, 1, HEIGHT, WIDTH)
    empty = constant_schedule(torch.zeros(1, HEIGHT, WIDTH))
    assert torch.equal(run(blended_model(model, empty, None, None), source, name="euler_ancestral"), source)


@pytest.mark.parametrize("schedule", ["constant", "steps", "log-sigma"])
def test_euler_equals_our_loop(model, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    """The patch is the same algorithm as `blended_denoise`, for masks that change over the steps too."""
    masks = constant_schedule(box()) if schedule == "constant" else shrinking(schedule)
    source, seed = latent(4, 1, HEIGHT, WIDTH), 11
    sigmas = sampling_of(model).schedule(7, 0.9)
    noise = torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    blended = blended_model(model, masks, None, sigmas)
    theirs = comfy.samplers.sample(
        blended, noise, cond(1), cond(2), 3.0, model.load_device, comfy.samplers.sampler_object("euler"), sigmas,
        blended.model_options, latent_image=source, disable_pbar=True, seed=seed,
    )  # fmt: skip
    positive, negative = context_of(cond(1), "positive"), context_of(cond(2), "negative")
    with open_denoiser(model, source.shape, [positive, negative]) as denoiser:
        clean = denoiser.scale_in(source)
        ours = blended_denoise(
            denoiser, denoiser.noise(clean, noise, float(sigmas[0])), clean, sigmas, masks,
            EditPrompts(positive, negative, 3.0), seeds=[seed],
        )  # fmt: skip
        ours = denoiser.scale_out(ours)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-4


def test_batched_masks_and_sources(model) -> None:
    source, mask = latent(5, 2, HEIGHT, WIDTH), box(2)
    result = run(blended_model(model, constant_schedule(mask), None, None), source)
    assert outside_error(result, source, mask) <= 1e-5
    one = latent(6, 1, HEIGHT, WIDTH)
    result = run(blended_model(model, constant_schedule(mask), one, None), source)
    assert outside_error(result, one, mask) <= 1e-5


def test_latent_noise_mask_is_honoured_too(model) -> None:
    source = latent(7, 1, HEIGHT, WIDTH)
    native = torch.zeros(1, 1, HEIGHT, WIDTH)
    native[..., :5] = 1
    blended = blended_model(model, constant_schedule(box()), None, None)
    result = run(blended, source, extra={"noise_mask": native})
    assert outside_error(result, source, box() * native[:, 0]) <= 1e-5
    assert ((result - source) * box()[:, None] * native).abs().max() > 1


@pytest.mark.parametrize("name", ["euler", "uni_pc", "dpmpp_sde"])
def test_sampler_custom_advanced(model, name: str) -> None:
    source = latent(8, 1, HEIGHT, WIDTH)
    sigmas = sampling_of(model).schedule(6, 0.7)
    blended = blended_model(model, shrinking(), None, sigmas)
    guider = BasicGuider().get_guider(blended, cond(1))[0]
    sampler = comfy.samplers.sampler_object(name)
    out, denoised = SamplerCustomAdvanced().sample(Noise_RandomNoise(3), guider, sampler, sigmas, {"samples": source})
    assert outside_error(out["samples"], source, box()) <= 1e-5
    # uni_pc derives the prediction that it reports from its own rounded state
    assert outside_error(denoised["samples"], source, box()) <= (5e-3 if name == "uni_pc" else 1e-5)


def advanced(model, source: Tensor, seed: int, *, start: int, end: int, noise: bool, name: str = "euler") -> Tensor:
    return stock_nodes.KSamplerAdvanced().sample(
        model, "enable" if noise else "disable", seed, 6, 3.0, name, "normal", cond(1), cond(2), {"samples": source},
        start, end, "enable" if end < 6 else "disable",
    )[0]["samples"]  # fmt: skip


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_leftover_noise_composes(folder: Path, kind: str) -> None:
    """Two KSamplerAdvanced stages over one grid equal a single one; with another seed the outside still is exact."""
    model = _host_native.build_bundled(folder, model_type=comfy.model_base.ModelType[kind])[0]
    source = latent(9, 1, HEIGHT, WIDTH)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    blended = blended_model(model, dilation_schedule(box(), (5, 1)), source, sigmas)
    whole = advanced(blended, source, 21, start=1, end=6, noise=True)
    half = advanced(blended, source, 21, start=1, end=2, noise=True)
    assert outside_error(half, source, box()) > 1
    both = advanced(blended, half, 21, start=2, end=6, noise=False)
    assert float((both - whole).abs().max() / whole.abs().max()) <= 1e-4
    other = advanced(blended, half, 77, start=2, end=6, noise=False)
    assert outside_error(other, source, box()) <= 1e-5


def test_a_run_cut_short_but_forced_clean_keeps_the_last_mask(model) -> None:
    source = latent(9, 1, HEIGHT, WIDTH)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    blended = blended_model(model, shrinking(), None, sigmas)
    result = run(blended, source, steps=6, denoise=1.0, start_step=1, last_step=3, force_full_denoise=True)
    assert outside_error(result, source, box()) <= 1e-5
    assert ((result - source) * box()[:, None]).abs().max() > 1


def test_our_own_nodes_refuse_a_blended_model(model) -> None:
    blended = blended_model(model, shrinking(), None, None)
    with pytest.raises(ParameterError, match="is blended"), open_denoiser(blended, (1, 4, HEIGHT, WIDTH), []):
        pass
    with pytest.raises(ParameterError, match="already blends"):
        blended_model(blended, shrinking(), None, None)


def test_a_noised_latent_without_its_source_is_refused(model) -> None:
    blended = blended_model(model, constant_schedule(box()), None, None)
    with pytest.raises(ParameterError, match="source"):
        advanced(blended, latent(1, 1, HEIGHT, WIDTH), 1, start=3, end=6, noise=False)


def test_custom_noise_disabled_with_source(model) -> None:
    source, sigmas = latent(8, 1, HEIGHT, WIDTH), sampling_of(model).schedule(6, 0.7)
    blended = blended_model(model, constant_schedule(box()), source, sigmas)
    guider = BasicGuider().get_guider(blended, cond(1))[0]
    sampling = sampling_of(model)
    z = sampling.noise(sampling.scale_in(source), torch.randn_like(source), float(sigmas[0]))
    start = {"samples": sampling.scale_out(z)}
    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    out, _ = SamplerCustomAdvanced().sample(Noise_EmptyNoise(), guider, sampler, sigmas, start)
    assert outside_error(out["samples"], source, box()) <= 1e-5


def test_misfits_are_refused(model) -> None:
    source = latent(1, 3, HEIGHT, WIDTH)
    with pytest.raises(ShapeError, match="8 x 8"):
        run(blended_model(model, constant_schedule(torch.ones(1, 8, 8)), None, None), source)
    with pytest.raises(ShapeError, match="2 entries"):
        run(blended_model(model, constant_schedule(box(2)), None, None), source)
    with pytest.raises(ShapeError, match="source latent"):
        run(blended_model(model, constant_schedule(box()), latent(1, 1, 8, 8), None), source)
    once = blended_model(model, constant_schedule(box()), None, None)
    with pytest.raises(ParameterError, match="already blends"):
        blended_model(once.clone(), constant_schedule(box()), None, None)


def test_nothing_of_the_model_changes(model) -> None:
    before, wrappers = digest(model.model), repr(model.wrappers)
    blended = blended_model(model, constant_schedule(box()), None, None)
    plain = run(model, latent(1, 1, HEIGHT, WIDTH))
    run(blended, latent(1, 1, HEIGHT, WIDTH))
    with pytest.raises(RuntimeError, match="stop"):
        run(_failing(blended), latent(1, 1, HEIGHT, WIDTH))
    assert torch.equal(run(model, latent(1, 1, HEIGHT, WIDTH)), plain)
    assert same_weights(model.model, before)
    assert repr(model.wrappers) == wrappers


def _failing(blended):
    def fail(args):
        raise RuntimeError("stop")

    patched = blended.clone()
    patched.set_model_sampler_post_cfg_function(fail)
    return patched
