"""The attention nodes on a native MODEL: through KSampler and SamplerCustomAdvanced, and equal to the headless host."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, Noise_EmptyNoise, Noise_RandomNoise, SamplerCustomAdvanced

import nodes as stock_nodes
from editkit.hosts.bundled import tiny_folder
from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.comfyui.bundled import build_bundled
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.host import text_encoder_of
from editkit.hosts.sockets import HeadlessClip, HeadlessModel, HeadlessVae, conditioning_of
from editkit.tests.comfyui.host.test_attention import hooks_of
from editkit.tests.comfyui.host.tiny import digest, same_weights
from editkit.tests.nodes.graph import call

STEPS, SCALE = 5, 4.0  # steps that divide 1000: the host's ddim_uniform is then our grid
SOURCE, TARGET = "a red circle on a mint background", "a blue square on a mint background"
KINDS = ("P2Plus", "MasaCtrl", "FeatureInjection")


@pytest.fixture(scope="module")
def native():
    with torch.inference_mode():
        return build_bundled(tiny_folder())


@pytest.fixture(scope="module")
def headless():
    loaded = load_bundled()
    return HeadlessModel(loaded.denoiser), HeadlessClip(loaded.text), HeadlessVae(loaded.codec)


def encoded(loaded, prompt: str) -> list:
    return conditioning_of(text_encoder_of(loaded[1]).encode(prompt))


def aligned(loaded, **words):
    return call("AlignPrompts", clip=loaded[1], source_text=SOURCE, target_text=TARGET, **words)[0]


def grid(loaded):
    return call("EditSigmas", model=loaded[0], steps=STEPS, strength=1.0)[0]


def empty(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, 12, 12)}


def inverted(loaded):
    """LATENT, trajectory and noised LATENT of an example."""
    latent = call("EncodeImage", image=load_example("red_circle").image, vae=loaded[2])[0]
    outputs = call("InvertDDIM", model=loaded[0], positive=encoded(loaded, SOURCE), latent=latent, sigmas=grid(loaded))
    return latent, *outputs[:2]


def patched(loaded, kind: str, **more):
    """MODEL and CONDITIONING of one of the nodes."""
    if kind == "P2Plus":
        return call(kind, model=loaded[0], edit=aligned(loaded, blend_words="circle, square"), tau_u=0.5, **more)
    prompts = {"source": encoded(loaded, SOURCE), "target": encoded(loaded, TARGET)}
    return call(
        kind, model=loaded[0], **prompts, **({"from_step": 1, "from_layer": 0.5} if kind == "MasaCtrl" else {}), **more
    )


def ksampler(loaded, model, positive, latent=None, name: str = "euler"):
    return stock_nodes.common_ksampler(
        model, 5, STEPS, SCALE, name, "ddim_uniform", positive, encoded(loaded, ""), latent or empty(2)
    )[0]["samples"]  # fmt: skip


def custom(loaded, model, positive, latent, noise, name: str = "euler"):
    guider = CFGGuider().get_guider(model, positive, encoded(loaded, ""), SCALE)[0]
    sampler = comfy.samplers.sampler_object(name)
    return SamplerCustomAdvanced().sample(noise, guider, sampler, grid(loaded), latent)[0]["samples"]


def close(a, b, tolerance=1e-3) -> bool:
    return float((a - b).norm() / b.norm()) <= tolerance


def edits(loaded, negative=None, **more):
    given = {
        "edit": aligned(loaded, blend_words="circle, square"),
        "negative": negative or encoded(loaded, ""),
        "cfg": SCALE,
    }
    return [part["samples"] for part in call("P2PlusEdit", model=loaded[0], tau_u=0.5, **{**given, **more})]


@pytest.mark.parametrize("kind", KINDS)
def test_ksampler_and_sampler_custom_advanced(native, kind) -> None:
    """The same pair from either; beside it the source that is sampled alone."""
    model, pair = patched(native, kind)
    first = ksampler(native, model, pair)
    assert close(custom(native, model, pair, empty(2), Noise_RandomNoise(5)), first, 1e-4)
    alone = ksampler(native, native[0], encoded(native, SOURCE), empty(1))
    plain = ksampler(native, native[0], encoded(native, TARGET), empty(1))
    assert close(first[:1], alone)
    assert not close(first[1:], plain, 0.02) and not close(first[1:], alone, 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_both_hosts_sample_the_same_pair(native, headless, kind) -> None:
    from pathlib import Path

    from editkit.headless.run import Run
    from editkit.headless.stock_nodes import STOCK_NODES

    model, pair = patched(headless, kind)
    theirs = STOCK_NODES["KSampler"](
        Run(Path(), Path()), model=model, seed=5, steps=STEPS, cfg=SCALE, sampler_name="euler", scheduler="ddim_uniform",
        positive=pair, negative=encoded(headless, ""), latent_image=empty(2),
    )[0]["samples"]  # fmt: skip
    assert close(ksampler(native, *patched(native, kind)), theirs)


def test_the_whole_edit_is_the_same_in_both_hosts(native, headless) -> None:
    generated, real = [], []
    for loaded in (native, headless):
        generated.append(edits(loaded, latent=empty(2), sigmas=grid(loaded), seed=7))
        latent, trajectory, _ = inverted(loaded)
        kept = call("NegativePrompt", model=loaded[0], trajectory=trajectory, positive=encoded(loaded, SOURCE))[0]
        real.append([*edits(loaded, trajectory=trajectory), *edits(loaded, kept, trajectory=trajectory)])
        assert torch.equal(real[-1][0], latent["samples"])
    for ours, theirs in (*zip(*generated, strict=True), *zip(*real, strict=True)):
        assert close(ours, theirs)
    assert not close(generated[0][1], generated[0][0], 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_image_beside_its_edit(native, kind) -> None:
    latent, trajectory, noised = inverted(native)
    model, pair = patched(native, kind, trajectory=trajectory)
    start = {**noised, "samples": noised["samples"].repeat(2, 1, 1, 1)}
    source, target = custom(native, model, pair, start, Noise_EmptyNoise())
    assert torch.equal(source, latent["samples"][0]) and not close(target, source, 0.05)
    if kind == "P2Plus":
        assert close(target[None], edits(native, trajectory=trajectory)[1])


def test_a_guider_with_embeddings_on_pairs(native) -> None:
    """Null-text and negative-prompt inversion as the unconditional side under a native sampler."""
    _, trajectory, noised = inverted(native)
    kept = call("NegativePrompt", model=native[0], trajectory=trajectory, positive=encoded(native, SOURCE))[0]
    model, pair = patched(native, "P2Plus", trajectory=trajectory)
    guider = call("EmbeddingsGuider", model=model, positive=pair, embeddings=kept, cfg=SCALE)[0]
    start = {**noised, "samples": noised["samples"].repeat(2, 1, 1, 1)}
    sampler = comfy.samplers.sampler_object("euler")
    result = SamplerCustomAdvanced().sample(Noise_EmptyNoise(), guider, sampler, grid(native), start)[0]["samples"]
    assert close(result[1:], edits(native, kept, trajectory=trajectory)[1])


def test_maps_are_the_same_in_both_hosts(native, headless) -> None:
    results = []
    for loaded in (native, headless):
        given = {"edit": aligned(loaded), "trajectory": inverted(loaded)[1], "words": "red, circle", "levels": 3}
        results.append(call("AttentionMaps", model=loaded[0], **given)[1])
    assert (results[0] - results[1]).abs().max() <= 1e-3


def test_five_runs_leave_what_one_leaves(native) -> None:
    latent, trajectory, noised = inverted(native)
    start = {**noised, "samples": noised["samples"].repeat(2, 1, 1, 1)}

    def run() -> int:
        for kind in KINDS:
            model, pair = patched(native, kind, trajectory=trajectory)
            custom(native, model, pair, start, Noise_EmptyNoise())
            ksampler(native, *patched(native, kind), name="dpmpp_2m_sde")
        edits(native, trajectory=trajectory)
        del model, pair
        comfy.model_management.cleanup_models_gc()
        gc.collect()
        return sum(o.numel() * o.element_size() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    sizes = [run() for _ in range(5)]
    assert sizes[4] == sizes[0]


@pytest.mark.parametrize("kind", ["P2PlusEdit", *KINDS])
def test_a_cancel_leaves_everything_as_it_was(native, kind, monkeypatch) -> None:
    stop = comfy.model_management.InterruptProcessingException
    before, options = digest(native[0].model), repr(native[0].model_options)
    plain = ksampler(native, native[0], encoded(native, TARGET), empty(1))
    calls = []

    def failing(*args, **named):
        calls.append(1)
        if len(calls) == 10:  # in the middle of a network call
            raise stop
        return own(*args, **named)

    own = torch.nn.functional.group_norm  # every network has it, whatever computes its attention
    monkeypatch.setattr(torch.nn.functional, "group_norm", failing)
    with pytest.raises(stop):
        if kind == "P2PlusEdit":
            edits(native, latent=empty(), sigmas=grid(native))
        else:
            ksampler(native, *patched(native, kind))
    monkeypatch.undo()
    assert hooks_of(native[0]) == 0
    assert torch.equal(ksampler(native, native[0], encoded(native, TARGET), empty(1)), plain)
    assert same_weights(native[0].model, before) and repr(native[0].model_options) == options
