"""ProxNPI: what is cut from guidance, and what is pulled back to the source (T13; methods.md, 11.5)."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.core.errors import ParameterError, ShapeError
from editkit.pipelines.core.guidance import mix
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from editkit.pipelines.inversion.null_text import negative_prompt
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
    level = Proximal().level(delta, 1.0)
    assert torch.equal(soft(delta, level) != 0, hard(delta, level) != 0)
    assert 0.5 < (hard(delta, level) != 0).float().mean() < 0.7


def test_quantiles_are_linear_per_picture_and_have_no_size_limit():
    values = random_latent(3, 1001, seed=5)
    for share in (0.0, 0.123, 0.4, 0.9995, 1.0):
        assert torch.allclose(quantile(values, share), torch.quantile(values, share, dim=1), atol=1e-6)


def test_t13_the_published_quantile_07_is_ours_at_04():
    delta = random_latent(1, 4, 64, 64, seed=6)
    ours = float(Proximal(quantile=0.4).level(delta, 1.0))
    published = float(Proximal(quantile=0.7, batch_quantile=True).level(delta, 1.0))
    assert published == pytest.approx(ours, abs=1e-3)
    assert ours == pytest.approx(0.524, abs=0.02)  # of |N(0, 1)|


def test_thresholds_are_per_picture_and_follow_the_noise_level():
    delta = random_latent(2, C, H, W, seed=4) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    both = Proximal().level(delta, 1.0)
    assert torch.equal(both[1:], Proximal().level(delta[1:], 1.0)) and both[1] > 5 * both[0]
    assert (
        float(Proximal(threshold=0.5).level(delta, 4.0)) == 2.0
    )  # eps units: differences of clean are sigma times larger


def guided_with(proximal, scale=7.5, positive=None, path_of=None):
    denoiser, path = path_of or inverted()
    target = positive or Context(SOURCE.tokens + random_latent(1, T, D, seed=7))
    embeddings = negative_prompt(denoiser, path, SOURCE, proximal=proximal)
    return denoiser, path, target, reconstruct(denoiser, path, target, negative=embeddings, guidance_scale=scale)


def test_cutting_nothing_is_npi_and_cutting_everything_is_the_source():
    denoiser, path, target, nothing = guided_with(Proximal(quantile=0.0))
    _, _, _, npi = guided_with(None)
    assert torch.allclose(nothing, npi, atol=1e-5)
    for mode in ("soft", "hard"):
        *_, everything = guided_with(Proximal(mode, quantile=1.0))
        assert torch.allclose(everything, path.source, atol=2e-5)
    *_, some = guided_with(Proximal())
    assert 0.01 < (some - path.source).norm() < (npi - path.source).norm()


def test_the_source_prompt_reconstructs_whatever_is_cut():
    denoiser, path = inverted()
    for proximal in (Proximal(), Proximal("hard", threshold=0.01), Proximal("soft", quantile=0.0)):
        *_, out = guided_with(proximal, positive=SOURCE, path_of=(denoiser, path))
        assert torch.allclose(out, path.source, atol=2e-5)


@pytest.mark.parametrize("pull_to", ["path", "source"])
def test_pulling_holds_what_is_not_edited(pull_to):
    """With a cut that keeps one row of cells, a full pull brings all others back to the source exactly."""

    def rule(z, sigma, value):
        return z - sigma * (0.3 * torch.sin(z) + value * torch.tensor([1.0, 0.01, 0.01]).view(1, 1, 3, 1))

    denoiser = ToyDenoiser(rule)
    latent = random_latent(1, C, H, W, seed=3)
    # an inexact inversion, so that there is something to pull back
    path = invert(denoiser, latent, prompt(0.2), torch.linspace(3, 0, 7), options=InversionOptions("current"))
    outs = {}
    for pull in (0.0, 1.0):
        proximal = Proximal("hard", threshold=0.1, pull=pull, pull_to=pull_to, dilation=0)
        embeddings = negative_prompt(denoiser, path, prompt(0.2), proximal=proximal)
        assert (embeddings.trajectory is None) == (pull == 0)
        outs[pull] = reconstruct(denoiser, path, prompt(0.9), negative=embeddings, guidance_scale=3.0)
    assert torch.allclose(outs[1.0][:, :, 1:], path.source[:, :, 1:], atol=1e-5)
    assert (outs[0.0][:, :, 1:] - path.source[:, :, 1:]).abs().max() > 1e-2
    assert (outs[1.0][:, :, 0] - path.source[:, :, 0]).abs().min() > 0.3


def test_a_partial_pull_takes_its_share_of_the_distance_after_the_step():
    """The published update: x' <- x' - lr (x' - Z') (1 - M), on the latent that the step reaches."""
    denoiser, path = inverted(batch=1)
    proximal = Proximal("soft", threshold=1e9, pull=0.3, dilation=0)
    z, sigma, target = path.level(1) + 0.5, float(path.sigmas[1]), float(path.sigmas[2])
    cond, uncond = denoiser.denoise(z, sigma, [NULL, SOURCE]).detach()
    clean = proximal.guide(z, sigma, cond, uncond, path, lambda c, u: mix(c, u, 7.5))
    reached = uncond + (z - uncond) * target / sigma
    expected = reached - 0.3 * (reached - path.level(2))
    assert torch.allclose(clean + (z - clean) * target / sigma, expected, atol=1e-5)


def test_what_may_change_grows_and_the_pull_has_its_levels():
    denoiser, path = inverted(batch=1)
    z, sigma = path.level(2) + 0.5, float(path.sigmas[2])
    uncond = torch.zeros(1, C, H, W)
    cond = torch.zeros(1, C, H, W)
    cond[:, :, 0, 0] = 1.0

    def pulled(**change):
        return Proximal(**{"threshold": 0.0, "pull": 1.0, "pull_to": "source", **change}).guide(
            z, sigma, cond, uncond, path, lambda c, u: mix(c, u, 2.0)
        )

    held = [(pulled(dilation=r) == path.source).sum().item() // C for r in (0, 1, 2)]
    assert held == [5, 2, 0]
    assert not (pulled(pull_below=sigma) == path.source).any()
    assert (pulled(pull_below=sigma * 1.01, dilation=0) == path.source).sum() == 5 * C
    # as published, a soft cut at 0.6 leaves 0.4, which is then compared with 0.6 again
    published = pulled(threshold=0.6 / sigma, mask_of_shrunk=True, dilation=0)
    assert torch.allclose(published, path.source, atol=1e-6)
    assert (pulled(threshold=0.6 / sigma, dilation=0) - path.source)[:, :, 0, 0].abs().max() > 0.1


def test_the_path_of_other_pictures_is_refused():
    _, path = inverted(batch=2)
    z = torch.zeros(3, C, H, W)
    with pytest.raises(ShapeError, match="trajectory has 2"):
        Proximal(pull=1.0, pull_to="source").guide(z, 1.0, z + 1, z, path, lambda c, u: mix(c, u, 2.0))


@pytest.mark.parametrize(
    "change",
    [{"mode": "l1"}, {"quantile": 1.1}, {"pull": -0.1}, {"pull_to": "moon"}, {"dilation": -1}, {"threshold": -1.0}],
)
def test_impossible_cuts_are_refused(change):
    with pytest.raises(ParameterError, match=next(iter(change))):
        Proximal(**change)
