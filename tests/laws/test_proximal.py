"""ProxNPI: proximal guidance and inversion guidance (T13; docs/methods.md, section 11.5)."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.guidance import mix
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.core.tensor_files import read_tensors
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from editkit.pipelines.inversion.negative_embeddings import FORMAT, load_embeddings, save_embeddings
from editkit.pipelines.inversion.negative_prompt import negative_prompt
from editkit.pipelines.inversion.proximal import Proximal, hard, published_l1, quantile, soft
from editkit.tests.toy_tokens import NULL, SOURCE, C, D, H, T, W, inverted
from editkit.tests.toys import ToyDenoiser, prompt, random_latent


def test_t13_thresholds():
    one = torch.tensor(1.0)
    assert soft(torch.tensor([-3.0, -1.5, 0.5, 2.0]), one).tolist() == [-2, -0.5, 0, 1]
    assert hard(torch.tensor([-3.0, -1.5, 0.5, 2.0]), one).tolist() == [-3, -1.5, 0, 2]
    given = torch.tensor([-1.1, -1.5, -2.5, 1.1, 1.5, 2.5])
    assert published_l1(given, one).tolist() == pytest.approx([0.9, 0.5, -0.5, 0.1, 0.5, 0.5])


def test_soft_and_hard_agree_on_what_is_left():
    delta = random_latent(2, C, H, W, seed=4)
    threshold = Proximal().threshold_of(delta, 1.0)
    assert torch.equal(soft(delta, threshold) != 0, hard(delta, threshold) != 0)
    assert 0.5 < (hard(delta, threshold) != 0).float().mean() < 0.7


def test_quantiles_are_linear_per_image_and_have_no_size_limit():
    values = random_latent(3, 1001, seed=5)
    for share in (0.0, 0.123, 0.4, 0.9995, 1.0):
        assert torch.allclose(quantile(values, share), torch.quantile(values, share, dim=1), atol=1e-6)


def test_t13_the_published_quantile_07_is_ours_at_04():
    delta = random_latent(1, 4, 64, 64, seed=6)
    ours = float(Proximal(quantile=0.4).threshold_of(delta, 1.0))
    published = float(Proximal(quantile=0.7, batch_quantile=True).threshold_of(delta, 1.0))
    assert published == pytest.approx(ours, abs=1e-3)
    assert ours == pytest.approx(0.524, abs=0.02)  # of |N(0, 1)|


def test_thresholds_are_per_image_and_scale_with_sigma():
    delta = random_latent(2, C, H, W, seed=4) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    both = Proximal().threshold_of(delta, 1.0)
    assert torch.equal(both[1:], Proximal().threshold_of(delta[1:], 1.0)) and both[1] > 5 * both[0]
    # in units of eps: differences of denoised predictions are sigma times larger
    assert float(Proximal(threshold=0.5).threshold_of(delta, 4.0)) == 2.0


def guided_with(proximal, scale=7.5, positive=None, path_of=None):
    denoiser, path = path_of or inverted()
    target = positive or Context(SOURCE.tokens + random_latent(1, T, D, seed=7))
    embeddings = negative_prompt(denoiser, path, SOURCE, proximal=proximal)
    return denoiser, path, target, reconstruct(denoiser, path, target, negative=embeddings, guidance_scale=scale)


def test_removing_nothing_is_npi_and_removing_everything_is_the_source():
    denoiser, path, target, nothing = guided_with(Proximal(quantile=0.0))
    _, _, _, npi = guided_with(None)
    assert torch.allclose(nothing, npi, atol=1e-5)
    for mode in ("soft", "hard"):
        *_, everything = guided_with(Proximal(mode, quantile=1.0))
        assert torch.allclose(everything, path.source, atol=2e-5)
    *_, some = guided_with(Proximal())
    assert 0.01 < (some - path.source).norm() < (npi - path.source).norm()


def test_the_source_prompt_reconstructs_at_every_threshold():
    denoiser, path = inverted()
    for proximal in (Proximal(), Proximal("hard", threshold=0.01), Proximal("soft", quantile=0.0)):
        *_, out = guided_with(proximal, positive=SOURCE, path_of=(denoiser, path))
        assert torch.allclose(out, path.source, atol=2e-5)


@pytest.mark.parametrize("target", ["path", "source"])
def test_inversion_guidance_restores_what_is_not_edited(target):
    """Where the threshold keeps one row of latent pixels, full inversion guidance restores the others exactly."""

    def rule(z, sigma, value):
        return z - sigma * (0.3 * torch.sin(z) + value * torch.tensor([1.0, 0.01, 0.01]).view(1, 1, 3, 1))

    denoiser = ToyDenoiser(rule)
    latent = random_latent(1, C, H, W, seed=3)
    # an inexact inversion, so that there is something to restore
    path = invert(denoiser, latent, prompt(0.2), torch.linspace(3, 0, 7), options=InversionOptions("current"))
    outs = {}
    for step_size in (0.0, 1.0):
        proximal = Proximal(
            "hard", threshold=0.1, inversion_guidance=step_size, inversion_guidance_target=target, dilation=0
        )
        embeddings = negative_prompt(denoiser, path, prompt(0.2), proximal=proximal)
        assert (embeddings.trajectory is None) == (step_size == 0)
        outs[step_size] = reconstruct(denoiser, path, prompt(0.9), negative=embeddings, guidance_scale=3.0)
    assert torch.allclose(outs[1.0][:, :, 1:], path.source[:, :, 1:], atol=1e-5)
    assert (outs[0.0][:, :, 1:] - path.source[:, :, 1:]).abs().max() > 1e-2
    assert (outs[1.0][:, :, 0] - path.source[:, :, 0]).abs().min() > 0.3


def test_partial_inversion_guidance_removes_its_fraction_of_the_distance_after_the_step():
    """The published update: x' <- x' - lr (x' - Z') (1 - M), on the latent that the step reaches."""
    denoiser, path = inverted(batch=1)
    proximal = Proximal("soft", threshold=1e9, inversion_guidance=0.3, dilation=0)
    z, sigma, target = path.latent(1) + 0.5, float(path.sigmas[1]), float(path.sigmas[2])
    cond, uncond = denoiser.denoise(z, sigma, [NULL, SOURCE]).detach()
    denoised = proximal.guide(z, sigma, cond, uncond, path, lambda c, u: mix(c, u, 7.5))
    reached = uncond + (z - uncond) * target / sigma
    expected = reached - 0.3 * (reached - path.latent(2))
    assert torch.allclose(denoised + (z - denoised) * target / sigma, expected, atol=1e-5)


def test_the_edited_region_grows_and_inversion_guidance_acts_below_its_sigma():
    denoiser, path = inverted(batch=1)
    z, sigma = path.latent(2) + 0.5, float(path.sigmas[2])
    uncond = torch.zeros(1, C, H, W)
    cond = torch.zeros(1, C, H, W)
    cond[:, :, 0, 0] = 1.0

    def restored(**change):
        full = {"threshold": 0.0, "inversion_guidance": 1.0, "inversion_guidance_target": "source"}
        return Proximal(**{**full, **change}).guide(z, sigma, cond, uncond, path, lambda c, u: mix(c, u, 2.0))

    share = 1 - float(path.sigmas[3]) / sigma  # of a change of the prediction that reaches the latent after the step
    home = path.source / share
    unchanged = [torch.isclose(restored(dilation=r), home).sum().item() // C for r in (0, 1, 2)]
    assert unchanged == [5, 2, 0]
    assert not torch.isclose(restored(inversion_guidance_below=sigma), home).any()
    assert torch.isclose(restored(inversion_guidance_below=sigma * 1.01, dilation=0), home).sum() == 5 * C
    # as published, the soft threshold 0.6 leaves 0.4, which is then compared with 0.6 again
    published = restored(threshold=0.6 / sigma, mask_of_shrunk=True, dilation=0)
    denoised = torch.where(cond > 0, 0.8, 0.0)
    assert torch.allclose(published, denoised - (denoised - path.source) / share, atol=1e-5)
    assert torch.allclose(restored(threshold=0.6 / sigma, dilation=0)[:, :, 0, 0], denoised[:, :, 0, 0])


def test_the_trajectory_of_other_images_is_refused():
    _, path = inverted(batch=2)
    z = torch.zeros(3, C, H, W)
    with pytest.raises(ShapeError, match="trajectory has 2"):
        Proximal(inversion_guidance=1.0, inversion_guidance_target="source").guide(
            z, 1.0, z + 1, z, path, lambda c, u: mix(c, u, 2.0)
        )


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "l1"},
        {"quantile": 1.1},
        {"inversion_guidance": -0.1},
        {"inversion_guidance_target": "moon"},
        {"dilation": -1},
        {"threshold": -1.0},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ParameterError, match=next(iter(change))):
        Proximal(**change)


def test_files_keep_the_keys_of_the_first_format(tmp_path):
    denoiser, path = inverted(batch=1)
    proximal = Proximal(
        "hard", inversion_guidance=0.5, inversion_guidance_below=2.0, inversion_guidance_target="source"
    )
    embeddings = negative_prompt(denoiser, path, SOURCE, proximal=proximal)
    file = save_embeddings(embeddings, tmp_path / "proximal.safetensors")
    saved = read_tensors(file, (FORMAT,))[2]["proximal"]
    assert (saved["pull"], saved["pull_below"], saved["pull_to"]) == (0.5, 2.0, "source")
    assert load_embeddings(file).proximal == proximal
