"""LayerDiffusion, stage 1: which error, where it counts, and what learns from it (docs/methods.md, section 10)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from editkit.pipelines.core.errors import EditError, FamilyError, ParameterError, ShapeError
from editkit.pipelines.imagic import imagic
from editkit.pipelines.layerdiffusion.embeddings import EmbeddingOptions, layered_embeddings, mix_embeddings
from editkit.pipelines.layerdiffusion.finetune import TuneOptions
from editkit.pipelines.learning.denoising_loss import NoiseError, masked_mean
from editkit.tests import toy_layered as toy
from editkit.tests.toy_layered import TextDenoiser, digest, network, network_text, object_mask, patched, source, text
from editkit.tests.toys import random_latent

B, C, D, H, T, W = toy.B, toy.C, toy.D, toy.H, toy.T, toy.W
SEEDS = [11, 12]


# ------------------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_error_is_that_of_the_predicted_noise(prediction):
    """Against the network's own output in the variance-preserving scale that it was trained in."""
    denoiser, clean, context = network(prediction), random_latent(2, 4, 8, 8, seed=3), network_text(1)
    error = NoiseError(denoiser, clean, SEEDS)
    sigma, noise = error.draw(7)
    abar = 1 / (1 + sigma**2)
    x = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    times = torch.tensor([denoiser.timestep(float(level)) for level in sigma.flatten()])
    out = denoiser.unet(x, times, context.tokens.expand(2, -1, -1)).sample
    predicted = out if prediction == "epsilon" else abar.sqrt() * out + (1 - abar).sqrt() * x
    torch.testing.assert_close(error(7, [context])[0].detach(), noise - predicted, atol=2e-4, rtol=1e-3)


def test_of_a_flow_model_it_is_the_error_of_the_velocity():
    denoiser, clean, context = TextDenoiser(flow=True), source(), text(1)
    error = NoiseError(denoiser, clean, SEEDS)
    sigma, noise = error.draw(0)
    z = (1 - sigma) * clean + sigma * noise
    velocity = (z - denoiser.denoise(z, sigma, [context])[0]) / sigma
    torch.testing.assert_close(error(0, [context])[0], (noise - clean) - velocity, atol=1e-4, rtol=1e-4)


def test_sigmas_are_uniform_over_all_timesteps_and_drawn_image_by_image():
    error = NoiseError(TextDenoiser(), source(batch=1).expand(40, -1, -1, -1), range(40))
    table = error.sigmas.sort().values
    drawn = torch.cat([error.draw(step)[0].flatten() for step in range(50)])
    times = torch.searchsorted(table, drawn)
    assert torch.equal(table[times], drawn)
    assert times.min() < 5 and times.max() > 994  # both ends of 1000 are reached by 2000 draws
    assert torch.histc(times.float(), 10, 0, 1000).div(2000).sub(0.1).abs().max() < 0.03
    split = NoiseError(TextDenoiser(), source(batch=1), [17])
    assert all(torch.equal(a[17:18], b) for a, b in zip(error.draw(3), split.draw(3), strict=True))
    assert not torch.equal(error.draw(3)[1], error.draw(4)[1])


def test_the_masked_mean():
    error = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.5]]).view(1, 1, 2, 2)
    torch.testing.assert_close(masked_mean(error, mask), torch.tensor([(1 + 4) / 4]))
    torch.testing.assert_close(masked_mean(error, mask, normalise=True), torch.tensor([5 / 1.25]))
    assert masked_mean(error, mask * 0, normalise=True).tolist() == [0.0]


# ------------------------------------------------------------------------------------------------------- what is learned
def learn(denoiser=None, *, mask=None, latent=None, first=None, second=None, seeds=SEEDS, progress=None, **options):
    chosen = EmbeddingOptions(**{"steps": 5, "lr": 1e-2, **options})
    told = {} if progress is None else {"progress": progress}
    return layered_embeddings(
        denoiser or TextDenoiser(),
        source() if latent is None else latent,
        first or text(1),
        text(2) if second is None else second or None,
        object_mask() if mask is None else mask,
        seeds=seeds,
        options=chosen,
        **told,
    )


def test_one_step_by_hand():
    """The gradient of the joint error, and Adam's first step along its sign."""
    denoiser, found = TextDenoiser(), learn(steps=1)
    error = NoiseError(denoiser, source(), SEEDS)
    sigma, noise = error.draw(0)
    z = source() + sigma * noise
    both = torch.cat([text(1).tokens, text(2).tokens], 1)
    residual = (z / (1 + sigma) + both.mean(1)[:, :C, None, None] - source()) / sigma
    outside = 1 - object_mask()[:, None]
    slope = (residual / sigma * outside).sum((2, 3))  # of every channel's number, up to a positive factor
    for context, start in ((found.object, text(1)), (found.background, text(2))):
        moved = context.tokens - start.tokens
        assert moved.shape == (B, T, D)
        torch.testing.assert_close(moved[..., :C], -0.01 * slope.sign()[:, None].expand(B, T, C), atol=2e-5, rtol=0)
        assert not moved[..., C:].any()  # the network does not read these
    assert found.losses[0] == pytest.approx(float((residual * outside).square().mean((1, 2, 3)).mean()), rel=1e-5)
    assert denoiser.seen == []
    assert found.steps == 1


def test_both_are_shown_as_one_text_or_apart():
    joint, apart, alone = TextDenoiser(), TextDenoiser(), TextDenoiser()
    learn(joint, steps=2)
    mean = learn(apart, steps=2, join="average")
    learn(alone, steps=2, second=False)
    assert set(joint.seen) == {(B, 2 * T, D)}
    assert set(apart.seen) == set(alone.seen) == {(B, T, D)}
    # one evaluation more than steps, for the estimate of the memory
    assert (joint.forward_passes, apart.forward_passes, alone.forward_passes) == (3 * B, 6 * B, 3 * B)
    error = NoiseError(TextDenoiser(), source(), SEEDS)
    outside = 1 - object_mask()[:, None]
    each = [float(masked_mean(error(0, [text(seed)]), outside).mean()) for seed in (1, 2)]
    assert mean.losses[0] == pytest.approx(sum(each) / 2, rel=1e-5)


def test_the_region_decides_which_latent_pixels_count():
    inside = object_mask()[:, None] > 0
    changed = torch.where(inside, source(seed=9), source())
    for region, same in (("background", True), ("object", False), ("none", False)):
        assert (learn(region=region).losses == learn(region=region, latent=changed).losses) is same
    changed = torch.where(inside, source(), source(seed=9))
    assert learn(region="object").losses == learn(region="object", latent=changed).losses


@pytest.mark.parametrize("region", ["background", "object"])
def test_where_nothing_counts_nothing_is_learned(region):
    empty = torch.ones(1, H, W) if region == "background" else torch.zeros(1, H, W)
    found = learn(region=region, mask=empty)
    assert found.losses == [0.0] * 5
    assert torch.equal(found.object.tokens, text(1).tokens.expand(B, -1, -1))
    assert torch.equal(found.background.tokens, text(2).tokens.expand(B, -1, -1))


def test_no_steps_change_nothing():
    found = learn(steps=0)
    assert found.losses == [] and found.steps == 0
    assert torch.equal(found.object.tokens[1], text(1).tokens[0])
    assert torch.equal(found.background.tokens[0], text(2).tokens[0])


def test_images_learn_as_they_would_alone():
    both = learn(steps=4, lr=0.05)
    for b in range(B):
        alone = learn(steps=4, lr=0.05, latent=source()[b : b + 1], seeds=SEEDS[b : b + 1])
        assert torch.equal(alone.object.tokens[0], both.object.tokens[b])
        assert torch.equal(alone.background.tokens[0], both.background.tokens[b])


def test_learning_lowers_the_error():
    """On draws that it did not learn from; each text alone is fitted where the losses of both are averaged."""
    found = learn(steps=300, lr=0.02, join="average")
    error, outside = NoiseError(TextDenoiser(), source(), [101, 102]), 1 - object_mask()[:, None]

    def mean(context):
        return sum(float(masked_mean(error(step, [context]), outside).mean()) for step in range(200))

    assert mean(found.object) < 0.5 * mean(text(1))
    assert mean(found.background) < 0.5 * mean(text(2))


def test_the_mix():
    a, b = text(1), text(2)
    assert torch.equal(mix_embeddings(a, b, 1).tokens, a.tokens)
    assert torch.equal(mix_embeddings(a, b, 0).tokens, b.tokens)
    torch.testing.assert_close(mix_embeddings(a, b, 0.7).tokens, 0.7 * a.tokens + 0.3 * b.tokens)
    broken = b.with_tokens(torch.full_like(b.tokens, torch.inf))
    assert torch.equal(mix_embeddings(a, broken, 1).tokens, a.tokens)
    found = learn(alpha=0.25)
    assert torch.equal(found.mixed.tokens, 0.25 * found.object.tokens + 0.75 * found.background.tokens)
    assert torch.equal(learn(alpha=1.0).mixed.tokens, learn(alpha=1.0).object.tokens)


def test_what_a_host_attached_stays():
    first = text(1)
    first = type(first)(first.tokens, torch.ones(1, 4), "words", host=["anything"])
    found = learn(first=first)
    assert found.object.host is found.mixed.host is first.host
    assert found.object.text == "words"
    assert found.object.pooled is first.pooled


def test_patience_ends_a_run_that_gains_nothing():
    stopped = learn(steps=100, lr=1e-9, patience=10)
    assert stopped.stopped and stopped.steps < 100
    assert learn(steps=20, patience=0).steps == 20


# ----------------------------------------------------------------------------------------------------- the network fixed
class WeightGradients(TorchDispatchMode):
    """Notes every backward kernel that computes the gradient of a weight."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default and args[-1][1:] != [False, False]:
            self.found.append("convolution")
        if function is torch.ops.aten.native_group_norm_backward.default and args[-1][1:] != [False, False]:
            self.found.append("group norm")
        if function is torch.ops.aten.native_layer_norm_backward.default and args[-1][1:] != [False, False]:
            self.found.append("layer norm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("asks", [False, True])
def test_no_weight_gets_a_gradient(asks):
    """Nor is one computed, or memory kept for one, not even of a network whose weights ask for it."""
    denoiser = network()
    before = digest(denoiser.unet)
    denoiser.unet.requires_grad_(asks)
    texts = [network_text(seed) for seed in (1, 2)]
    latent = random_latent(1, 4, 8, 8)
    with WeightGradients() as seen:
        found = layered_embeddings(
            denoiser, latent, *texts, object_mask(8, 8), seeds=[1], options=EmbeddingOptions(steps=2, lr=0.1)
        )
    assert seen.found == []
    assert all(weight.grad is None and weight.requires_grad is asks for weight in denoiser.unet.parameters())
    assert digest(denoiser.unet) == before
    assert not torch.equal(found.object.tokens, texts[0].tokens)
    assert not torch.equal(found.background.tokens, texts[1].tokens)
    assert not found.object.tokens.requires_grad


def test_both_embeddings_and_nothing_else_have_gradients(monkeypatch):
    denoiser, seen, real = network(), [], torch.optim.Adam.step

    def step(adam, closure=None):
        seen.append(
            [tuple(value.shape) for group in adam.param_groups for value in group["params"] if value.grad is not None]
        )
        return real(adam, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    texts = [network_text(seed) for seed in (1, 2)]
    options = EmbeddingOptions(steps=1)
    layered_embeddings(denoiser, random_latent(1, 4, 8, 8), *texts, object_mask(8, 8), seeds=[1], options=options)
    assert seen == [[(1, T, 16), (1, T, 16)]]
    assert all(text.tokens.grad is None for text in texts)


def test_blocks_that_compute_again_give_the_same_bits():
    def run(low_memory):
        denoiser = network()
        return denoiser, layered_embeddings(
            denoiser, random_latent(1, 4, 8, 8), network_text(1), network_text(2), object_mask(8, 8), seeds=[1],
            options=EmbeddingOptions(steps=3, lr=0.1, low_memory=low_memory),
        )  # fmt: skip

    (_, plain), (saving, again) = run(False), run(True)
    assert torch.equal(plain.mixed.tokens, again.mixed.tokens)
    assert patched(saving.unet) == []
    with pytest.raises(FamilyError, match="low_memory"):
        learn(low_memory=True)


def test_half_precision_arithmetic_learns_nearly_the_same():
    results = []
    for dtype in (None, torch.bfloat16):
        found = layered_embeddings(
            network(), random_latent(1, 4, 8, 8), network_text(1), network_text(2), object_mask(8, 8), seeds=[1],
            options=EmbeddingOptions(steps=5, lr=0.1, compute_dtype=dtype),
        )  # fmt: skip
        results.append(found.mixed.tokens - found.mixed.with_tokens(network_text(1).tokens).tokens)
    exact, rough = results
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), 0) > 0.9


# ----------------------------------------------------------------------------------------------------------------- Imagic
def test_imagic_is_the_same_two_stages():
    denoiser, latent, target = network(), random_latent(1, 4, 8, 8), network_text(1)
    first, second = (
        EmbeddingOptions(steps=3, lr=0.1, region="none"),
        TuneOptions(steps=2, lr=1e-3, background_weight=0.0),
    )
    told: list[tuple[int, int]] = []

    def run(eta):
        return imagic(
            nullcontext(denoiser), denoiser, latent, target, eta=eta, seeds=[4], embeddings=first, tuning=second,
            progress=lambda done, total, preview=None: told.append((done, total)),
        )  # fmt: skip

    half, full, none = run(0.5), run(1.0), run(0.0)
    assert told[:5] == [(i + 1, 5) for i in range(5)]
    alone = layered_embeddings(denoiser, latent, target, None, None, seeds=[4], options=first)
    assert torch.equal(half.embeddings.object.tokens, alone.object.tokens)
    assert torch.equal(none.context.tokens, alone.object.tokens)
    assert torch.equal(full.context.tokens, target.tokens)
    torch.testing.assert_close(half.context.tokens, (target.tokens + alone.object.tokens) / 2)
    assert half.tuning.steps == 2 and half.tuning.background_losses == [0.0, 0.0]
    assert any(change.any() for change in half.tuning.changes.values())


# --------------------------------------------------------------------------------------------------------------- refusals
def test_refusals():
    with pytest.raises(ParameterError, match="no mask"):
        layered_embeddings(TextDenoiser(), source(), text(1), text(2), None, seeds=SEEDS)
    with pytest.raises(ShapeError, match="latent pixels"):
        learn(mask=object_mask(8, 8))
    with pytest.raises(ShapeError, match="one CLIP"):
        learn(second=text(2, tokens=T + 1))
    with pytest.raises(ShapeError, match="3 entries"):
        learn(first=text(1, rows=3))
    for wrong in (dict(join="sum"), dict(region="sky"), dict(alpha=1.5), dict(patience=-1)):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            EmbeddingOptions(**wrong)
    with pytest.raises(EditError, match="stopped being a number"):
        learn(latent=source() * 1e30)
