"""The headless adapter against diffusers itself: same networks, same noise, diffusers' own scheduler and formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from editkit.hosts.diffusers.denoiser import DiffusersDenoiser
from editkit.hosts.diffusers.loading import load_folder
from editkit.hosts.diffusers.schedules import sigma_table
from editkit.hosts.diffusers.text_encoder import ClipBpe, ClipTextEncoder, ClipTower
from editkit.hosts.diffusers.vae import DiffusersCodec
from editkit.pipelines.blended.blending import blended_denoise
from editkit.pipelines.core.errors import EditError, FamilyError, LoadError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.protocols import Context, Denoiser, LatentCodec, TextEncoder
from editkit.tests.parity import tiny
from editkit.tests.toys import random_latent


def denoiser(prediction: str = "epsilon", **kwargs) -> DiffusersDenoiser:
    return DiffusersDenoiser(
        unet=tiny.unet(**kwargs), table=sigma_table(tiny.SCHEDULER), prediction=prediction, family="sd1",
        scaling_factor=0.18215, factor=8,
    )  # fmt: skip


def context(seed: int, width: int = 16, rows: int = 1, length: int = 7) -> Context:
    return Context(random_latent(rows, length, width, seed=seed))


def test_adapters_keep_the_protocols():
    model = denoiser()
    assert isinstance(model, Denoiser) and isinstance(DiffusersCodec(tiny.vae()), LatentCodec)
    assert isinstance(ClipTextEncoder([]), TextEncoder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_equals_diffusers_ddim(prediction):
    """Whole guided runs: ours in sigma space, theirs in VP space with DDIMScheduler.step."""
    model, cond, uncond = denoiser(prediction), context(1), context(2)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    sigmas, noise = model.schedule(10), random_latent(2, 4, 8, 8, seed=3)
    x = noise.clone()  # unit variance at the first level, in VP space
    for t in scheduler.timesteps:
        e_c, e_u = (model.unet(x, t, c.tokens.expand(2, -1, -1)).sample for c in (cond, uncond))
        x = scheduler.step(e_u + 4.0 * (e_c - e_u), t, x, eta=0.0).prev_sample
    z = noise * (1 + float(sigmas[0]) ** 2) ** 0.5
    full = constant_schedule(torch.ones(1, 8, 8))
    z = blended_denoise(model, z, torch.zeros_like(z), sigmas, full, EditPrompts(cond, uncond, 4.0), seeds=[0, 1])
    assert (z - x).abs().max() <= 1e-4 * x.abs().max()


def test_one_call_equals_single_rows_in_any_chunking():
    model, contexts = denoiser(), [context(1), context(2), context(4, length=11)]
    z = random_latent(3, 4, 8, 8, seed=5) * 3
    together = model.denoise(z, 3.0, contexts)
    model.max_rows = 2
    chunked = model.denoise(z, 3.0, contexts)
    alone = torch.stack([torch.cat([model.denoise(z[i : i + 1], 3.0, [c])[0] for i in range(3)]) for c in contexts])
    assert together.shape == (3, 3, 4, 8, 8)
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(chunked, alone, atol=1e-5)


def test_out_of_memory_halves_the_rows_and_goes_on():
    model, z = denoiser(), random_latent(4, 4, 8, 8)
    wanted, forward, sizes = model.denoise(z, 2.0, [context(1), context(2)]), model.unet.forward, []

    def limited(x, *args, **kwargs):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return forward(x, *args, **kwargs)

    model.unet.forward = limited
    assert torch.allclose(model.denoise(z, 2.0, [context(1), context(2)]), wanted, atol=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_rows_of_a_context_go_with_the_images():
    model, z = denoiser(), random_latent(2, 4, 8, 8)
    both = Context(torch.cat([context(1).tokens, context(2).tokens]))
    out = model.denoise(z, 2.0, [both])[0]
    assert torch.allclose(out[0], model.denoise(z[:1], 2.0, [context(1)])[0, 0], atol=1e-6)
    assert torch.allclose(out[1], model.denoise(z[1:], 2.0, [context(2)])[0, 0], atol=1e-6)
    with pytest.raises(ShapeError, match="2 rows"):
        model.denoise(random_latent(3, 4, 8, 8), 2.0, [both])


def test_sdxl_needs_and_uses_pooled_text():
    model = denoiser(sdxl=True)
    z, tokens = random_latent(1, 4, 8, 8), context(1).tokens
    a, b = (model.denoise(z, 2.0, [Context(tokens, random_latent(1, 12, seed=s))]) for s in (1, 2))
    assert not torch.allclose(a, b)
    with pytest.raises(FamilyError, match="pooled"):
        model.denoise(z, 2.0, [Context(tokens)])


def test_state_stays_float32_around_a_half_precision_network():
    model, z = denoiser(), random_latent(1, 4, 8, 8)
    wanted = model.denoise(z * 14, 14.0, [context(1)])
    model.unet.to(torch.bfloat16)
    got = model.denoise(z * 14, 14.0, [context(1)])
    assert got.dtype == torch.float32 and (got - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_timesteps_are_found_by_sigma():
    model = denoiser()
    assert [model.timestep(float(model.table[t])) for t in (0, 1, 500, 999)] == [0, 1, 500, 999]
    assert model.timestep(1e9) == 999 and model.timestep(0.0) == 0


def test_inpainting_models_are_refused():
    class Inpainting(torch.nn.Module):
        config = {"in_channels": 9, "out_channels": 4}

    with pytest.raises(FamilyError, match="inpainting"):
        DiffusersDenoiser(Inpainting(), torch.ones(3), "epsilon", "sd1", 1.0, 8)


def test_codec_equals_the_vae_and_scales_by_its_factor():
    codec, image = DiffusersCodec(tiny.vae()), torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))
    posterior = codec.vae.encode(image.movedim(-1, 1) * 2 - 1).latent_dist
    assert codec.factor == 8 and torch.equal(codec.encode(image), posterior.mean)
    noise = random_latent(*posterior.mean.shape)
    assert torch.allclose(codec.encode(image, noise=noise), posterior.mean + posterior.std * noise)
    pixels = codec.vae.decode(posterior.mean).sample.movedim(1, -1)
    assert torch.allclose(codec.decode(posterior.mean, clamp=False), pixels * 0.5 + 0.5, atol=1e-6)
    with pytest.raises(ShapeError, match="multiples of 8"):
        codec.encode(image[:, :23])


def test_decoder_clone_is_the_decoder_and_learns_alone():
    codec = DiffusersCodec(tiny.vae())
    latent = random_latent(1, 4, 3, 4, seed=2)
    before = {name: value.clone() for name, value in codec.vae.state_dict().items()}
    clone = codec.decoder_clone()
    value = clone.prepare(latent)
    for block in clone.blocks:
        value = block(value)
    wanted = codec.vae.decode(latent).sample
    assert torch.allclose(value, wanted, atol=1e-5)
    with torch.no_grad():
        next(clone.blocks[-1].parameters()).add_(1.0)
    tuned = clone.finish()
    assert not torch.allclose(tuned.decode(latent), codec.decode(latent))
    assert torch.equal(tuned.encode(torch.ones(1, 8, 8, 3)), codec.encode(torch.ones(1, 8, 8, 3)))
    assert all(torch.equal(before[name], value) for name, value in codec.vae.state_dict().items())


def test_clip_ids_and_spans():
    tokenizer, text = ClipBpe(), "A red circle, (weird) lilac-background"
    from open_clip.tokenizer import SimpleTokenizer

    tokens = tokenizer.split(text)
    assert [t.id for t in tokens] == SimpleTokenizer().encode(text)
    assert "".join(text[t.start : t.end] for t in tokens) == text.replace(" ", "")
    assert all(a.end <= b.start for a, b in zip(tokens, tokens[1:], strict=False))


def test_windows_pad_and_continue():
    tower = ClipTower(ClipBpe(), torch.nn.Identity())
    assert [len(w) for w in tower.windows("")] == [77]
    long = tower.windows("red " * 100)
    assert [len(w) for w in long] == [77, 77] and long[1][0].id == 49406 and long[1][26].id == 49407
    assert tower.windows("red")[0][1].start == 0 and tower.windows("red")[0][2].start == -1


def test_folders_are_checked(tmp_path):
    with pytest.raises(LoadError, match="unet"):
        load_folder(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "LTXVideoTransformer3DModel"}')
    with pytest.raises(FamilyError, match=r"LTXVideo.*ComfyUI"):
        load_folder(tmp_path)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", None])
def test_pickles_and_missing_weights_are_refused(tmp_path, file):
    tiny.unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    if file:
        torch.save({}, tmp_path / "unet" / file)
    for part in ("vae", "text_encoder"):
        (tmp_path / part).mkdir()
    tiny.write_scheduler(tmp_path)
    with pytest.raises(EditError, match="unet"):
        load_folder(tmp_path)
