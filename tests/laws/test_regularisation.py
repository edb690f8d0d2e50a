"""Regularised inversion (pix2pix-zero): closed forms of both gradients, and trajectories that they change as computed."""

from __future__ import annotations

import pytest
import torch

from editkit.pipelines.core.errors import FamilyError, ParameterError
from editkit.pipelines.inversion.ddim import InversionOptions, invert
from editkit.pipelines.inversion.regularisation import (
    Regularisation,
    auto_correlation_gradient,
    kl_gradient,
    pyramid_sides,
)
from editkit.tests.toys import ToyDenoiser, prompt, random_latent

SHAPE = (2, 4, 16, 12)
COUNT = 4 * 16 * 12
KL = Regularisation(steps=1, auto_correlation=0.0)


def field(seed: int = 3) -> torch.Tensor:
    return 1.7 * random_latent(*SHAPE, seed=seed).double() + 0.3


def moments(eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return eps.mean(dim=(1, 2, 3), keepdim=True), eps.var(dim=(1, 2, 3), keepdim=True)


def after_kl(eps: torch.Tensor, weight: float) -> torch.Tensor:
    """One round: the mean shrinks by 1 - 2 w / n, the deviations from it by 1 - 2 w (1 - 1 / var) / (n - 1)."""
    mean, variance = moments(eps)
    scale = 1 - 2 * weight * (1 - 1 / (variance + 1e-7)) / (COUNT - 1)
    return mean * (1 - 2 * weight / COUNT) + (eps - mean) * scale


def test_kl_scales_mean_and_deviation_by_known_factors():
    eps = field()
    assert torch.allclose(KL(eps, 0), after_kl(eps, 20.0), rtol=1e-12)
    assert torch.allclose(eps - 20 * kl_gradient(eps), after_kl(eps, 20.0), rtol=1e-12)


def test_kl_ends_at_unit_noise():
    """Mean 0 and variance 1 are the only fixed point, and it is reached from both sides."""
    for scale in (0.3, 2.5):
        mean, variance = moments(Regularisation(steps=400, auto_correlation=0.0, kl=40.0)(scale * field(), 0))
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-6)
        assert torch.allclose(variance, torch.ones_like(variance), atol=1e-6)


def test_auto_correlation_of_a_constant_has_a_closed_gradient():
    """Every shift of a constant c gives mean c^2 at each size: 2 axes x 2 sizes of (c^2)^2, of gradient 4 c^3 / n a pixel."""
    eps = torch.full((1, 1, 16, 16), 0.7, dtype=torch.float64)
    gradient = auto_correlation_gradient(eps, torch.tensor([[[3, 1]]]))
    assert torch.allclose(gradient, torch.full_like(eps, 2 * 2 * 4 * 0.7**3 / 256), rtol=1e-12)


def test_auto_correlation_falls_and_the_pyramid_ends_at_eight():
    assert [pyramid_sides(side) for side in (64, 20, 9, 8, 3)] == [[64, 32, 16, 8], [20, 10, 5], [9, 4], [8], [3]]
    smooth = torch.nn.functional.avg_pool2d(random_latent(1, 4, 34, 34, seed=1), 3, 1)

    def correlation(eps):
        return sum(float((eps * eps.roll(k, axis)).mean()) ** 2 for k in (1, 2) for axis in (2, 3))

    after = Regularisation(kl=0.0)(smooth, 0)
    assert correlation(after) < correlation(smooth)


@pytest.mark.parametrize("mode", ["next", "current"])
def test_inversion_of_a_constant_field_ends_where_the_regularised_field_leads(mode):
    """D = z - sigma eps: every step adds its own length times the same regularised noise."""
    eps, z = field(), random_latent(*SHAPE, seed=5).double()
    denoiser, sigmas = ToyDenoiser(lambda x, sigma, value: x - sigma * eps), torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0])
    found = invert(denoiser, z, prompt(), sigmas, options=InversionOptions(mode, regularisation=KL))
    for index, sigma in enumerate(sigmas.tolist()):
        assert torch.allclose(found.latent(index), z + sigma * after_kl(eps, 20.0), rtol=1e-9)
    assert denoiser.forward_passes == 4 * 2  # the network is not asked again


def test_without_weights_it_is_the_plain_inversion():
    eps, z = field(), random_latent(*SHAPE, seed=5).double()
    denoiser, sigmas = ToyDenoiser(lambda x, sigma, value: x - sigma * eps), torch.tensor([2.0, 1.0, 0.0])
    off = Regularisation(auto_correlation=0.0, kl=0.0)
    plain = invert(denoiser, z, prompt(), sigmas)
    assert torch.equal(
        invert(denoiser, z, prompt(), sigmas, options=InversionOptions(regularisation=off)).latents, plain.latents
    )


def test_no_image_depends_on_its_batch_and_shifts_depend_on_seed_and_step():
    eps, chosen = field(), Regularisation(steps=2)
    whole = chosen(eps, 3)
    assert torch.allclose(chosen(eps[:1], 3), whole[:1], rtol=1e-12)
    assert torch.equal(whole, chosen(eps, 3))
    for other in (Regularisation(steps=2, seed=1)(eps, 3), chosen(eps, 4)):
        assert not torch.allclose(other, whole, rtol=1e-6)


def test_what_cannot_be_regularised_is_refused_by_name():
    with pytest.raises(ParameterError, match="mode is 'implicit'"):
        InversionOptions("implicit", regularisation=Regularisation())
    with pytest.raises(FamilyError, match="predict no noise"):
        options = InversionOptions("current", regularisation=Regularisation())
        invert(ToyDenoiser(lambda z, s, v: z, flow=True), field(), prompt(), torch.tensor([1.0, 0.0]), options=options)
    for wrong in ({"steps": 0}, {"rolls": 0}, {"kl": -1.0}, {"auto_correlation": float("nan")}):
        with pytest.raises(ParameterError):
            Regularisation(**wrong)
