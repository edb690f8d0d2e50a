"""The node classes wired as a graph on the bundled model: the same latents as the headless API, exact and repeatable."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.diffusers.host import headless_run
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.host import open_denoiser
from editkit.pipelines.blended.pipeline import EditSettings, edit_latents
from editkit.pipelines.core.errors import EditError, MismatchError, ShapeError
from editkit.pipelines.core.masks import PAPER_KERNELS
from editkit.tests.nodes.graph import blended_chain, call


@pytest.fixture(scope="module")
def loaded():
    return call("LoadModel", model="bundled")


@pytest.fixture(scope="module")
def example():
    return load_example("empty_side")


def test_nodes_equal_the_headless_api(loaded, example):
    chain = blended_chain(*loaded, example.image, example.mask, example.prompt)
    model, settings = (
        load_bundled(),
        EditSettings(steps=6, guidance_scale=4.0, candidates=2, seed=3, kernels=PAPER_KERNELS),
    )
    latents = edit_latents(
        model.denoiser, model.codec, model.text, example.image, example.mask, example.prompt, settings=settings
    )  # fmt: skip
    got = chain["edited"]["samples"]
    assert (got - latents).abs().max() <= 1e-3 * latents.abs().max()


def test_ranges_equal_the_whole_bit_for_bit(loaded, example):
    whole = blended_chain(*loaded, example.image, example.mask, example.prompt)
    parts = blended_chain(*loaded, example.image, example.mask, example.prompt, ranges=[(0, 1), (1, 4), (4, 6)])
    assert torch.equal(whole["edited"]["samples"], parts["edited"]["samples"])


def test_latent_outside_is_the_sources_bit_for_bit(loaded, example):
    chain = blended_chain(*loaded, example.image, example.mask, example.prompt)
    outside = (chain["schedule"].masks[-1] == 0).expand(2, 4, -1, -1)
    source = chain["latent"]["samples"].expand(2, -1, -1, -1)
    assert torch.equal(chain["edited"]["samples"][outside], source[outside])
    assert not torch.equal(chain["edited"]["samples"][~outside], source[~outside])


@pytest.mark.parametrize("height, width", [(45, 61), (16, 16), (9, 100)])
def test_any_size_comes_back_the_same(loaded, height, width):
    image = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, height, width)
    mask[:, : height // 2] = 1
    chain = blended_chain(*loaded, image, mask, "a red ring on a sky background", steps=2)
    decoded = call("DecodeLatent", latent=chain["edited"], vae=loaded[2])[0]
    tuned = call("TuneDecoder", vae=loaded[2], latent=chain["edited"], source=image, mask=mask, steps=2)
    result, change = call("CompositeSource", edited=tuned[1], source=image, mask=mask)
    assert decoded.shape == tuned[1].shape == result.shape == (2, height, width, 3)
    assert change == 0 and torch.equal(result[:, height // 2 :], image[:, height // 2 :].expand(2, -1, -1, -1))


def test_tuned_vae_decodes_like_its_image_and_the_users_vae_stays(loaded, example):
    latent = call("EncodeImage", image=example.image, vae=loaded[2])[0]
    before = {name: value.clone() for name, value in loaded[2].codec.vae.state_dict().items()}
    vae, image, plot, report = call(
        "TuneDecoder", vae=loaded[2], latent=latent, source=example.image, mask=example.mask, steps=3
    )  # fmt: skip
    assert torch.allclose(call("DecodeLatent", latent=latent, vae=vae)[0], image, atol=1e-5)
    assert plot.ndim == 4 and "dB" in report
    after = loaded[2].codec.vae.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_latent_fine_tune_takes_the_published_step_by_default(loaded, example):
    """0.1 on the scaled latent: Adam's first step is the rate, so the latent moves by 0.1 / 0.18215, with a model or not."""
    model, _, vae = loaded
    latent = call("EncodeImage", image=1 - example.image, vae=vae)[0]
    given = {"vae": vae, "latent": latent, "source": example.image, "mask": example.mask, "steps": 1}
    for more in ({}, {"model": model}):
        tuned = call("TuneLatent", **given, **more)[0]
        assert float((tuned["samples"] - latent["samples"]).abs().max()) == pytest.approx(0.549, abs=1e-3)


def test_ranking_keeps_images_and_latents_together(loaded, example):
    chain = blended_chain(*loaded, example.image, example.mask, example.prompt, copies=4, steps=3)
    images = call("DecodeLatent", latent=chain["edited"], vae=loaded[2])[0]
    ranker = call("LoadRanker", weights="bundled")[0]
    ranked, latent, scores, order = call(
        "RankByText", images=images, ranker=ranker, text=example.new_words, mask=example.mask, latent=chain["edited"], keep=3
    )  # fmt: skip
    index = [int(i) for i in order.split(",")]
    values = [float(line) for line in scores.splitlines()]
    assert len(index) == 3 and values == sorted(values, reverse=True)
    assert torch.equal(ranked, images[index]) and torch.equal(latent["samples"], chain["edited"]["samples"][index])
    named = {**chain["edited"], "batch_index": [7, 8, 9, 10], "noise_mask": torch.arange(4.0).reshape(4, 1, 1)}
    again = call(
        "RankByText", images=images, ranker=ranker, text=example.new_words, mask=example.mask, latent=named, keep=3
    )[1]
    assert again["batch_index"] == [7 + i for i in index] and again["noise_mask"].flatten().tolist() == index
    picked = call("RankByText", images=images, ranker=ranker, text="x", region="masked", keep=1, latent=named, pick=2)
    assert picked[3] == "2" and torch.equal(picked[0], images[2:3]) and picked[1]["batch_index"] == [9]


def test_a_latent_of_another_sigma_is_refused(loaded, example):
    with pytest.raises(MismatchError, match="has sigma"):
        blended_chain(*loaded, example.image, example.mask, example.prompt, ranges=[(0, 2), (4, 6)])


def test_wrong_sizes_and_batches_are_refused_by_name(loaded, example):
    with pytest.raises(ShapeError, match="schedule"):
        chain = blended_chain(*loaded, example.image, example.mask, example.prompt, steps=2)
        small = call("EncodeImage", image=example.image[:, :64, :64], vae=loaded[2])[0]
        noised = call("NoiseLatent", model=loaded[0], latent=small, sigmas=chain["sigmas"])[0]
        text = [[torch.zeros(1, 77, 128), {}]]
        call(
            "BlendedDenoise", model=loaded[0], positive=text, negative=text, sigmas=chain["sigmas"], latent=noised,
            source_latent=small, schedule=chain["schedule"],
        )  # fmt: skip


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("error", [Cancelled, ZeroDivisionError, MemoryError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("node", ["loop", "decoder"])
def test_faults_leave_model_and_vae_bit_identical(loaded, example, error, node):

    modules = [loaded[0].denoiser.unet, loaded[2].codec.vae, *loaded[1].text_encoder.modules()]
    before = [{n: v.clone() for n, v in module.state_dict().items()} for module in modules]
    chain = blended_chain(*loaded, example.image, example.mask, example.prompt, steps=2)
    at = random.Random(f"{node} {error.__name__}").randint(1, 12)  # another iteration for each, the same in every run

    def fail(done, total, preview=None):
        if done == at:
            raise error("stop")

    with headless_run(progress=fail), pytest.raises(error):
        if node == "loop":
            blended_chain(*loaded, example.image, example.mask, example.prompt, steps=12)
        else:
            call(
                "TuneDecoder",
                vae=loaded[2],
                latent=chain["edited"],
                source=example.image,
                mask=example.mask,
                steps=12,
            )
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_five_runs_hold_no_more_tensors_than_one(loaded, example):
    """The graph of `ranked_batch_tuned_winner`: what is alive after the fifth run was alive after the first."""
    ranker = call("LoadRanker", weights="bundled")[0]

    def run() -> int:
        chain = blended_chain(*loaded, example.image, example.mask, example.prompt, copies=3, steps=2)
        images = call("DecodeLatent", latent=chain["edited"], vae=loaded[2])[0]
        _, winner, _, _ = call(
            "RankByText", images=images, ranker=ranker, text="a yellow star", mask=example.mask, latent=chain["edited"], keep=1
        )  # fmt: skip
        tuned = call("TuneDecoder", vae=loaded[2], latent=winner, source=example.image, mask=example.mask, steps=2)
        call("CompositeSource", edited=tuned[1], source=example.image, mask=example.mask)
        del chain, images, winner, tuned
        gc.collect()
        return sum(o.numel() * o.element_size() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    sizes = [run() for _ in range(5)]
    assert sizes[4] == sizes[0]


def test_errors_are_edit_errors_with_socket_names(loaded, example):
    with pytest.raises(EditError, match="connect latent or vae"):
        call("LatentMask", mask=example.mask)
    with pytest.raises(EditError, match="kernels"):
        call("DilationSchedule", latent_mask=torch.ones(1, 4, 4), kernels="4,1")
    with pytest.raises(EditError, match="published_rule"):
        call("DilationSchedule", latent_mask=torch.ones(1, 4, 4), published_rule=True, parts="equal log-sigma")
    blended = call("BlendedModel", model=loaded[0], schedule=torch.ones(1, 12, 12))[0]
    with pytest.raises(EditError, match="is blended"), open_denoiser(blended, (1, 4, 12, 12), []):
        pass
    with pytest.raises(EditError, match="step"):
        sigmas = call("EditSigmas", model=loaded[0], steps=3)[0]
        latent = call("EncodeImage", image=example.image, vae=loaded[2])[0]
        call("NoiseLatent", model=loaded[0], latent=latent, sigmas=sigmas, step=9)
