"""Background reconstruction by learning the decoder or the latent (methods.md, section 3)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.pipelines.blended.background_loss import background_loss
from editkit.pipelines.blended.decoder_tuning import DecoderSettings, LatentSettings, tune_decoder, tune_latent
from editkit.pipelines.blended.last_layer import last_layer, solve_last_layer
from editkit.pipelines.core.errors import EditError, ParameterError, ShapeError
from editkit.pipelines.evaluation.metrics import psnr_outside
from editkit.pipelines.learning.orthogonal_steps import orthogonalised
from editkit.tests.toy_codec import ToyCodec, box, random_image, smooth_image


def problem(batch: int = 1, height: int = 16, width: int = 20):
    """Codec, latent, source and a mask over the left part."""
    codec = ToyCodec()
    source = smooth_image(batch, height, width)
    latent = torch.randn(batch, 3, -(-height // 4), -(-width // 4), generator=torch.Generator().manual_seed(5))
    return codec, latent, source, box(batch, height, width, (0, height), (0, width // 3))


def weights(codec: ToyCodec) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in codec.decoder.parameters()]


# ------------------------------------------------------------------------------------------------ decoder learning
def test_the_defaults_are_the_published_ones():
    decoder, latent = DecoderSettings(), LatentSettings()
    assert (decoder.steps, decoder.lr, decoder.background_weight, decoder.blocks) == (75, 1e-4, 100, "all")
    assert (latent.steps, latent.lr, latent.background_weight) == (75, 0.1, 100)
    assert latent.lr / latent.latent_scale == pytest.approx(0.549, abs=1e-3)  # on the VAE's latent of SD 1.x
    assert decoder.patience == latent.patience == 0
    codec, z, source, mask = problem()
    usual = tune_decoder(codec, z, source, None, mask)
    spelt = tune_decoder(codec, z, source, None, mask, settings=decoder)
    assert usual.losses == spelt.losses
    assert len(usual.losses) == 75


def test_no_steps_is_the_plain_decode():
    codec, latent, source, mask = problem()
    tuned = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=0))
    assert torch.equal(tuned.image, codec.decode(latent))
    assert tuned.losses == []
    assert tuned.steps == 0
    assert (
        tuned.psnr_before == tuned.psnr_after == pytest.approx(float(psnr_outside(codec.decode(latent), source, mask)))
    )


def test_a_full_mask_learns_nothing():
    codec, latent, source, mask = problem()
    tuned = tune_decoder(codec, latent, source, None, torch.ones_like(mask), settings=DecoderSettings(steps=4))
    assert tuned.losses == tuned.edit_losses == tuned.background_losses == [0.0] * 4
    assert torch.equal(tuned.image, codec.decode(latent))
    assert all(torch.equal(a, b) for a, b in zip(weights(codec), weights(tuned.codec), strict=True))
    assert tuned.psnr_before != tuned.psnr_before  # nothing is outside: NaN


def test_an_empty_mask_reconstructs():
    codec, latent, source, mask = problem()
    tuned = tune_decoder(
        codec, latent, source, None, torch.zeros_like(mask), settings=DecoderSettings(steps=40, lr=1e-3)
    )
    falls = [after <= before for before, after in zip(tuned.losses, tuned.losses[1:], strict=False)]
    assert sum(falls) >= 38
    assert tuned.psnr_after > tuned.psnr_before + 1.5
    assert tuned.edit_losses == [0.0] * 40


def test_the_loss_is_the_published_one():
    codec, latent, source, mask = problem(batch=2)
    edited = random_image(2, 16, 20, seed=3)
    tuned = tune_decoder(codec, latent, source, edited, mask, settings=DecoderSettings(steps=1, background_weight=7))
    made, m = codec.decode(latent, clamp=False) * 2 - 1, mask[..., None]
    edit = ((made * m - (edited * 2 - 1) * m) ** 2).sum() / made.numel()
    background = ((made * (1 - m) - (source * 2 - 1) * (1 - m)) ** 2).sum() / made.numel()
    assert tuned.edit_losses[0] == pytest.approx(float(edit), rel=1e-5)
    assert tuned.background_losses[0] == pytest.approx(float(7 * background), rel=1e-5)
    assert tuned.losses[0] == pytest.approx(float(edit + 7 * background), rel=1e-5)


def reference_step(codec: ToyCodec, latent, source, edited, mask, lr: float) -> list[torch.Tensor]:
    """Adam's first step by hand: lr g / (|g| + eps), with the gradient of the published loss."""
    parameters = [weight.clone().requires_grad_(True) for weight in weights(codec)]
    x = latent * codec.scale
    for stage, weight, bias in zip(codec.decoder, parameters[::2], parameters[1::2], strict=True):
        x = torch.nn.functional.interpolate(x, scale_factor=2.0) if stage.up else x
        x = torch.nn.functional.conv2d(x, weight, bias, padding=1)
        x = x.tanh() if stage.squash else x
    made, m = x.movedim(1, -1)[:, : source.shape[1], : source.shape[2]], mask[..., None]
    loss = torch.nn.functional.mse_loss(made * m, (edited * 2 - 1) * m)
    loss = loss + 100 * torch.nn.functional.mse_loss(made * (1 - m), (source * 2 - 1) * (1 - m))
    gradients = torch.autograd.grad(loss, parameters)
    return [p.detach() - lr * g / (g.abs() + 1e-8) for p, g in zip(parameters, gradients, strict=True)]


@pytest.mark.parametrize("blocks", ["all", 3, 2, 1])
def test_one_step_moves_the_last_blocks_by_adams_rule_and_nothing_else(blocks):
    codec, latent, source, mask = problem(batch=2, height=14, width=17)
    soft = mask * 0.8
    edited = random_image(2, 14, 17, seed=3)
    expected = reference_step(codec, latent, source, edited, soft, 1e-2)
    tuned = tune_decoder(codec, latent, source, edited, soft, settings=DecoderSettings(steps=1, lr=1e-2, blocks=blocks))
    learns = 6 if blocks == "all" else 2 * blocks
    for i, (before, want, got) in enumerate(zip(weights(codec), expected, weights(tuned.codec), strict=True)):
        if i < 6 - learns:
            assert torch.equal(got, before)
        else:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
            assert (got - before).abs().max() > 5e-3


def test_the_frozen_prefix_runs_once():
    codec, latent, source, mask = problem()
    tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=6, blocks=1))
    clone = codec.clones[0]
    assert [stage.calls for stage in clone.blocks] == [1, 1, 8]  # first decode, six steps, last decode


def test_the_codec_handed_back_makes_the_image_and_encodes_as_before():
    codec, latent, source, mask = problem(height=13, width=18)
    before = codec.digest()
    tuned = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=5, lr=1e-2))
    assert tuned.image.shape == source.shape
    assert torch.equal(tuned.codec.decode(latent)[:, :13, :18], tuned.image)
    assert torch.equal(tuned.codec.encode(source[:, :12, :16]), codec.encode(source[:, :12, :16]))
    assert codec.digest() == before
    assert not torch.equal(tuned.image, codec.decode(latent)[:, :13, :18])
    assert not any(weight.requires_grad for weight in tuned.codec.decoder.parameters())


def test_both_terms_pull_their_own_side():
    codec, latent, source, mask = problem()
    plain, edited = codec.decode(latent), 1 - source
    chosen = {"steps": 60, "lr": 1e-2}
    published = tune_decoder(codec, latent, source, edited, mask, settings=DecoderSettings(**chosen))
    edit_only = tune_decoder(
        codec, latent, source, edited, mask, settings=DecoderSettings(**chosen, background_weight=0)
    )
    assert published.psnr_after > published.psnr_before + 5
    assert edit_only.background_losses == [0.0] * 60
    assert edit_only.psnr_after < published.psnr_after - 2

    def inside(image):
        return float(psnr_outside(image, edited, 1 - mask))

    assert inside(edit_only.image) > inside(plain) + 5
    assert inside(edit_only.image) > inside(published.image) + 2


def test_memory_and_precision_options_keep_the_result():
    codec, latent, source, mask = problem()
    usual = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=5, lr=1e-2))
    small = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=5, lr=1e-2, low_memory=True))
    assert torch.equal(small.image, usual.image)
    recomputed = [stage.calls for stage in codec.clones[1].blocks]
    assert recomputed == [12, 12, 12]  # two decodes and two passes per step
    half = tune_decoder(
        codec, latent, source, None, mask, settings=DecoderSettings(steps=5, lr=1e-2, compute_dtype=torch.bfloat16)
    )
    assert not torch.equal(half.image, usual.image)
    torch.testing.assert_close(half.image, usual.image, atol=0.03, rtol=0)


def test_patience_stops_on_a_plateau():
    codec, latent, _, mask = problem()
    solved = codec.decode(latent, clamp=False)  # the source is what the decoder makes: nothing to gain
    chosen = DecoderSettings(steps=60, patience=5)
    tuned = tune_decoder(codec, latent, solved, None, mask, settings=chosen)
    assert tuned.stopped
    assert tuned.steps == len(tuned.losses) == 10
    falling = tune_decoder(
        codec, latent, smooth_image(1, 16, 20), None, mask, settings=DecoderSettings(steps=20, lr=1e-2, patience=5)
    )
    assert not falling.stopped
    assert falling.steps == 20


def test_works_on_inference_tensors_under_inference_mode():
    with torch.inference_mode():
        codec, latent, source, mask = problem()
        assert next(codec.decoder.parameters()).is_inference() or latent.is_inference()
        hidden = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=3, blocks=2))
        moved = tune_latent(codec, latent, source, None, mask, settings=LatentSettings(steps=3))
    codec, latent, source, mask = problem()
    usual = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=3, blocks=2))
    assert torch.equal(hidden.image, usual.image)
    assert moved.losses[-1] < moved.losses[0]


# ---------------------------------------------------------------------------------------------------- fast method
def test_the_fast_method_reaches_the_published_background_in_a_seventh_of_the_steps():
    codec, latent, source, mask = problem(batch=2, height=14, width=17)
    before = codec.digest()
    published = tune_decoder(codec, latent, source, None, mask)
    fast = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(method="fast"))
    assert (published.steps, fast.steps) == (75, 10)
    assert fast.psnr_after > published.psnr_after
    assert torch.equal(fast.codec.decode(latent)[:, :14, :17], fast.image)
    assert codec.digest() == before
    again = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(method="fast"))
    assert torch.equal(again.image, fast.image)


def test_the_fast_method_keeps_the_first_block_and_every_bias_but_the_last():
    codec, latent, source, mask = problem()
    tuned = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(method="fast"))
    changed = [not torch.equal(a, b) for a, b in zip(weights(codec), weights(tuned.codec), strict=True)]
    assert changed == [False, False, True, False, True, True]
    assert codec.clones[0].blocks[0].calls == 1


def test_the_fast_method_changes_nothing_without_steps_or_outside():
    codec, latent, source, mask = problem()
    none = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=0, method="fast"))
    full = tune_decoder(codec, latent, source, None, torch.ones_like(mask), settings=DecoderSettings(method="fast"))
    assert torch.equal(none.image, codec.decode(latent))
    torch.testing.assert_close(full.image, codec.decode(latent), atol=1e-5, rtol=0)  # solved in float64
    weightless = DecoderSettings(method="fast", background_weight=0)
    kept = tune_decoder(codec, latent, source, None, torch.zeros_like(mask), settings=weightless)
    assert torch.equal(kept.image, codec.decode(latent))  # no pixel has any weight


def test_the_last_convolution_is_solved_to_the_minimum():
    codec, latent, source, mask = problem(batch=2, height=13, width=18)
    loss = background_loss(codec, latent, source, random_image(2, 13, 18, seed=3), mask * 0.7, 100.0)
    stages = list(codec.decoder)

    def decode() -> torch.Tensor:
        value = latent * codec.scale
        for stage in stages:
            value = stage(value)
        return value

    with torch.no_grad():
        layer = last_layer(stages[-1], decode)
        solve_last_layer(layer, loss)
    parameters = [weight.requires_grad_(True) for weight in stages[-1].parameters()]
    value = loss(decode()).sum()
    for gradient in torch.autograd.grad(value, parameters):
        assert gradient.abs().max() < 2e-3 * value.item()
    assert last_layer(stages[0], decode) is None  # the image is not its output


def test_orthogonal_steps_move_every_direction_equally_far():
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 9), (9, 4), (1, 5), (16, 16)):
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
        assert singular.max() < 1.3
        assert singular.median() > 0.6
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


# ------------------------------------------------------------------------------------------------- latent learning
def test_latents_learn_alone_in_any_batch():
    codec, latent, source, mask = problem(batch=3)
    chosen = LatentSettings(steps=8, latent_scale=1.0)
    together = tune_latent(codec, latent, source, None, mask, settings=chosen)
    assert together.psnr_after > together.psnr_before
    assert (together.latent - latent).abs().max() > 0.1
    for i in range(3):
        alone = tune_latent(codec, latent[i : i + 1], source[i : i + 1], None, mask[:1], settings=chosen)
        torch.testing.assert_close(alone.latent[0], together.latent[i], atol=5e-3, rtol=0)  # steps are 0.1
    torch.testing.assert_close(codec.decode(together.latent), together.image)


def test_the_rate_of_the_latent_counts_on_the_scaled_latent():
    """Adam's first step is its rate, whatever the gradient: on the VAE's latent it is the published rate over the scale."""
    codec, latent, source, mask = problem()
    for scale in (0.18215, 0.13025, 1.0):
        tuned = tune_latent(codec, latent, source, None, mask, settings=LatentSettings(steps=1, latent_scale=scale))
        assert float((tuned.latent - latent).abs().max()) == pytest.approx(0.1 / scale, rel=1e-4)


def test_latent_losses_are_means_and_a_full_mask_moves_nothing():
    codec, latent, source, mask = problem(batch=2)
    decoder = tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(steps=1))
    moved = tune_latent(codec, latent, source, None, mask, settings=LatentSettings(steps=1))
    assert moved.losses == pytest.approx(decoder.losses)
    still = tune_latent(codec, latent, source, None, torch.ones_like(mask), settings=LatentSettings(steps=3))
    assert torch.equal(still.latent, latent)
    assert codec.clones[-1].released


# ------------------------------------------------------------------------------------------------------ refusals
def test_refusals_name_what_to_do():
    codec, latent, source, mask = problem()
    with pytest.raises(ShapeError, match=r"5 x 4 latent pixels.*needs 4 x 4"):
        tune_decoder(codec, latent, source[:, :, :16], None, mask[:, :, :16])
    with pytest.raises(ShapeError, match="mask is 16 x 16"):
        tune_decoder(codec, latent, source, None, mask[:, :, :16])
    with pytest.raises(ShapeError, match="batch sizes"):
        tune_decoder(codec, latent.expand(2, -1, -1, -1), source.expand(3, -1, -1, -1), None, mask)
    with pytest.raises(ParameterError, match="choose from published, fast"):
        DecoderSettings(method="quick")
    for blocks in (0, 4, "last", True, 1.5):
        with pytest.raises(ParameterError, match="blocks"):
            tune_decoder(codec, latent, source, None, mask, settings=DecoderSettings(blocks=blocks))
    for wrong in (
        {"steps": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"patience": -1},
        {"background_weight": -1.0},
        {"latent_scale": 0.0},
    ):
        with pytest.raises(ParameterError):
            tune_latent(codec, latent, source, None, mask, settings=LatentSettings(**wrong))


# ----------------------------------------------------------------------------------------------------------- fuzz
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    extra=st.integers(0, 1),
    batches=st.tuples(*[st.integers(1, 4)] * 4),
    fill=st.sampled_from(["empty", "full", "soft", "nan", "high"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    which=st.sampled_from([tune_decoder, tune_latent]),
    given_edit=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_input_gives_an_image_or_an_edit_error(sizes, extra, batches, fill, dtype, which, given_edit):
    height, width = sizes
    codec = ToyCodec(dtype=torch.float16 if dtype == torch.float16 else torch.float32)
    value = {"empty": 0.0, "full": 1.0, "soft": 0.3, "nan": float("nan"), "high": 2.0}[fill]
    latent = torch.zeros(batches[0], 3, -(-height // 4) + extra, -(-width // 4), dtype=dtype)
    source, mask = random_image(batches[1], height, width).to(dtype), torch.full((batches[2], height, width), value)
    edited = random_image(batches[3], height, width).to(dtype) if given_edit else None
    counts = batches if given_edit else batches[:3]
    fits = not extra and fill not in ("nan", "high") and all(b in (1, max(counts)) for b in counts)
    chosen = DecoderSettings(steps=1) if which is tune_decoder else LatentSettings(steps=1)
    try:
        tuned = which(codec, latent, source, edited, mask, settings=chosen)
    except EditError:
        assert not fits
        return
    assert fits
    assert tuned.image.shape == (max(counts), height, width, 3)
    assert torch.isfinite(tuned.image).all()
    assert tuned.image.dtype == torch.float32
    assert tuned.image.min() >= 0
    assert tuned.image.max() <= 1
