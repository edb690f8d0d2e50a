"""LayerDiffusion and Imagic as nodes: what they hand on, and that they are the headless functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.diffusers.host import headless_run
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.host import text_encoder_of, tuned_model
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.core.errors import LoadError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.tune_plan import TunePlan
from editkit.pipelines.layerdiffusion.embeddings import EmbeddingOptions, layered_embeddings
from editkit.pipelines.layerdiffusion.finetune import LIGHT, layered_tune
from editkit.pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from editkit.pipelines.layerdiffusion.reference_background import fitted_image, object_latent_mask
from editkit.pipelines.learning.weight_deltas import load_changes
from editkit.tests.nodes.graph import call


@pytest.fixture(scope="module")
def start():
    """MODEL, a way to encode text, VAE, the example, its latent and a reference."""
    model, clip, vae = call("LoadModel", model="bundled")

    def text(words: str):
        return conditioning_of(text_encoder_of(clip).encode(words))

    example = load_example("red_circle")
    latent = call("EncodeImage", image=example.image, vae=vae)[0]
    reference, image = call("LayeredReference", vae=vae, latent=latent, image=load_example("thin_stroke").image)
    return model, text, vae, example, latent, reference, image


@pytest.fixture(scope="module")
def learned(start):
    model, text, _, example, latent, reference, _ = start
    fitted = call(
        "LayeredEmbeddings", model=model, object=text("a blue shape"), background=text("a cream background"),
        latent=reference, mask=example.mask, steps=2, lr=0.01, seed=4,
    )  # fmt: skip
    tuned = call(
        "LayeredTune", model=model, mixed=fitted[2], latent=latent, mask=example.mask, reference=reference, steps=2,
        lr=1e-3, rank=2, seed=4,
    )  # fmt: skip
    return fitted, tuned


def predict(model, conditioning) -> torch.Tensor:
    z = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.denoiser.denoise(z, 2.0, [context_of(conditioning, "positive")])[0]


def test_nodes_equal_the_headless_functions(start, learned):
    model, text, _, example, latent, reference, _ = start
    (*embeddings, curve, report), (tuned, lora, _, _) = learned
    latent_pixels = object_latent_mask(example.mask, 12, 12, 8)
    free = load_bundled()
    pair = [context_of(text(words), "text") for words in ("a blue shape", "a cream background")]
    fitted = layered_embeddings(
        free.denoiser, reference["samples"], *pair, latent_pixels, seeds=[4], options=EmbeddingOptions(steps=2, lr=0.01)
    )
    for ours, theirs in zip(embeddings, (fitted.object, fitted.background, fitted.mixed), strict=True):
        torch.testing.assert_close(ours[0][0], theirs.tokens, atol=1e-4, rtol=1e-4)
    options = replace(LIGHT, plan=TunePlan("lora", 2, 4), steps=2, lr=1e-3)
    mixed = context_of(embeddings[2], "mixed")
    found = layered_tune(
        free.denoiser, latent["samples"], reference["samples"], mixed, latent_pixels, seeds=[4], options=options
    )
    assert lora.keys() == found.changes.keys()
    moved, same = (predict(tuned_model(model, changes), embeddings[2]) for changes in (lora, found.changes))
    torch.testing.assert_close(moved, same, atol=1e-4, rtol=1e-4)
    assert torch.equal(moved, predict(tuned, embeddings[2]))
    assert curve.shape[-1] == 3 and report.startswith("embeddings: 2 steps")


def test_the_users_model_predicts_as_before(start, learned):
    model, text, *_ = start
    words = text("a red circle on a mint background")
    fresh = call("LoadModel", model="bundled")[0]
    assert torch.equal(predict(model, words), predict(fresh, words))
    assert not torch.equal(predict(learned[1][0], words), predict(model, words))


def test_the_reference_is_fitted_or_made(start):
    model, text, vae, _, latent, reference, image = start
    assert reference["samples"].shape == latent["samples"].shape and image.shape == (1, 96, 96, 3)
    assert (image - load_example("thin_stroke").image).abs().mean() < 0.05
    made = call(
        "LayeredReference", vae=vae, latent=latent, model=model, positive=text("a sky background"), negative=text(""),
        steps=4, cfg=3.0, seed=1,
    )  # fmt: skip
    again = call(
        "LayeredReference",
        vae=vae,
        latent=latent,
        model=model,
        positive=text("a sky background"),
        cfg=1.0,
        steps=4,
        seed=1,
    )
    assert made[0]["samples"].shape == latent["samples"].shape
    assert not torch.equal(made[0]["samples"], again[0]["samples"])
    with pytest.raises(ParameterError, match="no background is connected"):
        call("LayeredReference", vae=vae, latent=latent)
    with pytest.raises(ParameterError, match="no negative"):
        call("LayeredReference", vae=vae, latent=latent, model=model, positive=text("a sky background"), steps=2)


def test_images_of_any_shape_are_scaled_to_cover():
    wide = torch.zeros(1, 10, 40, 3)
    wide[:, :, 15:25] = 1  # what the centre cut keeps
    assert torch.equal(fitted_image(wide, 10, 40), wide)
    assert torch.equal(fitted_image(wide, 10, 10), torch.ones(1, 10, 10, 3))
    assert fitted_image(wide, 33, 7).shape == (1, 33, 7, 3)
    assert fitted_image(torch.rand(2, 9, 5, 3), 64, 64).shape == (2, 64, 64, 3)


def test_a_thin_object_keeps_the_latent_pixels_it_touches():
    mask = torch.zeros(2, 32, 32)
    mask[0, 8:24, 8:24] = 1
    mask[1, :, 3] = 1
    latent_pixels = object_latent_mask(mask, 4, 4, 8)
    assert latent_pixels[0].sum() == 4 and latent_pixels[1, :, 0].tolist() == [1] * 4 and latent_pixels[1].sum() == 4


def test_alternating_guidance_from_noise(start, learned):
    from editkit.headless.stock_nodes import STOCK_NODES

    model, text, _, _, latent, _, _ = start
    fitted, (tuned, *_) = learned
    sigmas = call("EditSigmas", model=tuned, steps=4, strength=1.0)[0]
    guider = call(
        "IterativeGuidance", model=tuned, object=fitted[0], mixed=fitted[2], negative=text(""), cfg=3.0, sigmas=sigmas
    )[0]
    guidance = guider.prompts.positive
    assert isinstance(guidance, IterativeGuidance) and guidance.phase == 0
    empty = {"samples": torch.zeros(1, 4, 12, 12)}
    out = STOCK_NODES["SamplerCustomAdvanced"](None, 5, guider, "euler", sigmas, empty)[0]["samples"]
    swapped = call(
        "IterativeGuidance", model=tuned, object=fitted[0], mixed=fitted[2], negative=text(""), cfg=3.0, sigmas=sigmas,
        swap=True,
    )[0]  # fmt: skip
    other = STOCK_NODES["SamplerCustomAdvanced"](None, 5, swapped, "euler", sigmas, empty)[0]["samples"]
    assert out.shape == latent["samples"].shape and not torch.equal(out, other)
    with pytest.raises(MismatchError):
        STOCK_NODES["SamplerCustomAdvanced"](None, 5, guider, "euler", sigmas * 0.9, empty)


def test_what_was_learned_is_saved_as_a_lora(start, learned, tmp_path):
    model, text, *_ = start
    tuned, lora = learned[1][:2]
    with headless_run(output_folder=tmp_path):
        first, second = (call("SaveLora", lora=lora, filename_prefix="mine/circle")[0] for _ in range(2))
        with pytest.raises(ParameterError, match="filename_prefix"):
            call("SaveLora", lora=lora, filename_prefix="../outside")
    assert first == str(tmp_path / "loras" / "mine" / "circle_00001.safetensors") and second.endswith(
        "_00002.safetensors"
    )
    words, changes = text("a blue shape"), load_changes(tmp_path / "loras" / "mine" / "circle_00001.safetensors")
    assert torch.equal(predict(tuned_model(model, changes), words), predict(tuned, words))
    with pytest.raises(LoadError, match="cannot be read"):
        load_changes(tmp_path / "absent.safetensors")


def test_imagic(start):
    model, text, _, _, latent, *_ = start
    target = text("a blue circle on a mint background")
    tuned, lora, positive, fitted, curve, report = call(
        "Imagic", model=model, latent=latent, target=target, eta=0.25, embedding_steps=2, embedding_lr=0.01, steps=2,
        lr=1e-3, rank=2,
    )  # fmt: skip
    torch.testing.assert_close(positive[0][0], 0.25 * target[0][0] + 0.75 * fitted[0][0])
    assert not torch.equal(fitted[0][0], target[0][0])
    assert not torch.equal(predict(tuned, target), predict(model, target))
    assert report.count("2 steps") == 2 and any(change.any() for change in lora.values())


def test_refusals(start):
    model, text, _, example, latent, reference, _ = start
    words = {"object": text("a blue shape"), "background": text("a cream background")}
    with pytest.raises(ParameterError, match="no mask"):
        call("LayeredEmbeddings", model=model, **words, latent=reference, steps=1)
    with pytest.raises(ParameterError, match="no reference"):
        call("LayeredTune", model=model, mixed=words["object"], latent=latent, mask=example.mask, steps=1)
    noised = call("NoiseLatent", model=model, latent=latent, sigmas=torch.tensor([3.0, 1.0, 0.0]))[0]
    with pytest.raises(MismatchError, match="without noise is needed"):
        call("Imagic", model=model, latent=noised, target=words["object"])
    with pytest.raises(ShapeError, match="one CLIP"):
        long = [[torch.cat([words["object"][0][0]] * 2, 1), {}]]
        call("LayeredEmbeddings", model=model, object=long, background=words["background"], latent=reference,
             mask=example.mask, steps=1)  # fmt: skip
