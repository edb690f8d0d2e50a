"""Guided reconstruction: null-text, negative-prompt and proximal inversion, and the embeddings that carry them (T13)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editkit.pipelines.blending import EditPrompts, blended_denoise
from editkit.pipelines.diffedit import masked_decode
from editkit.pipelines.embeddings import Embeddings, load_embeddings, save_embeddings
from editkit.pipelines.errors import LoadError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.guidance import guided
from editkit.pipelines.inversion import InversionOptions, invert, reconstruct
from editkit.pipelines.masks import constant_schedule
from editkit.pipelines.nulltext import NullTextOptions, negative_prompt, null_text, slerp
from editkit.pipelines.protocols import Context
from editkit.pipelines.proximal import Proximal, hard, published_l1, quantile, soft
from editkit.pipelines.samplers import predictor, sample
from editkit.tests.toys import ToyDenoiser, prompt, random_latent

B, C, H, W, T, D = 2, 4, 3, 2, 2, 12
SOURCE, NULL = (
    Context(random_latent(1, T, D, seed=1) * 0.2, text="source"),
    Context(random_latent(1, T, D, seed=2) * 0.2),
)
EXACT = InversionOptions("implicit", iterations=60, tolerance=1e-7)


class TokenDenoiser(ToyDenoiser):
    """The derivative is 0.3 sin(z) plus a smooth function of the tokens [R, T, 12], one value per channel and row.

    `parameter` is its one weight.
    """

    def __init__(self, scale: float = 1.0, gain: float = 0.3):
        super().__init__(lambda z, sigma, value: z, scale=scale)
        self.parameter = torch.tensor(gain, requires_grad=True)
        self.log: list[tuple[int, int]] = []

    def denoise(self, z, sigma, contexts):
        self.rows += len(contexts) * len(z)
        self.calls += 1
        self.log.append((len(contexts), sum(c.tokens.requires_grad for c in contexts)))
        return torch.stack([z - sigma * (0.3 * torch.sin(z) + self._pull(c.tokens)) for c in contexts])

    def _pull(self, tokens):
        rows = torch.tanh(tokens).sum(1) * self.parameter
        return rows.reshape(len(rows), C, H, 1)


def inverted(denoiser=None, batch: int = B, steps: int = 6, **kwargs):
    denoiser = denoiser or TokenDenoiser()
    latent = random_latent(batch, C, H, W, seed=3) * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1)
    with torch.no_grad():
        path = invert(denoiser, latent, SOURCE, torch.linspace(3, 0, steps + 1), options=EXACT, **kwargs)
    denoiser.rows = denoiser.calls = 0
    denoiser.log.clear()
    return denoiser, path


ALWAYS = dict(tolerance=0.0, tolerance_growth=0.0)
NEVER = dict(tolerance=1e9, tolerance_growth=0.0)


# null-text inversion


def test_null_text_brings_guided_sampling_back_to_the_source():
    denoiser, path = inverted()
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=40, lr=0.1, **ALWAYS))
    plain = reconstruct(denoiser, path, SOURCE, negative=NULL, guidance_scale=7.5)
    learned = reconstruct(denoiser, path, SOURCE, negative=result.embeddings, guidance_scale=7.5)
    assert torch.allclose(learned, result.rebuilt, atol=1e-5)
    assert (learned - path.source).norm() < 0.05 * (plain - path.source).norm()


def test_rows_are_one_conditional_and_one_per_update_and_one_to_advance():
    denoiser, path = inverted(batch=1)
    null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=4, **ALWAYS))
    assert denoiser.rows == 6 * (1 + 4 + 1)
    one_step = [(1, 0), *[(1, 1)] * 4, (1, 0)]  # (contexts, of them learning)
    assert denoiser.log == one_step * 6


def test_no_updates_is_sampling_with_the_empty_prompt():
    denoiser, path = inverted()
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=0))
    plain = reconstruct(denoiser, path, SOURCE, negative=NULL, guidance_scale=7.5)
    assert torch.allclose(result.rebuilt, plain, atol=1e-5) and result.updates == [0] * 6
    for step in range(6):
        assert torch.equal(result.embeddings.at(step).tokens, NULL.tokens.expand(B, T, D))


def test_at_guidance_1_there_is_nothing_to_learn():
    denoiser, path = inverted()
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(guidance_scale=1.0, **ALWAYS))
    assert torch.equal(result.embeddings.at(3).tokens, NULL.tokens.expand(B, T, D))
    assert denoiser.rows == 6 * B
    assert torch.allclose(result.rebuilt, path.source, atol=1e-4)


def test_the_loss_falls_and_steps_start_where_the_last_one_ended():
    denoiser, path = inverted(batch=1)
    few = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=2, **ALWAYS))
    many = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=20, **ALWAYS))
    assert many.losses[0] < few.losses[0]
    still = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=1, lr=1e-9, **ALWAYS))
    assert torch.allclose(still.embeddings.at(5).tokens, NULL.tokens, atol=1e-6)
    # one update of lr 0.01 (1 - i / 12) each: Adam's first update is lr, warm starts add them up
    one = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=1, **ALWAYS))
    moved = [
        (one.embeddings.at(i).tokens - (one.embeddings.at(i - 1).tokens if i else NULL.tokens)).abs().max()
        for i in range(6)
    ]
    assert torch.allclose(torch.stack(moved), 0.01 * (1 - torch.arange(6) / 12), rtol=1e-2)


def test_published_rates_and_thresholds():
    options = NullTextOptions()
    assert (options.guidance_scale, options.inner) == (7.5, 10)
    assert [options.rate(i, 50) for i in (0, 25, 49)] == pytest.approx([1e-2 * (1 - i / 100) for i in (0, 25, 49)])
    assert [options.threshold(i) for i in (0, 49)] == pytest.approx([1e-5, 1e-5 + 49 * 2e-5])


def test_early_stop_comes_after_the_update_that_follows_the_measurement():
    denoiser, path = inverted(batch=1)
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=10, **NEVER))
    assert result.updates == [1] * 6 and denoiser.rows == 6 * 3
    assert not torch.equal(result.embeddings.at(0).tokens, NULL.tokens)


def test_losses_are_measured_in_the_variance_preserving_scale():
    denoiser, path = inverted(batch=1)
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=1, **ALWAYS))
    levels = path.sigmas.tolist()
    z = path.level(0)
    cond, uncond = denoiser.denoise(z, levels[0], [SOURCE, NULL]).detach()
    clean = uncond + 7.5 * (cond - uncond)
    reached = clean + (z - clean) * (levels[1] / levels[0])
    scale = (1 + levels[1] ** 2) ** 0.5
    expected = ((reached - path.level(1)) / scale).square().mean()
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_images_do_not_influence_each_other():
    """One image starts at the threshold, the others meet it later; each ends as it does alone."""
    denoiser, path = inverted(batch=3)
    starts = torch.cat([SOURCE.tokens, NULL.tokens, -3 * SOURCE.tokens])
    options = NullTextOptions(inner=12, lr=0.05, tolerance=2e-3, tolerance_growth=0.0)
    together = null_text(denoiser, path, SOURCE, NULL.with_tokens(starts), options=options)
    updates = []
    for i in range(3):
        alone_path = dataclasses.replace(path, latents=path.latents[:, i : i + 1], clean=path.clean[i : i + 1])
        alone = null_text(denoiser, alone_path, SOURCE, NULL.with_tokens(starts[i : i + 1]), options=options)
        updates.append(alone.updates)
        for step in range(6):
            ours = together.embeddings.at(step).tokens[i : i + 1]
            assert torch.allclose(ours, alone.embeddings.at(step).tokens, atol=1e-5)
    assert any(len(set(counts)) > 1 for counts in zip(*updates, strict=True)), updates
    assert together.updates == [max(counts) for counts in zip(*updates, strict=True)]


def test_the_model_receives_no_gradient_and_inference_mode_does_not_matter():
    denoiser, path = inverted()
    with torch.inference_mode():
        frozen = dataclasses.replace(path, latents=path.latents.clone())
        result = null_text(denoiser, frozen, SOURCE.with_tokens(SOURCE.tokens.clone()), NULL)
    assert denoiser.parameter.grad is None
    assert not result.embeddings.at(0).tokens.requires_grad and not result.rebuilt.requires_grad
    assert not result.embeddings.at(0).tokens.is_inference()


def test_cancel_in_the_middle_leaves_nothing_behind():
    denoiser, path = inverted()

    class Cancelled(Exception):
        pass

    seen = []

    def progress(done, total, preview=None):
        seen.append((done, total))
        if len(seen) == 9:
            raise Cancelled

    with pytest.raises(Cancelled):
        null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=4, **ALWAYS), progress=progress)
    assert seen[-1] == (8, 24) and denoiser.parameter.grad is None and not NULL.tokens.requires_grad


@pytest.mark.parametrize(
    "change", [{"inner": 3, **ALWAYS}, {"inner": 3, **NEVER}, {"inner": 0}, {"guidance_scale": 1.0}]
)
def test_progress_reaches_its_total(change):
    denoiser, path = inverted()
    seen = []
    options = NullTextOptions(**change)
    null_text(denoiser, path, SOURCE, NULL, options=options, progress=lambda *told: seen.append(told[:2]))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_null_text_after_a_partial_inversion():
    denoiser, path = inverted(steps=10, ratio=0.6)
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=20, lr=0.1, **ALWAYS))
    assert result.embeddings.first == 4 and len(result.updates) == 6
    with pytest.raises(MismatchError, match="steps 4 to 9, not 3"):
        result.embeddings.at(3)
    learned = reconstruct(denoiser, path, SOURCE, negative=result.embeddings, guidance_scale=7.5)
    assert torch.allclose(learned, result.rebuilt, atol=1e-5)


def test_another_prompt_or_model_is_refused():
    denoiser, path = inverted()
    with pytest.raises(MismatchError, match="positive is not the prompt"):
        null_text(denoiser, path, NULL, NULL)
    denoiser.fingerprint = "another"
    with pytest.raises(MismatchError, match="another model"):
        null_text(denoiser, path, SOURCE, NULL)


# negative-prompt inversion


@pytest.mark.parametrize("scale", [1.0, 7.5, 20.0])
def test_npi_reconstructs_at_every_scale(scale):
    denoiser, path = inverted()
    embeddings = negative_prompt(denoiser, path, SOURCE)
    out = reconstruct(denoiser, path, SOURCE, negative=embeddings, guidance_scale=scale)
    assert torch.allclose(out, path.source, atol=2e-5)
    assert not torch.allclose(
        reconstruct(denoiser, path, SOURCE, negative=NULL, guidance_scale=7.5), path.source, atol=0.1
    )


def test_npi_moves_on_the_great_circle_towards_the_empty_prompt():
    denoiser, path = inverted()
    a, b = SOURCE.tokens, NULL.tokens
    for share, expected in ((0.0, a), (1.0, b)):
        made = negative_prompt(denoiser, path, SOURCE, null=NULL, interpolation=share)
        assert torch.allclose(made.at(0).tokens, expected, atol=1e-6)
    unit_a, unit_b = a / a.norm(), b / b.norm()
    middle = slerp(unit_a, unit_b, 0.5)
    assert float(middle.norm()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(middle, (unit_a + unit_b) / (unit_a + unit_b).norm(), atol=1e-5)
    assert torch.allclose(slerp(a, 2 * a, 0.25), 1.25 * a, atol=1e-6)
    with pytest.raises(ParameterError, match="interpolation"):
        negative_prompt(denoiser, path, SOURCE, interpolation=0.5)
    with pytest.raises(ShapeError, match="token count"):
        slerp(a, b[:, :1], 0.5)


# ProxNPI


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
        assert (embeddings.path is None) == (pull == 0)
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
    clean = proximal.guide(denoiser, z, sigma, cond, uncond, 7.5, path)
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
            denoiser, z, sigma, cond, uncond, 2.0, path
        )

    held = [(pulled(dilation=r) == path.source).sum().item() // C for r in (0, 1, 2)]
    assert held == [5, 2, 0]
    assert not (pulled(pull_below=sigma) == path.source).any()
    assert (pulled(pull_below=sigma * 1.01, dilation=0) == path.source).sum() == 5 * C
    # as published, a soft cut at 0.6 leaves 0.4, which is then compared with 0.6 again
    published = pulled(threshold=0.6 / sigma, mask_of_shrunk=True, dilation=0)
    assert torch.allclose(published, path.source, atol=1e-6)
    assert (pulled(threshold=0.6 / sigma, dilation=0) - path.source)[:, :, 0, 0].abs().max() > 0.1


@pytest.mark.parametrize(
    "change",
    [{"mode": "l1"}, {"quantile": 1.1}, {"pull": -0.1}, {"pull_to": "moon"}, {"dilation": -1}, {"threshold": -1.0}],
)
def test_impossible_cuts_are_refused(change):
    with pytest.raises(ParameterError, match=next(iter(change))):
        Proximal(**change)


# embeddings wherever a negative is


def learned(denoiser, path) -> Embeddings:
    tokens = NULL.tokens + 0.3 * random_latent(6, 1, T, D, seed=9)
    return dataclasses.replace(negative_prompt(denoiser, path, SOURCE), base=NULL, tokens=tokens)


def test_every_step_sees_its_own_embedding():
    denoiser, path = inverted()
    embeddings = learned(denoiser, path)
    for step, sigma in enumerate(path.sigmas.tolist()[:-1]):
        assert torch.equal(embeddings.at(step).tokens, embeddings.tokens[step])
        for level in (sigma, sigma * 0.99):  # a sampler may look between two levels
            assert torch.equal(embeddings.at_sigma(level).tokens, embeddings.tokens[step])
        by_hand = guided(denoiser, path.level(step), sigma, SOURCE, embeddings.at(step), 5.0)
        assert torch.equal(guided(denoiser, path.level(step), sigma, SOURCE, embeddings, 5.0), by_hand)


def test_embeddings_work_in_blending_decoding_and_samplers():
    denoiser, path = inverted()
    embeddings = learned(denoiser, path)
    with torch.no_grad():
        prompts = EditPrompts(SOURCE, embeddings, 5.0)
        full = constant_schedule(torch.ones(1, H, W))
        expected = reconstruct(denoiser, path, SOURCE, negative=embeddings, guidance_scale=5.0)
        blended = blended_denoise(denoiser, path.level(0), path, path.sigmas, full, prompts, seeds=[0, 0])
        sampled = sample("euler", predictor(denoiser, prompts), path.level(0), path.sigmas)
        decoded = masked_decode(denoiser, path, full, prompts, ratio=1.0)
    assert torch.equal(blended, expected) and torch.equal(sampled, expected) and torch.equal(decoded, expected)
    constant = reconstruct(denoiser, path, SOURCE, negative=embeddings.at(0), guidance_scale=5.0)
    assert not torch.allclose(constant, expected, atol=1e-3)


def test_ranges_see_the_embeddings_of_the_whole_grid():
    denoiser, path = inverted()
    prompts, full = EditPrompts(SOURCE, learned(denoiser, path), 5.0), constant_schedule(torch.ones(1, H, W))

    def run(z, sigmas, **kwargs):
        return blended_denoise(denoiser, z, path, sigmas, full, prompts, seeds=[0, 0], **kwargs)

    first = run(path.level(0), path.sigmas, end=2)
    whole = run(path.level(0), path.sigmas)
    assert torch.equal(whole, run(first, path.sigmas, start=2)) and torch.equal(whole, run(first, path.sigmas[2:]))


def test_at_guidance_1_embeddings_cost_no_row():
    denoiser, path = inverted(batch=1)
    guided(denoiser, path.level(0), 3.0, SOURCE, learned(denoiser, path), 1.0)
    assert denoiser.rows == 1


def test_other_models_and_grids_are_refused():
    denoiser, path = inverted()
    embeddings = learned(denoiser, path)
    with pytest.raises(MismatchError, match="embeddings was made on 6 steps"):
        embeddings.check(denoiser, torch.linspace(3, 0, 6))
    embeddings.check(denoiser, path.sigmas[2:])
    other = TokenDenoiser()
    other.fingerprint = "other weights"
    with pytest.raises(MismatchError, match="other weights"):
        reconstruct(
            other,
            dataclasses.replace(path, fingerprint="other weights"),
            SOURCE,
            negative=embeddings,
            guidance_scale=2.0,
        )
    z, sigmas = path.level(0), torch.linspace(4, 0, 5)
    with pytest.raises(MismatchError, match="embeddings"):
        prompts = EditPrompts(SOURCE, embeddings, 5.0)
        blended_denoise(denoiser, z, z, sigmas, constant_schedule(torch.ones(1, H, W)), prompts, seeds=[0, 0])


# files


@pytest.mark.parametrize("kind", ["null-text", "npi", "prox"])
def test_saved_embeddings_come_back(kind, tmp_path):
    denoiser, path = inverted()
    made = {
        "null-text": lambda: learned(denoiser, path),
        "npi": lambda: negative_prompt(denoiser, path, SOURCE),
        "prox": lambda: negative_prompt(denoiser, path, SOURCE, proximal=Proximal("hard", pull=0.5, pull_below=2.0)),
    }[kind]()
    file = save_embeddings(made, tmp_path / "deep" / "x.safetensors")
    back = load_embeddings(file)
    for name in ("family", "prompt", "guidance_scale", "proximal"):
        assert getattr(back, name) == getattr(made, name)
    assert torch.equal(back.sigmas, made.sigmas) and back.base.text == made.base.text
    expected = reconstruct(denoiser, path, NULL, negative=made, guidance_scale=4.0)
    assert torch.equal(reconstruct(denoiser, path, NULL, negative=back, guidance_scale=4.0), expected)
    other = TokenDenoiser()
    other.family = "another family"
    with pytest.raises(MismatchError, match="another family"):
        back.check(other)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(LoadError, match="does not exist"):
        load_embeddings(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(LoadError, match="cannot be read"):
        load_embeddings(tmp_path / "text.safetensors")
    save_file({"base": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(LoadError, match="no embeddings of EditKit"):
        load_embeddings(tmp_path / "weights.safetensors")
    header = {"format": "editkit-embeddings-1", "embeddings": "{}"}
    save_file({"sigmas": torch.zeros(1)}, tmp_path / "half.safetensors", metadata=header)
    with pytest.raises(LoadError, match="incomplete"):
        load_embeddings(tmp_path / "half.safetensors")
