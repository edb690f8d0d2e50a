"""A native VAE as a LatentCodec, and a decoder that learns without touching the original."""

from __future__ import annotations

import copy

import comfy.sd
import comfy.taesd.taesd
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine, DiagonalGaussianRegularizer
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.host import codec_of, vae_of
from editkit.pipelines.core.errors import FamilyError, ShapeError
from editkit.pipelines.core.protocols import DecoderClone, LatentCodec
from editkit.tests.comfyui.host.tiny import digest, same_weights


def image(batch: int = 1, height: int = 24, width: int = 16) -> Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(batch))


def through(clone, z: Tensor) -> Tensor:
    x = clone.prepare(z)
    for block in clone.blocks:
        x = block(x)
    return x


def learn(clone, z: Tensor, target: Tensor, steps: int = 5, stop_at: int | None = None) -> list[float]:
    """A few optimiser steps inside a node, as the fine-tune does."""
    losses = []
    with torch.inference_mode(False), torch.enable_grad():
        target = target.clone().movedim(-1, 1) * 2 - 1
        weights = [p.requires_grad_(True) for block in clone.blocks for p in block.parameters()]
        optimiser = torch.optim.Adam(weights, lr=2e-3)
        for step in range(steps):
            if step == stop_at:
                raise KeyboardInterrupt
            loss = (through(clone, z) - target).square().mean()
            optimiser.zero_grad(), loss.backward(), optimiser.step()
            losses.append(loss.item())
    return losses


def test_codec_is_the_hosts_own(vae) -> None:
    codec = codec_of(vae)
    assert isinstance(codec, LatentCodec)
    assert (codec.factor, codec.channels) == (8, 4)
    z = codec.encode(image(2))
    assert torch.equal(z, vae.encode(image(2)))
    assert torch.equal(codec.decode(z), vae.decode(z))
    raw = codec.decode(z, clamp=False)
    assert raw.min() < 0 or raw.max() > 1
    assert torch.equal(raw.clamp(0, 1), vae.decode(z))
    assert vae_of(codec) is vae


def test_odd_sizes_and_wrong_channels_are_refused(vae) -> None:
    codec = codec_of(vae)
    with pytest.raises(ShapeError, match="multiples of 8"):
        codec.encode(image(1, 41, 32))
    with pytest.raises(ShapeError, match="16 channels"):
        codec.decode(torch.randn(1, 16, 4, 4))


def test_blocks_are_the_decoder(vae) -> None:
    codec = codec_of(vae)
    clone, z = codec.decoder_clone(), codec.encode(image())
    assert isinstance(clone, DecoderClone)
    assert len(clone.blocks) == 6
    expected = codec.decode(z, clamp=False)
    torch.testing.assert_close(through(clone, z).movedim(1, -1) / 2 + 0.5, expected, rtol=0, atol=1e-5)
    assert not any(p.is_inference() for block in clone.blocks for p in block.parameters())


def test_tuning_returns_a_native_vae_and_leaves_the_original(vae) -> None:
    codec = codec_of(vae)
    before, z = digest(vae.first_stage_model), codec.encode(image())
    plain, clone = vae.decode(z), codec.decoder_clone()
    losses = learn(clone, z, image())
    assert losses[-1] < 0.9 * losses[0]
    tuned = clone.finish()
    patched = vae_of(tuned)
    assert isinstance(patched, comfy.sd.VAE)
    shown = stock_nodes.VAEDecode().decode(patched, {"samples": z})[0]
    assert (shown - plain).abs().max() > 1e-2
    assert (shown - image()).square().mean() < (plain - image()).square().mean()
    assert torch.equal(tuned.decode(z), shown)
    assert torch.equal(patched.encode(image()), z)
    assert torch.equal(tuned.encode(image()), z)
    assert patched.get_sd().keys() == vae.get_sd().keys()
    assert torch.equal(patched.get_sd()["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    assert not torch.equal(patched.get_sd()["decoder.conv_in.weight"], before["decoder.conv_in.weight"])
    assert torch.equal(vae.decode(z), plain)
    assert same_weights(vae.first_stage_model, before)


def test_a_tuned_vae_can_be_tuned_again(vae) -> None:
    codec = codec_of(vae)
    z, first = codec.encode(image()), codec.decoder_clone()
    learn(first, z, image())
    once = first.finish()
    expected, second = once.decode(z), codec_of(vae_of(once)).decoder_clone()
    learn(second, z, 1 - image())
    twice = second.finish()
    assert torch.equal(once.decode(z), expected)
    assert (twice.decode(z) - expected).abs().max() > 1e-2
    assert torch.equal(twice.encode(image()), z)
    noise = torch.randn_like(z)
    assert torch.equal(twice.encode(image(), noise=noise), codec.encode(image(), noise=noise))


def test_gradients_reach_a_latent_that_learns(vae) -> None:
    clone = codec_of(vae).decoder_clone()
    with torch.inference_mode(False), torch.enable_grad():
        z = torch.randn(1, 4, 3, 2).requires_grad_(True)
        through(clone, z).square().mean().backward()
        assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().max() > 0
        with torch.no_grad():
            assert not clone.prepare(z).requires_grad


def test_half_precision_learns_in_float32(vae) -> None:
    half = copy.copy(vae)
    half.first_stage_model = copy.deepcopy(vae.first_stage_model).bfloat16()
    half.patcher = comfy.model_patcher.ModelPatcher(half.first_stage_model, vae.device, vae.patcher.offload_device)
    half.vae_dtype = torch.bfloat16
    before, codec = digest(half.first_stage_model), codec_of(half)
    z, clone = codec.encode(image()), codec.decoder_clone()
    assert z.dtype == torch.float32
    assert {p.dtype for block in clone.blocks for p in block.parameters()} == {torch.float32}
    learn(clone, z, image(), steps=2)
    tuned = clone.finish()
    assert tuned.decode(z).dtype == torch.float32
    assert {p.dtype for p in vae_of(tuned).first_stage_model.parameters()} == {torch.float32}
    assert torch.equal(tuned.encode(image()), z)
    assert same_weights(half.first_stage_model, before)


@pytest.mark.parametrize("at", [0, 3])
def test_a_cancel_leaves_everything(vae, at: int) -> None:
    codec = codec_of(vae)
    before, z = digest(vae.first_stage_model), codec.encode(image())
    clone = codec.decoder_clone()
    with pytest.raises(KeyboardInterrupt):
        learn(clone, z, image(), stop_at=at)
    clone.release()
    assert len(clone.blocks) == 0
    assert same_weights(vae.first_stage_model, before)


def test_weights_are_released(vae) -> None:
    import gc
    import weakref

    import comfy.model_management as management

    codec = codec_of(vae)
    loaded = len(management.current_loaded_models)
    for _ in range(3):
        clone = codec.decoder_clone()
        clone.prepare(torch.randn(1, 4, 4, 4))
        gone = weakref.ref(clone.blocks[0])
        clone.release()
        del clone
    gc.collect()
    management.cleanup_models()
    assert gone() is None
    assert len(management.current_loaded_models) <= loaded + 1


def test_out_of_memory_falls_back_to_tiles(vae, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management

    codec = codec_of(vae)
    z, model = codec.encode(image()), vae.first_stage_model
    whole, decode, calls = codec.decode(z, clamp=False), model.decode, []

    def failing(latent: Tensor, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise management.OOM_EXCEPTION("no memory")
        return decode(latent, **options)

    monkeypatch.setattr(model, "decode", failing)
    tiled = codec.decode(z, clamp=False)
    assert len(calls) > 1
    assert (tiled - whole).abs().max() < 1e-4  # one tile covers this image


def test_engine_without_post_quant_conv(vae) -> None:
    source = vae.first_stage_model
    engine = AutoencodingEngine.__new__(AutoencodingEngine)
    torch.nn.Module.__init__(engine)
    engine.encoder, engine.decoder = source.encoder, source.decoder
    engine.regularization = DiagonalGaussianRegularizer()
    flux = copy.copy(vae)
    flux.first_stage_model = engine
    flux.patcher = comfy.model_patcher.ModelPatcher(engine, vae.device, vae.patcher.offload_device)
    codec = codec_of(flux)
    z = torch.randn(1, 4, 4, 4)
    expected = through(codec.decoder_clone(), z).movedim(1, -1) / 2 + 0.5
    torch.testing.assert_close(codec.decode(z, clamp=False), expected, rtol=0, atol=1e-5)


def test_unknown_decoders_are_refused_by_name(vae) -> None:
    taesd = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
    codec = codec_of(taesd)
    assert codec.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 32, 32, 3)
    with pytest.raises(FamilyError, match="TAESD"):
        codec.decoder_clone()
    video = copy.copy(vae)
    video.latent_dim = 3
    with pytest.raises(FamilyError, match="3-dimensional"):
        codec_of(video)


@pytest.mark.parametrize(("part", "value"), [("conv_in", torch.nn.Conv3d(4, 8, 3)), ("give_pre_end", True)])
def test_decoders_of_frames_and_cut_ones_are_refused(vae, part: str, value: object) -> None:
    decoder = copy.copy(vae.first_stage_model.decoder)
    decoder._modules = dict(decoder._modules)
    setattr(decoder, part, value)
    other = copy.copy(vae)
    other.first_stage_model = copy.copy(vae.first_stage_model)
    other.first_stage_model._modules = {**vae.first_stage_model._modules, "decoder": decoder}
    with pytest.raises(FamilyError, match="Decoder, which cannot be tuned"):
        codec_of(other).decoder_clone()


def test_a_decoder_need_not_say_whether_it_ends_early(vae, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer hosts have dropped the attribute."""
    z = torch.randn(1, 4, 4, 4)
    expected = through(codec_of(vae).decoder_clone(), z)
    monkeypatch.delattr(vae.first_stage_model.decoder, "give_pre_end", raising=False)
    assert torch.equal(through(codec_of(vae).decoder_clone(), z), expected)
