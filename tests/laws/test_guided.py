"""Guided reconstruction: null-text and negative-prompt inversion, and the embeddings that they make."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editkit.pipelines.blended.blending import blended_denoise
from editkit.pipelines.core.errors import LoadError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts, guided
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.core.samplers import predictor, sample
from editkit.pipelines.core.trajectory import context_digest
from editkit.pipelines.diffedit.edit import masked_decode
from editkit.pipelines.inversion.ddim import reconstruct
from editkit.pipelines.inversion.negative_embeddings import Embeddings, load_embeddings, save_embeddings
from editkit.pipelines.inversion.negative_prompt import negative_prompt, slerp
from editkit.pipelines.inversion.null_text import NullTextOptions, null_text
from editkit.pipelines.inversion.proximal import Proximal
from editkit.pipelines.sdedit import sdedit
from editkit.tests.toy_tokens import NULL, SOURCE, B, D, H, T, TokenDenoiser, W, inverted
from editkit.tests.toys import random_latent

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
    assert denoiser.forward_passes == 6 * (1 + 4 + 1)
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
    assert denoiser.forward_passes == 6 * B
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
    assert result.updates == [1] * 6 and denoiser.forward_passes == 6 * 3
    assert not torch.equal(result.embeddings.at(0).tokens, NULL.tokens)


def test_the_threshold_grows_from_step_to_step():
    denoiser, path = inverted(batch=1)
    options = NullTextOptions(inner=3, tolerance=0.0, tolerance_growth=1e9)
    assert null_text(denoiser, path, SOURCE, NULL, options=options).updates == [3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("flow", [False, True])
def test_losses_are_measured_in_the_variance_preserving_scale(flow):
    """The latents of flow models are in it already."""
    denoiser, path = inverted(batch=1)
    denoiser.flow = flow
    result = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=1, **ALWAYS))
    levels = path.sigmas.tolist()
    z = path.latent(0)
    cond, uncond = denoiser.denoise(z, levels[0], [SOURCE, NULL]).detach()
    clean = uncond + 7.5 * (cond - uncond)
    reached = clean + (z - clean) * (levels[1] / levels[0])
    scale = 1 if flow else (1 + levels[1] ** 2) ** 0.5
    expected = ((reached - path.latent(1)) / scale).square().mean()
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("lr, tolerance", [(0.05, 2e-3), (0.3, 1e-2)])
def test_images_do_not_influence_each_other(lr, tolerance):
    """One image starts at the threshold, the others meet it later, and at the high rate leave it; each ends as alone."""
    denoiser, path = inverted(batch=3)
    starts = torch.cat([SOURCE.tokens, NULL.tokens, -3 * SOURCE.tokens])
    options = NullTextOptions(inner=12, lr=lr, tolerance=tolerance, tolerance_growth=0.0)
    together = null_text(denoiser, path, SOURCE, NULL.with_tokens(starts), options=options)
    updates = []
    for i in range(3):
        alone_path = dataclasses.replace(
            path, latents=path.latents[:, i : i + 1], source_latent=path.source_latent[i : i + 1]
        )
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
    assert seen[-1] == (9, 30) and denoiser.parameter.grad is None and not NULL.tokens.requires_grad


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
    one = null_text(denoiser, path, SOURCE, NULL, options=NullTextOptions(inner=1, **ALWAYS))
    moved = (one.embeddings.at(4).tokens - NULL.tokens).abs().max()  # the rate of step 4 of 10
    assert float(moved) == pytest.approx(0.01 * (1 - 4 / 20), rel=1e-2)


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
    near = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.9968, 0.0799], [0.0, 0.0]]])  # 0.08 rad apart
    assert float(slerp(*near, 0.5).norm()) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(slerp(a, 2 * a, 0.25), 1.25 * a, atol=1e-6)
    with pytest.raises(ParameterError, match="interpolation"):
        negative_prompt(denoiser, path, SOURCE, interpolation=0.5)
    with pytest.raises(ShapeError, match="token count"):
        slerp(a, b[:, :1], 0.5)


def test_npi_moves_the_pooled_vector_with_the_tokens():
    denoiser, path = inverted()
    pooled = random_latent(2, 8, seed=5)
    null = dataclasses.replace(NULL, pooled=pooled[1:])
    for share in (0.0, 0.3, 1.0):
        source = dataclasses.replace(SOURCE, pooled=pooled[:1])
        assert npi_base(denoiser, path, SOURCE, null, share).pooled is None, "a prompt without one stays without"
        made = npi_base(denoiser, path, source, null, share)
        expected = slerp(pooled[:1, None], pooled[1:, None], share)[:, 0]
        assert torch.allclose(made.pooled, expected, atol=1e-6)
    assert torch.equal(made.pooled, null.pooled) and torch.equal(made.tokens, null.tokens)


def npi_base(denoiser, path, source, null, share):
    path = dataclasses.replace(path, prompt=context_digest(source))
    return negative_prompt(denoiser, path, source, null=null, interpolation=share).base


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
        by_hand = guided(denoiser, path.latent(step), sigma, SOURCE, embeddings.at(step), 5.0)
        assert torch.equal(guided(denoiser, path.latent(step), sigma, SOURCE, embeddings, 5.0), by_hand)


def test_embeddings_work_in_blending_decoding_and_samplers():
    denoiser, path = inverted()
    embeddings = learned(denoiser, path)
    with torch.no_grad():
        prompts = EditPrompts(SOURCE, embeddings, 5.0)
        full = constant_schedule(torch.ones(1, H, W))
        expected = reconstruct(denoiser, path, SOURCE, negative=embeddings, guidance_scale=5.0)
        blended = blended_denoise(denoiser, path.latent(0), path, path.sigmas, full, prompts, seeds=[0, 0])
        sampled = sample("euler", predictor(denoiser, prompts), path.latent(0), path.sigmas)
        decoded = masked_decode(denoiser, path, full, prompts, ratio=1.0)
    assert torch.equal(blended, expected) and torch.equal(sampled, expected) and torch.equal(decoded, expected)
    constant = reconstruct(denoiser, path, SOURCE, negative=embeddings.at(0), guidance_scale=5.0)
    assert not torch.allclose(constant, expected, atol=1e-3)


def test_ranges_see_the_embeddings_of_the_whole_grid():
    denoiser, path = inverted()
    prompts, full = EditPrompts(SOURCE, learned(denoiser, path), 5.0), constant_schedule(torch.ones(1, H, W))

    def run(z, sigmas, **kwargs):
        return blended_denoise(denoiser, z, path, sigmas, full, prompts, seeds=[0, 0], **kwargs)

    first = run(path.latent(0), path.sigmas, end=2)
    whole = run(path.latent(0), path.sigmas)
    assert torch.equal(whole, run(first, path.sigmas, start=2)) and torch.equal(whole, run(first, path.sigmas[2:]))


def test_at_guidance_1_embeddings_cost_no_row():
    denoiser, path = inverted(batch=1)
    guided(denoiser, path.latent(0), 3.0, SOURCE, learned(denoiser, path), 1.0)
    assert denoiser.forward_passes == 1


@pytest.mark.parametrize("proximal", [None, Proximal("hard")])
def test_predictions_made_elsewhere_are_guided_alike(proximal):
    denoiser, path = inverted()
    embeddings = dataclasses.replace(learned(denoiser, path), proximal=proximal)
    z, sigma = path.latent(2), float(path.sigmas[2])
    contexts = [Context(SOURCE.tokens + 0.5), embeddings.at(2)]
    cond, uncond = denoiser.denoise(z, sigma, contexts)
    apart = embeddings.combine(denoiser, z, sigma, cond, uncond, 3.0, contexts)
    assert torch.equal(apart, guided(denoiser, z, sigma, contexts[0], embeddings, 3.0))
    assert not torch.equal(apart, denoiser.combine(z, sigma, cond, uncond, 3.0, contexts)) or proximal is None
    assert embeddings.guides(3.0) and embeddings.guides(1.0) == (proximal is not None)


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
    z, sigmas = path.latent(0), torch.linspace(4, 0, 5)
    with pytest.raises(MismatchError, match="embeddings"):
        prompts = EditPrompts(SOURCE, embeddings, 5.0)
        blended_denoise(denoiser, z, z, sigmas, constant_schedule(torch.ones(1, H, W)), prompts, seeds=[0, 0])
    with pytest.raises(MismatchError, match="embeddings"):
        sdedit(denoiser, z, prompts, seeds=[0, 0], steps=4)


# files


@pytest.mark.parametrize("kind", ["null-text", "npi", "prox"])
def test_saved_embeddings_come_back(kind, tmp_path):
    denoiser, path = inverted()
    pooled = dataclasses.replace(NULL, pooled=torch.ones(1, 5))
    made = {
        "null-text": lambda: dataclasses.replace(learned(denoiser, path), base=pooled),
        "npi": lambda: negative_prompt(denoiser, path, SOURCE),
        "prox": lambda: negative_prompt(
            denoiser, path, SOURCE, proximal=Proximal("hard", inversion_guidance=0.5, inversion_guidance_below=2.0)
        ),
    }[kind]()
    file = save_embeddings(made, tmp_path / "deep" / "x.safetensors")
    back = load_embeddings(file)
    for name in ("family", "prompt", "guidance_scale", "proximal"):
        assert getattr(back, name) == getattr(made, name)
    assert torch.equal(back.sigmas, made.sigmas) and back.base.text == made.base.text
    assert torch.equal(back.base.pooled, pooled.pooled) if kind == "null-text" else back.base.pooled is None
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
