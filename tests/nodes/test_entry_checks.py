"""NaN, text of another encoder and latents of another model are refused where they enter, by the socket's name."""

from __future__ import annotations

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.embeddings import load_learned
from editkit.hosts.sockets import context_of
from editkit.pipelines.core.errors import EditError, LoadError, ShapeError
from editkit.pipelines.core.tensor_files import write_tensors
from editkit.pipelines.inversion.negative_embeddings import FORMAT
from editkit.tests.nodes.graph import call

WIDTH = 128


def conditioning(value: float = 0.0, width: int = WIDTH, tokens: int = 77) -> list:
    return [[torch.full((1, tokens, width), value), {}]]


@pytest.fixture(scope="module")
def loaded():
    model, _, vae = call("LoadModel", model="bundled")
    image = load_example("one_object")
    latent = call("EncodeImage", image=image.image, vae=vae)[0]
    sigmas = call("EditSigmas", model=model, steps=2, strength=1.0)[0]
    trajectory = call("InvertDDIM", model=model, positive=conditioning(), latent=latent, sigmas=sigmas)[0]
    mask = torch.ones(1, *latent["samples"].shape[-2:])
    return {
        "model": model,
        "vae": vae,
        "image": image.image,
        "latent": latent,
        "sigmas": sigmas,
        "trajectory": trajectory,
        "mask": mask,
    }


def inputs(loaded, node: str, positive: list) -> dict:
    """The inputs of a node that predicts, with this prompt."""
    of = {
        "InvertDDIM": {"latent": loaded["latent"], "sigmas": loaded["sigmas"]},
        "SDEdit": {"latent": loaded["latent"], "negative": conditioning(), "steps": 2},
        "MaskedDecode": {
            "negative": conditioning(),
            "trajectory": loaded["trajectory"],
            "latent_mask": loaded["mask"],
        },
        "EmbeddingsGuider": {},
        "NullText": {"trajectory": loaded["trajectory"], "negative": conditioning(), "inner_steps": 1},
    }[node]
    if node == "EmbeddingsGuider":
        of = {"embeddings": call("NegativePrompt", **common(loaded, conditioning()))[0]}
    return {"model": loaded["model"], "positive": positive, **of}


def common(loaded, positive: list) -> dict:
    return {"model": loaded["model"], "trajectory": loaded["trajectory"], "positive": positive}


@pytest.mark.parametrize("node", ["InvertDDIM", "SDEdit", "MaskedDecode", "EmbeddingsGuider", "NullText"])
def test_nan_in_a_prompt_is_refused_by_socket(loaded, node):
    for value in (float("nan"), float("inf")):
        with pytest.raises(EditError, match="positive contains NaN or infinity"):
            call(node, **inputs(loaded, node, conditioning(value)))


@pytest.mark.parametrize("node", ["InvertDDIM", "SDEdit"])
def test_text_of_another_encoder_is_refused_before_the_network(loaded, node):
    with pytest.raises(
        ShapeError, match="positive has width 768 but this model takes 128: encode it with this model's"
    ):
        call(node, **inputs(loaded, node, conditioning(width=768)))


def test_a_prompt_without_tokens_and_a_pooled_nan_are_refused():
    with pytest.raises(ShapeError, match=r"positive has a text embedding \[1, 0, 128\]"):
        context_of(conditioning(tokens=0), "positive")
    with pytest.raises(EditError, match="negative contains NaN or infinity in its pooled text"):
        context_of([[torch.zeros(1, 77, 8), {"pooled_output": torch.full((1, 4), float("nan"))}]], "negative")
    with pytest.raises(ShapeError, match="positive contains NaN"):
        context_of([*conditioning(), *conditioning(float("nan"))], "positive")


def test_latents_of_another_model_are_refused_by_name(loaded):
    other = {"samples": torch.zeros(1, 16, 12, 12)}
    with pytest.raises(ShapeError, match=r"latent .*16.* takes .*4"):
        call("InvertDDIM", model=loaded["model"], positive=conditioning(), latent=other, sigmas=loaded["sigmas"])
    with pytest.raises(ShapeError, match="latent has 16 channels but the model takes 4"):
        call("DecodeLatent", latent=other, vae=loaded["vae"])


@pytest.mark.parametrize("node", ["DecodeLatent", "TuneDecoder", "TuneLatent"])
def test_nan_in_a_latent_is_refused_by_socket(loaded, node):
    broken = {"samples": torch.full_like(loaded["latent"]["samples"], float("nan"))}
    image = {} if node == "DecodeLatent" else {"source": loaded["image"], "mask": loaded["image"][..., 0]}
    with pytest.raises(ShapeError, match="latent contains NaN"):
        call(node, vae=loaded["vae"], latent=broken, **image)


def test_nan_in_a_latent_of_candidates_is_refused_by_socket(loaded):
    ranker = call("LoadRanker", weights="bundled")[0]
    broken = {"samples": torch.full_like(loaded["latent"]["samples"], float("nan"))}
    with pytest.raises(ShapeError, match="latent contains NaN"):
        call("RankByText", images=loaded["image"], ranker=ranker, text="a red circle", latent=broken)


def test_nan_in_a_file_of_embeddings_is_refused(tmp_path):
    path = write_tensors(tmp_path / "broken.safetensors", FORMAT, {"tokens": torch.tensor([float("nan")])}, {})
    with pytest.raises(LoadError, match="contains NaN or infinity"):
        load_learned(path)
