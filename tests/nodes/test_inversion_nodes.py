"""Inversion nodes on toys: the pipelines' own numbers, refusals by name, batches and odd sizes."""

from __future__ import annotations

import math

import pytest
import torch

from editkit.hosts.diffusers.host import headless_run
from editkit.hosts.latent import finished_out
from editkit.hosts.sockets import HeadlessVae
from editkit.hosts.trajectory import trajectory_in, trajectory_rest
from editkit.pipelines.core.errors import EditError, FamilyError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.noise import image_seeds
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct, reconstruction_quality
from editkit.pipelines.inversion.regularisation import Regularisation
from editkit.pipelines.sdedit import sdedit
from editkit.tests.nodes.graph import call
from editkit.tests.nodes.toy_graph import STEPS, encoded, inverted, model, sigmas, text
from editkit.tests.toy_codec import ToyCodec
from editkit.tests.toys import neighbourly, prompt


@pytest.mark.parametrize("mode", ["next", "current", "implicit"])
def test_the_trajectory_is_the_pipelines(mode):
    host, (_, latent) = model(), encoded(2)
    held, noised, *_ = inverted(host, latent, mode=mode, iterations=7)
    trajectory = trajectory_in(held)
    wanted = invert(
        host.denoiser, latent["samples"], prompt(1.0), sigmas(host), options=InversionOptions(mode, iterations=7)
    )  # fmt: skip
    assert torch.equal(trajectory.latents, wanted.latents) and torch.equal(trajectory.sigmas, wanted.sigmas)
    assert (trajectory.family, trajectory.fingerprint, trajectory.prompt) == (
        wanted.family,
        wanted.fingerprint,
        wanted.prompt,
    )
    assert torch.equal(trajectory.source_latent, latent["samples"])
    assert noised.device_tensor.sigma == float(trajectory.sigmas[0]) and torch.equal(noised.z, trajectory.latents[0])


def test_regularised_inversion_is_the_pipelines():
    host, (_, latent) = model(), encoded(2)
    held = inverted(host, latent, mode="next", reg_steps=2, lambda_auto_corr=0.1, lambda_kl=0.5, seed=3)[0]
    options = InversionOptions(regularisation=Regularisation(2, 0.1, 0.5, seed=3))
    wanted = invert(host.denoiser, latent["samples"], prompt(1.0), sigmas(host), options=options)
    assert torch.equal(trajectory_in(held).latents, wanted.latents)
    assert not torch.equal(wanted.latents, trajectory_in(inverted(host, latent, mode="next")[0]).latents)
    with pytest.raises(ParameterError, match="mode is 'implicit'"):
        inverted(host, latent, mode="implicit", reg_steps=1)


def test_quality_is_measured_with_and_without_the_vae():
    host, (image, latent) = model(neighbourly()), encoded(2, 22, 19)
    vae, codec = HeadlessVae(ToyCodec()), ToyCodec()
    held, _, psnr, inner, report = inverted(host, latent, vae=vae, image=image)
    trajectory = trajectory_in(held)
    rebuilt = reconstruct(host.denoiser, trajectory, prompt(1.0))
    wanted = reconstruction_quality(codec, rebuilt, latent["samples"], image)
    assert psnr == float(wanted.with_vae.min()) and inner == float(wanted.without_vae.min())
    assert psnr < float(wanted.vae_only.max()) and len(report.splitlines()) == 2
    assert all(f"{value:.1f} dB" in report for value in (*wanted.with_vae.tolist(), *wanted.vae_only.tolist()))


def test_what_is_not_measured_is_not_a_number():
    host, (image, latent) = model(), encoded()
    denoiser = host.denoiser
    _, _, psnr, inner, report = inverted(host, latent)
    assert math.isnan(psnr) and math.isnan(inner) and "connect vae" in report
    assert denoiser.forward_passes == STEPS
    _, _, psnr, inner, _ = inverted(host, latent, vae=HeadlessVae(ToyCodec()))
    assert math.isnan(psnr) and inner > 10
    assert denoiser.forward_passes == 3 * STEPS
    with pytest.raises(ParameterError, match="image is connected but vae is not"):
        inverted(host, latent, image=image)


def test_a_part_of_the_grid():
    host, (_, latent) = model(), encoded()
    held, noised, *_ = inverted(host, latent, encoding_ratio=0.5)
    trajectory = trajectory_in(held)
    assert trajectory.first == 3 and host.denoiser.forward_passes == 3
    assert noised.device_tensor.sigma == float(trajectory.sigmas[3])


def test_guided_inversion_needs_its_negative():
    host, (_, latent) = model(), encoded()
    guided = inverted(host, latent, cfg=3.0, negative=text(0.0))[0]
    assert host.denoiser.forward_passes == 2 * STEPS
    assert not torch.equal(trajectory_in(guided).latents, trajectory_in(inverted(host, latent)[0]).latents)
    with pytest.raises(ParameterError, match="negative"):
        inverted(host, latent, cfg=3.0)


def test_flow_models_have_no_next():
    host, (_, latent) = model(flow=True), encoded()
    with pytest.raises(FamilyError, match="'implicit' or 'current'"):
        inverted(host, latent)
    assert trajectory_in(inverted(host, latent, mode="implicit")[0]).family == "toy-flow"


def test_a_noised_latent_is_no_image():
    host, (_, latent) = model(), encoded()
    noised = inverted(host, latent)[1]
    for name in ("InvertDDIM", "SDEdit", "DiffEditMask"):
        inputs = {"positive": text(), "negative": text(), "source": text(), "target": text(), "sigmas": sigmas(host)}
        wanted = {"InvertDDIM": ("positive", "sigmas"), "SDEdit": ("positive", "negative")}
        chosen = {key: inputs[key] for key in wanted.get(name, ("source", "target"))}
        with pytest.raises(MismatchError, match="latent has sigma"):
            call(name, model=host, latent=noised, **chosen)


def test_an_image_does_not_depend_on_its_batch():
    host, (_, latent) = model(neighbourly()), encoded(3)
    whole = trajectory_in(inverted(host, latent, mode="implicit")[0]).latents
    for i in range(3):
        alone = finished_out(latent["samples"][i : i + 1], like={})
        trajectory = trajectory_in(inverted(host, alone, mode="implicit")[0])
        assert torch.equal(trajectory.latents[:, 0], whole[:, i])


def test_a_sampler_that_adds_no_noise_goes_back_the_same_way():
    """Word swap: the stock sampler takes up the noised LATENT at its own sigma, on the inversion's SIGMAS."""
    from editkit.headless.stock_nodes import STOCK_NODES

    host, (_, latent) = model(), encoded()
    held, noised, *_ = inverted(host, latent, mode="implicit", iterations=60, damping=0.7, tolerance=1e-7)
    custom = dict(
        model=host, add_noise=False, noise_seed=0, negative=text(), sampler="euler", sigmas=sigmas(host),
        latent_image=noised,
    )  # fmt: skip
    same = STOCK_NODES["SamplerCustom"](None, cfg=1.0, positive=text(1.0), **custom)[0]
    assert torch.allclose(same["samples"], latent["samples"], atol=2e-3) and same.device_tensor.sigma == 0
    swapped = STOCK_NODES["SamplerCustom"](None, cfg=3.0, positive=text(2.0), **custom)[0]
    wanted = reconstruct(
        host.denoiser, trajectory_in(held), prompt(2.0), negative=prompt(), guidance_scale=3.0
    )  # fmt: skip
    assert torch.equal(swapped["samples"], wanted) and not torch.allclose(wanted, latent["samples"], atol=0.1)
    with pytest.raises(MismatchError, match="same sigmas"):
        STOCK_NODES["SamplerCustom"](None, cfg=1.0, positive=text(1.0), **{**custom, "sigmas": sigmas(host, 6, 0.5)})


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_sdedit_is_the_pipelines(sampler):
    host, (_, latent) = model(), encoded(2)
    options = dict(cfg=3.0, steps=STEPS, strength=0.5, sampler=sampler, seed=4)
    ours = call("SDEdit", model=host, positive=text(1.0), negative=text(), latent=latent, **options)[0]
    wanted = sdedit(
        host.denoiser, latent["samples"], EditPrompts(prompt(1.0), prompt(), 3.0), seeds=image_seeds(4, 2), steps=STEPS,
        strength=0.5, sampler=sampler,
    )  # fmt: skip
    assert torch.equal(ours["samples"], wanted)
    second = finished_out(latent["samples"][1:], like={"batch_index": [1]})
    alone = call("SDEdit", model=host, positive=text(1.0), negative=text(), latent=second, **options)[0]
    assert torch.equal(alone["samples"][0], ours["samples"][1])


def test_sdedit_at_strength_0_is_the_image_and_at_cfg_1_has_no_negative():
    host, (_, latent) = model(), encoded()
    common = dict(model=host, positive=text(1.0), negative=text(), latent=latent, steps=STEPS)
    kept = call("SDEdit", strength=0.0, **common)[0]
    assert torch.equal(kept["samples"], latent["samples"]) and host.denoiser.forward_passes == 0
    call("SDEdit", strength=1.0, cfg=1.0, **common)
    assert host.denoiser.forward_passes == STEPS


def test_results_keep_the_images_own_size():
    vae, host, (_, latent) = HeadlessVae(ToyCodec()), model(), encoded(1, 21, 19)
    edited = call("SDEdit", model=host, positive=text(1.0), negative=text(), latent=latent, steps=2)[0]
    assert call("DecodeLatent", latent=edited, vae=vae)[0].shape == (1, 21, 19, 3)
    noised = inverted(host, latent)[1]
    assert noised["editkit_size"] == (21, 19)


def test_wrong_things_are_refused_by_name():
    host, (_, latent) = model(), encoded()
    with pytest.raises(EditError, match="positive is an empty CONDITIONING"):
        call("InvertDDIM", model=host, positive=[], latent=latent, sigmas=sigmas(host))
    with pytest.raises(ParameterError, match="sigmas"):
        inverted(host, latent, grid=torch.tensor([1.0]))
    with pytest.raises(ShapeError, match="channels"):
        inverted(host, {"samples": torch.zeros(1, 4, 5, 5)})
    with pytest.raises(EditError, match=r"trajectory is a int: connect"):
        trajectory_in(3)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("node", ["InvertDDIM", "SDEdit", "DiffEditMask", "MaskedDecode", "DiffEdit"])
def test_every_step_can_be_cancelled(node):
    host, (_, latent) = model(), encoded()
    prompts = {"positive": text(1.0), "negative": text()}
    both = {"latent": latent, "source": text(), "target": text(1.0)}
    inputs = {
        "InvertDDIM": lambda: {"positive": text(1.0), "latent": latent, "sigmas": sigmas(host)},
        "SDEdit": lambda: {**prompts, "latent": latent},
        "DiffEditMask": lambda: both,
        "MaskedDecode": lambda: {
            **prompts,
            "trajectory": inverted(host, latent)[0],
            "latent_mask": torch.ones(1, 6, 5),
        },
        "DiffEdit": lambda: {**both, "negative": text()},
    }[node]()
    seen = []

    def report(done, total, preview=None):
        seen.append((done, total))
        if done == 2:
            raise Cancelled

    with headless_run(progress=report), pytest.raises(Cancelled):
        call(node, model=host, **inputs)
    assert [done for done, _ in seen] == [1, 2] and seen[0][1] >= STEPS - 1


def test_the_progress_of_several_parts_is_one():
    host, (image, latent) = model(), encoded()
    seen = []
    with headless_run(progress=lambda done, total, preview=None: seen.append((done, total))):
        inverted(host, latent, vae=HeadlessVae(ToyCodec()), image=image)
        measured, seen[:] = list(seen), []
        call(
            "DiffEdit", model=host, latent=latent, source=text(), target=text(3.0), negative=text(), cfg=1.0, steps=STEPS,
            encoding_ratio=0.5, maps=2, threshold=0.3,
        )  # fmt: skip
    assert measured == [(i, 2 * STEPS) for i in range(1, 2 * STEPS + 1)]
    assert seen == [(i, 8) for i in range(1, 9)]


def test_between_nodes_a_trajectory_waits_where_the_host_wants_it(monkeypatch):
    """Nothing but what the host may evict keeps its tensors; the rest of the LATENT comes along."""
    from editkit.hosts import trajectory as _trajectory

    moved = []

    def evicted(tensor):
        moved.append(tensor.clone())
        return lambda copy=moved[-1]: copy

    monkeypatch.setattr(_trajectory, "keep_on_device", evicted)
    host, (_, latent) = model(), encoded(1, 21, 19)
    latent["batch_index"] = [4]
    held = inverted(host, latent)[0]
    trajectory = trajectory_in(held)
    assert trajectory.latents is moved[0] and trajectory.source_latent is moved[1]
    assert trajectory.source.shape == latent["samples"].shape
    rest = trajectory_rest(held)
    assert rest["editkit_size"] == (21, 19) and rest["batch_index"] == [4] and "samples" not in rest
    assert "sigmas=7" in repr(held)
