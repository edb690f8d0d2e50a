"""Options that are named after published code, against that code's own equations in the scale it is written in.

Each loop below is transcribed from the script or paper that its docstring names (docs/methods.md says where), in DDIM's
variance-preserving latent x = z / sqrt(1 + sigma^2) and with predictions of eps, on a network that is a formula.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from editkit.pipelines.blended.blending import BlendOptions, blended_denoise
from editkit.pipelines.blended.decoder_tuning import LatentSettings, latent_scale, tune_latent
from editkit.pipelines.core.errors import ParameterError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule, dilate
from editkit.pipelines.core.noise import seeded_noise
from editkit.pipelines.core.sigmas import ENDS, PublishedGrid, leading_sigmas
from editkit.pipelines.diffedit.edit import masked_decode
from editkit.pipelines.inversion.ddim import InversionOptions, invert, reconstruct
from editkit.pipelines.inversion.negative_prompt import negative_prompt
from editkit.pipelines.inversion.null_text import NullTextOptions, null_text
from editkit.pipelines.inversion.proximal import Proximal
from editkit.tests.toy_codec import ToyCodec, box, random_image
from editkit.tests.toy_tokens import NULL, SOURCE, TokenDenoiser
from editkit.tests.toys import ToyDenoiser, prompt, random_latent, sd_table

SHAPE = (1, 4, 8, 8)
SCALE = 3.0
SEEDS = [5]
MASK = torch.zeros(1, 8, 8)
MASK[:, 2:6, 3:7] = 1
PROMPTS = EditPrompts(prompt(1.0), prompt(0.0), SCALE)


def eps_of(x: Tensor, sigma: float, value: float) -> Tensor:
    """A network: it sees the variance-preserving latent, and every latent pixel depends on all."""
    return torch.sin(2 * x + x.mean(dim=(1, 2, 3), keepdim=True)) * (0.5 + 0.1 * sigma / (1 + sigma)) + 0.3 * value


def guided_eps(x: Tensor, sigma: float) -> Tensor:
    cond, uncond = eps_of(x, sigma, 1.0), eps_of(x, sigma, 0.0)
    return uncond + SCALE * (cond - uncond)


def denoiser() -> ToyDenoiser:
    return ToyDenoiser(lambda z, sigma, value: z - sigma * eps_of(z / (1 + sigma * sigma) ** 0.5, sigma, value))


def abar(sigma: float) -> float:
    return 1 / (1 + sigma * sigma)


def ddim(x: Tensor, eps: Tensor, sigma: float, target: float) -> Tensor:
    """DDIMScheduler.step with eta 0."""
    a, b = abar(sigma), abar(target)
    clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return b**0.5 * clean + (1 - b) ** 0.5 * eps


def grid(steps: int = 12, strength: float = 0.75, *, ends_at_zero: bool = False) -> Tensor:
    """The grid of the scripts, which ends at the first training sigma."""
    sigmas = leading_sigmas(sd_table(), steps, strength)
    return sigmas if ends_at_zero else torch.cat([sigmas[:-1], sd_table()[:1]])


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("ends_at_zero", [False, True])
def test_background_of_the_sd2_script(ends_at_zero):
    """Blended Latent Diffusion's SD2 script: DDIM, then add_noise of the source at the timestep before the step."""
    sigmas, source = grid(ends_at_zero=ends_at_zero), random_latent(*SHAPE, seed=1)
    values = sigmas.tolist()
    x = noise = seeded_noise(SHAPE[1:], SEEDS)
    for i, (sigma, target) in enumerate(zip(values, values[1:], strict=False)):
        x = ddim(x, guided_eps(x, sigma), sigma, target)
        fresh = seeded_noise(SHAPE[1:], SEEDS, draw=2 * i + 1)
        x = x * MASK + (abar(sigma) ** 0.5 * source + (1 - abar(sigma)) ** 0.5 * fresh) * (1 - MASK)
    options = BlendOptions(background_level="previous (DDIM)", background_noise="fresh")
    start = noise * (1 + values[0] ** 2) ** 0.5
    z = blended_denoise(
        denoiser(), start, source, sigmas, constant_schedule(MASK), PROMPTS, seeds=SEEDS, options=options
    )
    assert error(z / (1 + values[-1] ** 2) ** 0.5, x) < 1e-5


def test_background_of_the_sdxl_script():
    """Its SDXL script: EulerDiscreteScheduler, whose latent and add_noise are source + sigma x noise."""
    sigmas, source = grid(), random_latent(*SHAPE, seed=1)
    values = sigmas.tolist()
    z = source + values[0] * seeded_noise(SHAPE[1:], SEEDS)
    start = z
    for i, (sigma, target) in enumerate(zip(values, values[1:], strict=False)):
        z = z + (target - sigma) * guided_eps(z / (1 + sigma * sigma) ** 0.5, sigma)
        fresh = seeded_noise(SHAPE[1:], SEEDS, draw=2 * i + 1)
        z = z * MASK + (source + sigma * fresh) * (1 - MASK)
    options = BlendOptions(background_level="previous", background_noise="fresh")
    ours = blended_denoise(
        denoiser(), start, source, sigmas, constant_schedule(MASK), PROMPTS, seeds=SEEDS, options=options
    )
    assert error(ours, z) < 1e-5


def test_legacy_offset_of_diffedit():
    """diffusers' StableDiffusionDiffEditPipeline: after step i the outside is image_latents[i], noisiest first."""
    model, ratio = denoiser(), 0.8
    latent, sigmas = random_latent(*SHAPE, seed=1), grid(10, 1.0, ends_at_zero=True)
    path = invert(model, latent, prompt(0.5), sigmas, options=InversionOptions("next"), ratio=ratio)
    values = path.sigmas.tolist()[path.first :]
    image_latents = [path.latent(path.first + i) / (1 + sigma * sigma) ** 0.5 for i, sigma in enumerate(values[:-1])]
    x = image_latents[0]
    for i, (sigma, target) in enumerate(zip(values, values[1:], strict=False)):
        x = ddim(x, guided_eps(x, sigma), sigma, target)
        x = x * MASK + image_latents[i] * (1 - MASK)
    ours = masked_decode(model, path, constant_schedule(MASK), PROMPTS, ratio=ratio, legacy_offset=True)
    assert error(ours, x) < 1e-5


def published_prox(mode: str, delta: Tensor, threshold: Tensor) -> Tensor:
    """ptp_utils.diffusion_step: "l0" shrinks once; "l1" shrinks what is left once more, by its sign."""
    delta = delta - delta.clamp(-threshold, threshold)
    if mode == "l1":
        delta = torch.where(delta > 0, delta - threshold, delta)
        delta = torch.where(delta < 0, delta + threshold, delta)
    return delta


@pytest.mark.parametrize("target", ["path", "source"])
@pytest.mark.parametrize("mode, ours", [("l0", "soft"), ("l1", "published l1")])
def test_proximal_guidance_of_the_published_code(mode, ours, target):
    """ProxNPI (phymhan/prompt-to-prompt): proximal step on eps, then inversion or reconstruction guidance with rate 0.1.

    Source and target are one batch there: the quantile runs over both, and the source's difference is 0.
    """
    model, rate, quantile, below = denoiser(), 0.1, 0.7, 2.0
    latent, sigmas = random_latent(*SHAPE, seed=1), grid(10, 1.0, ends_at_zero=True)
    path = invert(model, latent, prompt(0.0), sigmas, options=InversionOptions("next"))
    values = sigmas.tolist()
    x = path.latent(0) / (1 + values[0] ** 2) ** 0.5
    for i, (sigma, following) in enumerate(zip(values, values[1:], strict=False)):
        uncond = eps_of(x, sigma, 0.0)
        delta = eps_of(x, sigma, 1.0) - uncond
        threshold = torch.cat([torch.zeros_like(delta), delta]).abs().quantile(quantile)
        delta = published_prox(mode, delta, threshold)
        eps = uncond + SCALE * delta
        stays = 1 - dilate((delta.abs() > threshold).float(), 3) if sigma < below else torch.zeros_like(delta)
        a, b = abar(sigma), abar(following)
        clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
        if target == "source":
            clean = clean - rate * (clean - path.source) * stays
        x = b**0.5 * clean + (1 - b) ** 0.5 * eps
        if target == "path":
            x = x - rate * (x - path.latent(i + 1) / (1 + following**2) ** 0.5) * stays
    proximal = Proximal(
        ours,
        quantile,
        batch_quantile=True,
        mask_of_shrunk=True,
        inversion_guidance=rate,
        inversion_guidance_below=below,
        inversion_guidance_target=target,
    )
    negative = negative_prompt(model, path, prompt(0.0), proximal=proximal)
    z = reconstruct(model, path, prompt(1.0), negative=negative, guidance_scale=SCALE)
    assert error(z, x) < 1e-5


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("strength, rounding", [(1.0, "up"), (0.75, "up"), (0.75, "down"), (0.29, "down")])
def test_grids_of_the_published_scripts(offset, strength, rounding):
    """DDIMScheduler with set_alpha_to_one=False; a fractional strength as diffusers' get_timesteps counts it."""
    steps = 100 if strength == 0.29 else 50
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=offset
    )
    scheduler.set_timesteps(steps)
    count = min(int(steps * strength), steps) if rounding == "down" else steps - int(steps * (1 - strength))
    timesteps = scheduler.timesteps[steps - count :].tolist()
    table = sd_table()
    for end in ENDS:
        sigmas = PublishedGrid(offset, end, rounding).sigmas(table, steps, strength)
        last = [0.0] if end == ENDS[0] else [float(table[0])] if offset else []  # offset 0 is at that sigma already
        assert sigmas.tolist() == [float(table[t]) for t in timesteps] + last


def test_sd2_script_on_its_own_grid():
    """980 ... 0 from timestep 740 on, unit noise; the last step of the script goes from abar[0] to itself."""
    sigmas, table = PublishedGrid(0, ENDS[1]).sigmas(sd_table(), 50, 0.75), sd_table()
    timesteps, noise = list(range(740, -1, -20)), seeded_noise(SHAPE[1:], SEEDS)
    x = noise
    for t in timesteps:
        sigma, target = float(table[t]), float(table[max(t - 20, 0)])
        x = ddim(x, guided_eps(x, sigma), sigma, target)
    start = noise * (1 + float(sigmas[0]) ** 2) ** 0.5
    full = constant_schedule(torch.ones(1, 8, 8))
    z = blended_denoise(denoiser(), start, random_latent(*SHAPE), sigmas, full, PROMPTS, seeds=SEEDS)
    assert len(sigmas) == len(timesteps) and error(z / (1 + float(table[0]) ** 2) ** 0.5, x) < 1e-5


def test_a_published_grid_without_steps_or_with_unknown_words_is_refused():
    with pytest.raises(ParameterError, match="none is left"):
        PublishedGrid(rounding="down").sigmas(sd_table(), 50, 0.01)
    for wrong in ({"offset": 2}, {"end": "1"}, {"rounding": "even"}):
        with pytest.raises(ParameterError, match="offset is"):
            PublishedGrid(**wrong)
    assert torch.equal(PublishedGrid().sigmas(sd_table(), 50, 0.75), leading_sigmas(sd_table(), 50, 0.75))


@pytest.mark.parametrize("steps", [8, 30])
def test_null_text_with_its_published_rate(steps):
    """google/prompt-to-prompt, NullInversion.null_optimization: Adam at 0.01 (1 - i / 100) for any number of steps."""
    model, inner, scale = TokenDenoiser(), 3, 7.5
    sigmas = torch.linspace(3, 0, steps + 1)
    latent = random_latent(1, 4, 3, 2, seed=3)
    path = invert(model, latent, SOURCE, sigmas, options=InversionOptions("current"))
    values = sigmas.tolist()
    published = [path.latent(i) / (1 + sigma * sigma) ** 0.5 for i, sigma in enumerate(values)]

    def predict(x, sigma, tokens):
        z = x * (1 + sigma * sigma) ** 0.5
        return (z - model.denoise(z, sigma, [SOURCE.with_tokens(tokens)])[0]) / sigma

    x, uncond, learned = published[0], NULL.tokens.clone(), []
    for i, (sigma, target) in enumerate(zip(values, values[1:], strict=False)):
        uncond = uncond.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([uncond], lr=1e-2 * (1.0 - i / 100.0))
        cond = predict(x, sigma, SOURCE.tokens).detach()
        for _ in range(inner):
            eps = predict(x, sigma, uncond)
            loss = torch.nn.functional.mse_loss(ddim(x, eps + scale * (cond - eps), sigma, target), published[i + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learned.append(uncond.detach())
        eps = predict(x, sigma, uncond).detach()
        x = ddim(x, eps + scale * (cond - eps), sigma, target)
    options = NullTextOptions(scale, inner, tolerance=0, tolerance_growth=0, published_rate=True)
    found = null_text(model, path, SOURCE, NULL, options=options)
    assert error(found.rebuilt, x) < 1e-5
    assert error(found.embeddings.tokens, torch.stack(learned)) < 5e-5, "Adam divides small gradients by themselves"


def test_the_published_rate_ends_at_a_hundred_steps():
    with pytest.raises(ParameterError, match="101 steps"):
        NullTextOptions(published_rate=True).rate(0, 101)


def test_latent_tuning_at_its_published_rate():
    """BLD's image_reconstruction.py, mode latents: Adam at 0.1 on the scaled latent, losses as means over all elements."""
    codec, steps = ToyCodec(), 25
    source, mask = random_image(1, 16, 16, seed=1), box(1, 16, 16, (4, 12), (4, 12))
    latent = codec.encode(random_image(1, 16, 16, seed=2))

    def decode(scaled):
        for stage in codec.decoder:
            scaled = stage(scaled)
        return scaled

    scaled = (latent * codec.scale).requires_grad_(True)
    edited, wanted, m = decode(scaled).detach(), source.movedim(-1, 1) * 2 - 1, mask[:, None]
    optimizer, losses = torch.optim.Adam([scaled], lr=0.1), []
    for _ in range(steps):
        image = decode(scaled)
        inside = torch.nn.functional.mse_loss(image * m, edited * m)
        loss = inside + 100 * torch.nn.functional.mse_loss(image * (1 - m), wanted * (1 - m))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model = ToyDenoiser(lambda z, sigma, value: z, scale=codec.scale, channels=3)
    scale = latent_scale(model)
    assert scale == pytest.approx(codec.scale)
    found = tune_latent(codec, latent, source, None, mask, settings=LatentSettings(steps, latent_scale=scale))
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert error(found.latent * codec.scale, scaled.detach()) < 1e-5
