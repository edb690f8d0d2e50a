"""StyleDiffusion's nodes on the bundled model: the Python API's own results, sockets of every kind, files, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.embeddings import value_embeddings_in
from editkit.hosts.host import text_encoder_of
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.hosts.trajectory import trajectory_in
from editkit.pipelines.attention.p2p import P2POptions
from editkit.pipelines.attention.plug_and_play import PlugAndPlayOptions
from editkit.pipelines.core.errors import EditError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.stylediffusion.edit import NoisedStart, StyleEditOptions, style_edit, style_transfer
from editkit.pipelines.stylediffusion.inversion import PRESETS, StyleOptions, image_features, style_invert
from editkit.tests.nodes.graph import call

STEPS, UPDATES = 4, 2
SOURCE = "a red circle on a mint background"
TARGET = "a green circle on a mint background"


@pytest.fixture(scope="module")
def loaded():
    return call("LoadModel", model="bundled")


@pytest.fixture(scope="module")
def ranker():
    return call("LoadRanker", weights="bundled")[0]


@pytest.fixture(scope="module")
def text(loaded):
    return lambda prompt: conditioning_of(text_encoder_of(loaded[1]).encode(prompt))


@pytest.fixture(scope="module")
def inverted(loaded, text):
    """An example cut to a size that its latent is padded beyond, LATENT and trajectory."""
    image = load_example("red_circle").image[:, :92, :90]
    latent = call("EncodeImage", image=image, vae=loaded[2])[0]
    sigmas = call("EditSigmas", model=loaded[0], steps=STEPS, strength=1.0)[0]
    trajectory = call("InvertDDIM", model=loaded[0], positive=text(SOURCE), latent=latent, sigmas=sigmas)[0]
    return image, latent, trajectory


@pytest.fixture(scope="module")
def learn(loaded, text, inverted, ranker):
    image, _, trajectory = inverted

    def run(**options):
        chosen = {
            "model": loaded[0],
            "trajectory": trajectory,
            "positive": text(SOURCE),
            "negative": text(""),
            "image": image,
        }
        return call("StyleInvert", **{**chosen, "image_encoder": ranker, "inner_steps": UPDATES, **options})

    return run


@pytest.fixture(scope="module")
def learned(learn):
    return learn(seed=3)


def edited(loaded, text, embeddings, **options):
    edit = call("AlignPrompts", clip=loaded[1], source_text=SOURCE, target_text=options.pop("target", TARGET))[0]
    chosen = {"model": loaded[0], "embeddings": embeddings, "edit": edit, "negative": text("")}
    return call("StyleEdit", **{**chosen, **options}), edit


def pipeline(loaded, text, inverted, ranker, options, seed=3):
    image, _, trajectory = inverted
    prompts = [context_of(text(prompt), "prompt") for prompt in (SOURCE, "")]
    features = image_features(ranker, image, 128)
    return style_invert(
        loaded[0].denoiser, trajectory_in(trajectory), *prompts, features, seeds=[seed], options=options
    )


# ------------------------------------------------------------------------------------------------------------ learning
def test_learning_is_the_pipelines(loaded, text, inverted, ranker, learned):
    embeddings, latent, curve, report = learned
    wanted = pipeline(loaded, text, inverted, ranker, replace(PRESETS["published"], inner=UPDATES))
    values = value_embeddings_in(embeddings)
    assert torch.equal(values.scale, wanted.embeddings.scale) and torch.equal(values.shift, wanted.embeddings.shift)
    rebuilt = loaded[0].denoiser.scale_out(wanted.rebuilt)
    assert torch.equal(latent["samples"], rebuilt) and latent["editkit_size"] == (92, 90)
    assert f"{sum(wanted.updates)} updates in {STEPS} steps" in report and curve.shape[0] == 1


def test_a_preset_and_what_departs_from_it(loaded, text, inverted, ranker, learn):
    changes = {"preset": "paper", "network": "affine", "init": "identity", "lr": 3e-3, "map_targets": "published"}
    values = value_embeddings_in(learn(seed=3, cfg=5.0, attention_loss=0.5, tolerance=0.0, **changes)[0])
    wanted = StyleOptions(
        5.0, "affine", "identity", UPDATES, 1.0, 3e-3, 0, (0.0, 0.999), 0.5, "published", tolerance=0.0
    )  # fmt: skip
    assert torch.equal(values.scale, pipeline(loaded, text, inverted, ranker, wanted).embeddings.scale)
    assert values.guidance_scale == 5.0
    assert value_embeddings_in(learn(preset="paper")[0]).scale is None


def test_every_image_has_its_own_seed(learn, inverted, loaded, text, ranker, learned):
    latent = inverted[1]
    two = {**latent, "samples": latent["samples"].repeat(2, 1, 1, 1)}
    trajectory = call(
        "InvertDDIM", model=loaded[0], positive=text(SOURCE), latent=two,
        sigmas=call("EditSigmas", model=loaded[0], steps=STEPS, strength=1.0)[0],
    )[0]  # fmt: skip
    both = value_embeddings_in(learn(trajectory=trajectory, seed=3)[0])
    assert both.scale.shape[1] == 2 and not torch.allclose(both.scale[:, 0], both.scale[:, 1])
    alone = value_embeddings_in(learned[0]).scale
    assert (both.scale[:, :1] - alone).norm() < 1e-2 * alone.norm()


# --------------------------------------------------------------------------------------------------------------- edits
def test_edits_are_the_pipelines(loaded, text, inverted, learned):
    (source, found), edit = edited(loaded, text, learned[0], tau_v=0.4, tau_c=0.7, tau_s=0.3, tau_u=0.5, self_divisor=1)
    values, denoiser = value_embeddings_in(learned[0]), loaded[0].denoiser
    options = StyleEditOptions(0.4, P2POptions(0.7, 0.3, 0.5, 1))
    wanted = style_edit(denoiser, values, edit, context_of(text(""), "negative"), options=options)
    assert torch.equal(found["samples"], denoiser.scale_out(wanted.edited)) and found["editkit_size"] == (92, 90)
    assert torch.equal(source["samples"], inverted[1]["samples"])


def test_sdedit_starts_from_seeded_noise(loaded, text, learned):
    (_, found), edit = edited(loaded, text, learned[0], sdedit_strength=0.5, seed=9)
    values, denoiser = value_embeddings_in(learned[0]), loaded[0].denoiser
    wanted = style_edit(
        denoiser, values, edit, context_of(text(""), "negative"), start=NoisedStart(0.5, [9])
    )  # fmt: skip
    assert torch.equal(found["samples"], denoiser.scale_out(wanted.edited))
    assert not torch.equal(found["samples"], edited(loaded, text, learned[0])[0][1]["samples"])


def test_transfer_is_the_pipelines(loaded, text, inverted, learned):
    chosen = {"source": text(SOURCE), "target": text(TARGET), "negative": text(""), "trajectory": inverted[2]}
    found = call(
        "StyleTransfer", model=loaded[0], embeddings=learned[0], features_until=0.6, attention_until=0.4,
        last_step="exclusive", attention_from=0, **chosen,
    )[0]  # fmt: skip
    values, denoiser = value_embeddings_in(learned[0]), loaded[0].denoiser
    prompts = [context_of(text(prompt), "prompt") for prompt in (SOURCE, TARGET, "")]
    options = PlugAndPlayOptions(0.6, 0.4, False, None, 0)
    wanted = style_transfer(denoiser, values, trajectory_in(inverted[2]), *prompts, options=options)
    assert torch.equal(found["samples"], denoiser.scale_out(wanted.edited)) and found["editkit_size"] == (92, 90)


def test_null_text_embeddings_may_stand_in_the_negative(loaded, text, inverted, learned):
    negatives = call("NegativePrompt", model=loaded[0], trajectory=inverted[2], positive=text(SOURCE))[0]
    (_, found), _ = edited(loaded, text, learned[0], negative=negatives)
    (_, plain), _ = edited(loaded, text, learned[0], negative=text(SOURCE))
    assert torch.allclose(found["samples"], plain["samples"], atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- files
def test_a_loaded_inversion_makes_the_same_edit_bit_for_bit(loaded, text, learned, tmp_path):
    from editkit.hosts.diffusers.host import headless_run

    with headless_run(tmp_path):
        file = call("SaveEmbeddings", embeddings=learned[0], filename_prefix="cat/red")[0]
    again = call("LoadEmbeddings", file=file)[0]
    for options in ({}, {"sdedit_strength": 0.5}):
        (_, ours), _ = edited(loaded, text, learned[0], **options)
        (_, found), _ = edited(loaded, text, again, **options)
        assert torch.equal(found["samples"], ours["samples"]) and found["editkit_size"] == (92, 90)


# ------------------------------------------------------------------------------------------------------------ mistakes
def test_the_two_kinds_of_embeddings_are_told_apart(loaded, text, inverted, learned):
    negatives = call("NegativePrompt", model=loaded[0], trajectory=inverted[2], positive=text(SOURCE))[0]
    with pytest.raises(EditError, match="holds negatives"):
        edited(loaded, text, negatives)
    with pytest.raises(EditError, match="no negative prompt"):
        edited(loaded, text, learned[0], negative=learned[0])
    with pytest.raises(EditError, match="is a str"):
        edited(loaded, text, "nothing")


def test_other_things_on_the_encoders_socket_are_refused(learn, loaded):
    with pytest.raises(EditError, match="image_encoder is a HeadlessVae"):
        learn(image_encoder=loaded[2])


def test_another_prompt_image_count_or_grid_is_refused(loaded, text, inverted, learn, learned):
    with pytest.raises(MismatchError, match="prompt"):
        learn(positive=text(TARGET))
    with pytest.raises(ShapeError, match="image has 3"):
        learn(image=inverted[0].repeat(3, 1, 1, 1))
    with pytest.raises(MismatchError, match="source prompt"):
        edit = call("AlignPrompts", clip=loaded[1], source_text=TARGET, target_text=SOURCE)[0]
        edited(loaded, text, learned[0], edit=edit)
    sigmas = call("EditSigmas", model=loaded[0], steps=STEPS + 1, strength=1.0)[0]
    other = call("InvertDDIM", model=loaded[0], positive=text(SOURCE), latent=inverted[1], sigmas=sigmas)[0]
    with pytest.raises(MismatchError, match="made on"):
        call(
            "StyleTransfer", model=loaded[0], embeddings=learned[0], trajectory=other, source=text(SOURCE),
            target=text(TARGET), negative=text(""),
        )  # fmt: skip
    with pytest.raises(ParameterError, match="affine"):
        learn(preset="paper", init="identity")
