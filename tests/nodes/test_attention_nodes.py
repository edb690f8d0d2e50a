"""The attention nodes on the bundled model: one maths with the Python API and the samplers, exact where that is promised."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.diffusers.host import headless_run
from editkit.hosts.host import text_encoder_of
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.attention.p2p import P2POptions
from editkit.pipelines.attention.pair_loop import attention_edit
from editkit.pipelines.core.errors import EditError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.noise import image_seeds, seeded_noise
from editkit.tests.nodes.graph import call
from editkit.tests.nodes.test_chain import Cancelled

STEPS, SCALE = 6, 4.0
SOURCE = "a red circle on a mint background"
TARGET = "a green circle on a mint background"


@pytest.fixture(scope="module")
def loaded():
    return call("LoadModel", model="bundled")


@pytest.fixture(scope="module")
def text(loaded):
    return lambda prompt: conditioning_of(text_encoder_of(loaded[1]).encode(prompt))


@pytest.fixture(scope="module")
def sigmas(loaded):
    return call("EditSigmas", model=loaded[0], steps=STEPS, strength=1.0)[0]


@pytest.fixture(scope="module")
def image(loaded, text, sigmas):
    """LATENT, trajectory and noised LATENT of an example."""
    latent = call("EncodeImage", image=load_example("red_circle").image, vae=loaded[2])[0]
    return latent, *call("InvertDDIM", model=loaded[0], positive=text(SOURCE), latent=latent, sigmas=sigmas)[:2]


def aligned(loaded, target: str = TARGET, **words):
    return call("AlignPrompts", clip=loaded[1], source_text=SOURCE, target_text=target, **words)[0]


def empty(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, 12, 12)}


def stock(name: str, **inputs):
    """A stock node's headless stand-in."""
    from editkit.headless.run import Run
    from editkit.headless.stock_nodes import STOCK_NODES

    with torch.inference_mode():
        return STOCK_NODES[name](Run(Path(), Path()), **inputs)


def ksampler(model, positive, negative, latent=None, **more):
    given = {
        "sampler_name": "euler",
        "scheduler": "ddim_uniform",
        "denoise": 1.0,
        "seed": 5,
        "steps": STEPS,
        "cfg": SCALE,
    }
    inputs = {**given, "latent_image": latent or empty(2), **more}
    return stock("KSampler", model=model, positive=positive, negative=negative, **inputs)[0]["samples"]


def custom(model, positive, negative, sigmas, latent, noise=None, sampler="euler"):
    guider = stock("CFGGuider", model=model, positive=positive, negative=negative, cfg=SCALE)[0]
    return stock(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )[0]["samples"]  # fmt: skip


def whole_edit(loaded, edit, negative, **more):
    return call("P2PlusEdit", model=loaded[0], edit=edit, negative=negative, cfg=SCALE, **more)


def close(a, b, tolerance=1e-3):
    return float((a - b).norm() / b.norm()) <= tolerance


def test_the_whole_edit_equals_the_python_api(loaded, text, sigmas):
    edit = aligned(loaded, blend_words="circle")
    source, edited = whole_edit(loaded, edit, text(""), tau_u=0.5, latent=empty(2), sigmas=sigmas, seed=5)
    denoiser = loaded[0].denoiser
    noise = seeded_noise((4, 12, 12), image_seeds(5, 2)) * float(sigmas[0])
    negative = context_of(text(""), "negative")
    wanted = attention_edit(
        denoiser, edit, negative, noise, sigmas=sigmas, guidance_scale=SCALE, options=P2POptions(uncond_self_until=0.5)
    )
    assert close(source["samples"], denoiser.scale_out(wanted.source), 1e-5)
    assert close(edited["samples"], denoiser.scale_out(wanted.edited), 1e-5)


@pytest.mark.parametrize("words", [{}, {"blend_words": "circle"}, {"weights": "green: 3"}])
def test_a_native_sampler_gives_what_the_whole_edit_gives(loaded, text, sigmas, words):
    edit, negative = aligned(loaded, **words), text("")
    whole = whole_edit(loaded, edit, negative, tau_u=0.5, latent=empty(), sigmas=sigmas, seed=5)
    model, pair = call("P2Plus", model=loaded[0], edit=edit, tau_u=0.5)
    sampled = ksampler(model, pair, negative)
    for got, wanted in zip(sampled, whole, strict=True):
        assert close(got, wanted["samples"][0])
    noise = stock("RandomNoise", noise_seed=5)[0]
    assert close(custom(model, pair, negative, sigmas, empty(2), noise), sampled, 1e-4)
    other = custom(model, pair, negative, sigmas, empty(2), noise, "dpmpp_2m")
    assert not close(other[1], sampled[1], 0.01) and close(
        other[:1], ksampler(loaded[0], text(SOURCE), negative, empty(1), sampler_name="dpmpp_2m")
    )


def test_the_source_is_what_it_is_alone(loaded, text):
    negative = text("")
    alone = ksampler(loaded[0], text(SOURCE), negative, empty(1))
    model, pair = call("P2Plus", model=loaded[0], edit=aligned(loaded))
    pairs = ksampler(model, pair, negative)
    assert close(pairs[:1], alone) and not close(pairs[1:], alone, 0.05)


@pytest.mark.parametrize("kind", ["P2Plus", "MasaCtrl", "FeatureInjection"])
def test_identical_prompts_give_the_identical_image(loaded, text, kind):
    if kind == "P2Plus":
        given = {"edit": aligned(loaded, SOURCE, blend_words="circle"), "tau_u": 0.5}
    else:
        given = {"source": text(SOURCE), "target": text(SOURCE)}
    model, pair = call(kind, model=loaded[0], **given)
    source, target = ksampler(model, pair, text(""))
    assert close(target, source, 1e-5)


@pytest.mark.parametrize("kind", ["P2Plus", "MasaCtrl", "FeatureInjection"])
def test_a_real_image_comes_back_bit_for_bit_beside_its_edit(loaded, text, sigmas, image, kind):
    latent, trajectory, noised = image
    edit = {"edit": aligned(loaded)} if kind == "P2Plus" else {"source": text(SOURCE), "target": text(TARGET)}
    more = {"from_step": 1, "from_layer": 0.5} if kind == "MasaCtrl" else {}
    model, pair = call(kind, model=loaded[0], trajectory=trajectory, **edit, **more)
    start = stock("RepeatLatentBatch", samples=noised, amount=2)[0]
    source, target = custom(model, pair, text(""), sigmas, start)
    assert torch.equal(source, latent["samples"][0]) and not close(target, source, 0.05)


def test_the_whole_edit_of_a_real_image(loaded, text, sigmas, image):
    latent, trajectory, noised = image
    edit, negative = aligned(loaded, blend_words="circle"), text("")
    source, edited = whole_edit(loaded, edit, negative, tau_s=0.6, trajectory=trajectory)
    assert torch.equal(source["samples"], latent["samples"]) and source["editkit_size"] == (96, 96)
    model, pair = call("P2Plus", model=loaded[0], edit=edit, tau_s=0.6, trajectory=trajectory)
    start = stock("RepeatLatentBatch", samples=noised, amount=2)[0]
    assert close(custom(model, pair, negative, sigmas, start)[1:], edited["samples"])
    kept = call("NegativePrompt", model=loaded[0], trajectory=trajectory, positive=text(SOURCE))[0]
    closed = {"tau_c": 0.0, "tau_s": 0.0, "trajectory": trajectory}
    same, swapped = (whole_edit(loaded, aligned(loaded, SOURCE), n, **closed)[1]["samples"] for n in (kept, negative))
    unguided = call(
        "P2PlusEdit", model=loaded[0], edit=aligned(loaded, SOURCE), negative=negative, **{**closed, "cfg": 1.0}
    )[1]["samples"]  # fmt: skip
    assert close(same, unguided, 1e-4), "with the source prompt as negative, guidance cancels"
    assert not close(swapped, unguided, 0.01)


def test_maps_show_the_object(loaded, image):
    example = load_example("red_circle")
    circle = (example.image[0] - example.image[0, 0, 0]).abs().amax(-1).reshape(12, 8, 12, 8).amax((1, 3)) > 0.2
    images, masks, picked = call(
        "AttentionMaps", model=loaded[0], edit=aligned(loaded), trajectory=image[1], words="red, circle", levels=4
    )  # fmt: skip
    assert images.shape[0] == masks.shape[0] == 2 and masks.shape[1:] == (12, 12)
    assert masks.min() >= 0 and masks.max() == 1 and torch.equal(picked, masks[:1])
    for mask in masks:
        assert mask[circle].mean() > 2 * mask[~circle].mean()
    every, *_ = call(
        "AttentionMaps", model=loaded[0], edit=aligned(loaded), trajectory=image[1], levels=1, prompt="target"
    )
    assert len(every) == len(TARGET.split())
    over, *_ = call(
        "AttentionMaps", model=loaded[0], edit=aligned(loaded), trajectory=image[1], words="red, circle", levels=4,
        image=example.image,
    )  # fmt: skip
    assert over.shape == images.shape and not torch.equal(over, images)


def test_maps_of_a_batch_of_latents(loaded, sigmas, image):
    latent = {"samples": image[0]["samples"].repeat(2, 1, 1, 1)}
    given = {
        "model": loaded[0],
        "edit": aligned(loaded),
        "sigmas": sigmas,
        "words": "red circle",
        "seed": 3,
        "levels": 2,
    }
    _, both, _ = call("AttentionMaps", latent=latent, **given)
    _, one, _ = call("AttentionMaps", latent=image[0], **given)
    assert len(both) == 2 and torch.allclose(both[0], one[0], atol=1e-5) and not torch.equal(both[0], both[1])


def test_five_edits_leave_what_one_leaves(loaded, text, sigmas, image):
    edit, negative = aligned(loaded, blend_words="circle"), text("")

    def run() -> int:
        whole_edit(loaded, edit, negative, tau_u=0.5, trajectory=image[1])
        model, pair = call("P2Plus", model=loaded[0], edit=edit, trajectory=image[1])
        custom(model, pair, negative, sigmas, stock("RepeatLatentBatch", samples=image[2], amount=2)[0])
        del model, pair
        gc.collect()
        return sum(o.numel() * o.element_size() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    sizes = [run() for _ in range(5)]
    assert sizes[4] == sizes[0]


def test_a_cancel_leaves_the_network_as_it_was(loaded, text, sigmas):
    unet = loaded[0].denoiser.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    processors = list(unet.attn_processors.values())

    def fail(done, total, preview=None):
        if done == 2:
            raise Cancelled

    with headless_run(progress=fail), pytest.raises(Cancelled):
        whole_edit(loaded, aligned(loaded), text(""), latent=empty(), sigmas=sigmas)
    assert list(unet.attn_processors.values()) == processors
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())


def test_misfits_are_refused_by_name(loaded, text, sigmas, image):
    edit, negative = aligned(loaded), text("")
    model, pair = call("P2Plus", model=loaded[0], edit=edit)
    with pytest.raises(ShapeError, match="batch_size to 2"):
        ksampler(model, pair, negative, empty(1))
    with pytest.raises(MismatchError, match="positive has 1 rows"):
        ksampler(model, text(SOURCE), negative)
    with pytest.raises(ParameterError, match="already has an attention edit"):
        call("MasaCtrl", model=model, source=negative, target=negative)
    with pytest.raises(ParameterError, match="native samplers"):
        whole_edit((model, *loaded[1:]), edit, negative, latent=empty(), sigmas=sigmas)
    with pytest.raises(EditError, match="edit is a list: connect the prompt edit of 'Align Prompts"):
        call("P2Plus", model=loaded[0], edit=negative)
    with pytest.raises(ParameterError, match="trajectory"):
        whole_edit(loaded, edit, negative)
    with pytest.raises(ParameterError, match="both connected"):
        whole_edit(loaded, edit, negative, trajectory=image[1], latent=empty())
    with pytest.raises(ParameterError, match="end them at 0"):
        whole_edit(loaded, edit, negative, latent=empty(), sigmas=sigmas[:-1])
    with pytest.raises(ParameterError, match="yellow"):
        call("AttentionMaps", model=loaded[0], edit=edit, words="yellow", trajectory=image[1])
    with pytest.raises(ParameterError, match="start must not lie behind end"):
        call("AttentionMaps", model=loaded[0], edit=edit, start=0.8, end=0.2, trajectory=image[1])
    with pytest.raises(EditError, match="trajectory is a dict"):
        call("FeatureInjection", model=loaded[0], source=negative, target=negative, trajectory=empty())
    two = [[torch.cat([negative[0][0]] * 2), {}]]
    with pytest.raises(ShapeError, match="source has 2 rows"):
        call("FeatureInjection", model=loaded[0], source=two, target=negative)


def test_prompts_of_other_lengths_are_repeated(loaded, text):
    """Attention over a prompt that is repeated is attention over the prompt: hosts join prompts so."""
    twice = [[text(SOURCE)[0][0].repeat(1, 2, 1), {}]]
    results = []
    for source in (text(SOURCE), twice):
        model, pair = call("MasaCtrl", model=loaded[0], source=source, target=text(TARGET))
        results.append(ksampler(model, pair, text("")))
    assert close(results[1], results[0], 1e-4)
