"""StyleDiffusion natively: what learns, what stays, a CLIP_VISION as image encoder, and the headless host's results."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import comfy.clip_vision
import comfy.model_management as management
import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.comfyui.host import ComfyUIHost
from editkit.hosts.embeddings import value_embeddings_in
from editkit.hosts.host import image_encoder_of, text_encoder_of
from editkit.hosts.latent import unnoised_samples
from editkit.hosts.sockets import conditioning_of
from editkit.pipelines.core.errors import EditError
from editkit.pipelines.inversion.ddim import invert
from editkit.pipelines.stylediffusion.edit import style_edit
from editkit.pipelines.stylediffusion.inversion import PRESETS, image_features, style_invert
from editkit.tests.comfyui.host.tiny import digest, same_weights
from editkit.tests.nodes.graph import call

STEPS, UPDATES = 4, 3
SOURCE = "a red circle on a mint background"
TARGET = "a green circle on a mint background"


class Scene:
    """One image inverted with the shipped model, natively."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = call("LoadModel", model="bundled")
        self.ranker = call("LoadRanker", weights="bundled")[0]
        self.image = load_example("red_circle").image
        self.latent = call("EncodeImage", image=self.image, vae=self.vae)[0]
        self.sigmas = call("EditSigmas", model=self.model, steps=STEPS, strength=1.0)[0]
        self.positive, self.empty = self.encode(SOURCE), self.encode("")
        self.trajectory = self.inverted(self.model)
        self.edit = call("AlignPrompts", clip=self.clip, source_text=SOURCE, target_text=TARGET)[0]

    def encode(self, text: str) -> list:
        return conditioning_of(text_encoder_of(self.clip).encode(text))

    def inverted(self, model):
        return call("InvertDDIM", model=model, positive=self.positive, latent=self.latent, sigmas=self.sigmas)[0]

    def learned(self, **change):
        given = {
            "model": self.model, "trajectory": self.trajectory, "positive": self.positive, "negative": self.empty,
            "image": self.image, "image_encoder": self.ranker, "inner_steps": UPDATES, "preset": "even",
        }  # fmt: skip
        return call("StyleInvert", **{**given, **change})

    def edited(self, embeddings, **change):
        given = {"model": self.model, "embeddings": embeddings, "edit": self.edit, "negative": self.empty}
        return call("StyleEdit", **{**given, **change})[1]["samples"]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


@pytest.fixture(scope="module")
def learned(scene):
    return scene.learned()


def close(ours: torch.Tensor, theirs: torch.Tensor, share: float = 1e-3) -> bool:
    return bool((ours - theirs).norm() < share * theirs.norm())


def test_learning_and_edits_are_the_headless_hosts(scene, learned):
    from editkit.hosts.diffusers.loading import load_bundled
    from editkit.hosts.diffusers.open_clip_ranker import load_bundled_ranker

    before = digest(scene.model.model)
    with torch.inference_mode(False):
        free, ranker = load_bundled(), load_bundled_ranker()
        source, null = (free.text.encode(text) for text in (SOURCE, ""))
        sigmas, clean = free.denoiser.schedule(STEPS), unnoised_samples(scene.latent, "latent").clone()
        trajectory = invert(free.denoiser, clean, source, sigmas)
        features = image_features(ranker, scene.image.clone(), source.tokens.shape[2])
        options = replace(PRESETS["even"], inner=UPDATES)
        wanted = style_invert(free.denoiser, trajectory, source, null, features, options=options)
    values = value_embeddings_in(learned[0])
    assert close(values.trajectory.latents, trajectory.latents)
    # Adam's first updates are the signs of gradients: rounding grows from step to step, and only the first can be compared
    assert close(values.scale[0], wanted.embeddings.scale[0], 0.01)
    with torch.inference_mode(False):
        given = replace(
            values, base=source, fingerprint=None, trajectory=replace(values.trajectory, prompt=trajectory.prompt)
        )
        given = replace(given, scale=given.scale.clone(), shift=given.shift.clone())
        edit = replace(scene.edit, source=source, target=free.text.encode(TARGET))
        theirs = style_edit(free.denoiser, given, edit, null).edited / free.denoiser.scaling_factor
    assert close(scene.edited(learned[0]), theirs)
    assert same_weights(scene.model.model, before)


def test_nothing_of_the_model_asks_for_gradients_or_keeps_hooks(scene, learned):
    network = scene.model.model.diffusion_model
    assert not any(value.requires_grad or value.grad is not None for value in network.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    assert "wrappers" not in scene.model.model_options["transformer_options"]


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("fault", ["cancel", "memory", "error"])
@pytest.mark.parametrize("at", [1, 7])
def test_a_fault_leaves_the_model_as_it_was(scene, fault, at, monkeypatch):
    from editkit.pipelines.stylediffusion import inversion as style

    before, networks, calls = digest(scene.model.model), [], []
    made, begin = style.made_networks, style.LearningControl.begin
    error = {"cancel": Cancelled(), "memory": torch.OutOfMemoryError("full"), "error": RuntimeError("kernel")}[fault]

    def kept(*args):
        found = made(*args)
        networks.extend(weakref.ref(value) for value in found.parameters.values())
        return found

    def counted(*args):
        calls.append(1)
        if len(calls) == at:
            raise error

    monkeypatch.setattr(style, "made_networks", kept)
    if fault == "cancel":
        monkeypatch.setattr(ComfyUIHost, "progress", lambda self, total, model: counted)
    else:
        monkeypatch.setattr(style.LearningControl, "begin", lambda *args: (counted(), begin(*args))[1])
    with pytest.raises(type(error)) as caught:
        scene.learned()
    error.__traceback__ = None
    del caught
    gc.collect()
    assert networks and not any(ref() is not None for ref in networks)
    assert same_weights(scene.model.model, before)
    test_nothing_of_the_model_asks_for_gradients_or_keeps_hooks(scene, None)
    monkeypatch.undo()
    assert torch.isfinite(scene.learned(inner_steps=1)[1]["samples"]).all()


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A CLIP_VISION with seeded weights, built as the host builds its own."""
    config = {
        "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 32,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model", "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2,
        "patch_size": 8, "projection_dim": 16, "torch_dtype": "float32",
    }  # fmt: skip
    path: Path = tmp_path_factory.mktemp("vision") / "config.json"
    path.write_text(json.dumps(config))
    made = comfy.clip_vision.ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.2 if value.is_floating_point() else value
        for name, value in made.get_sd().items()
    }
    made.load_sd(state)
    return made


def test_a_clip_vision_gives_normed_tokens_without_the_projection(scene, vision):
    tokens = image_encoder_of(vision).image_tokens(scene.image)
    assert tokens.shape == (1, 17, 32) and tokens.dtype == torch.float32
    projected = vision.model.visual_projection(tokens[:, 0].to(vision.load_device))
    torch.testing.assert_close(projected.float().cpu(), vision.encode_image(scene.image)["image_embeds"].float().cpu())


def test_a_clip_vision_teaches_too(scene, vision):
    values = value_embeddings_in(scene.learned(image_encoder=vision)[0])
    assert values.scale.shape == (STEPS, 1, 77, 128) and torch.isfinite(values.scale).all()
    with pytest.raises(EditError, match="image_encoder"):
        scene.learned(image_encoder=scene.clip)


def test_a_loaded_inversion_makes_the_same_edit_bit_for_bit(scene, learned, tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    file = call("SaveEmbeddings", embeddings=learned[0], filename_prefix="red")[0]
    again = call("LoadEmbeddings", file=file)[0]
    assert torch.equal(scene.edited(again), scene.edited(learned[0]))


def test_transfer_and_sdedit_run_natively(scene, learned):
    sdedit = scene.edited(learned[0], sdedit_strength=0.6, seed=4)
    assert torch.equal(sdedit, scene.edited(learned[0], sdedit_strength=0.6, seed=4))
    styled = call(
        "StyleTransfer", model=scene.model, embeddings=learned[0], trajectory=scene.trajectory, source=scene.positive,
        target=scene.encode(TARGET), negative=scene.empty,
    )[0]  # fmt: skip
    assert torch.isfinite(styled["samples"]).all() and not torch.equal(styled["samples"], sdedit)


def test_nothing_stays_loaded_but_what_the_host_manages(scene, learned):
    count = len(management.current_loaded_models)
    scene.edited(learned[0])
    assert len(management.current_loaded_models) == count
