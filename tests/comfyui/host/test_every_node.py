"""Every node runs in real ComfyUI to a finite result: in a shipped workflow (`test_workflows.py`), or else here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.bundled.example_images import load_example
from editkit.hosts.comfyui.host import ComfyUIHost
from editkit.hosts.embeddings import learned_in
from editkit.hosts.host import text_encoder_of
from editkit.hosts.latent import samples_of
from editkit.hosts.sockets import conditioning_of
from editkit.tests.comfyui.host.families import FAMILIES
from editkit.tests.comfyui.host.scene import Scene
from editkit.tests.nodes.graph import call
from editkit.tests.nodes.schemas import saved
from editkit.tests.workflows import shipped


@pytest.fixture(scope="module")
def scene() -> SimpleNamespace:
    """An inverted example of the bundled model, and its prompts."""
    model, clip, vae = call("LoadModel", model="bundled")
    example = load_example("one_object")

    def encode(text: str) -> list:
        return conditioning_of(text_encoder_of(clip).encode(text))

    latent = call("EncodeImage", image=example.image, vae=vae)[0]
    sigmas = call("EditSigmas", model=model, steps=4, strength=1.0)[0]
    positive = encode(example.caption)
    trajectory = call("InvertDDIM", model=model, positive=positive, latent=latent, sigmas=sigmas)[0]
    return SimpleNamespace(
        model=model,
        vae=vae,
        image=example.image,
        mask=example.mask,
        latent=latent,
        positive=positive,
        negative=encode(""),
        target=encode("a green star on a white background"),
        trajectory=trajectory,
    )


def tuned_latent(scene: SimpleNamespace) -> list[Tensor]:
    """The latent learns: outside the mask its decode comes closer to the source, and the result is another latent."""
    flat = {"samples": samples_of(scene.latent) * 0.9}
    given = {"vae": scene.vae, "latent": flat, "source": scene.image, "mask": scene.mask, "steps": 5, "lr": 0.004}
    latent, image, curve, report = call("TuneLatent", **given)
    before, after = (float(text.split(" dB")[0].split()[-1]) for text in report.split(":")[1].split(","))
    assert after > before
    assert not torch.equal(samples_of(latent), samples_of(flat))
    return [samples_of(latent), image, curve]


def pixel_blend(scene: SimpleNamespace) -> list[Tensor]:
    edited = 1 - scene.image
    return list(call("BlendPixels", edited=edited, source=scene.image, mask=scene.mask, feather=3))


def poisson_blend(scene: SimpleNamespace) -> list[Tensor]:
    return list(call("BlendPoisson", edited=1 - scene.image, source=scene.image, mask=scene.mask))


def diffedit(scene: SimpleNamespace) -> list[Tensor]:
    found = call(
        "DiffEdit",
        model=scene.model,
        latent=scene.latent,
        source=scene.positive,
        target=scene.target,
        negative=scene.negative,
        steps=4,
        maps=2,
    )
    return [samples_of(found[0]), *(value for value in found[1:] if isinstance(value, Tensor))]


def negative_prompt(scene: SimpleNamespace) -> list[Tensor]:
    found = call("NegativePrompt", model=scene.model, trajectory=scene.trajectory, positive=scene.positive)
    return [samples_of(call("MaskedDecode", **decode_inputs(scene, found[0]))[0])]


def kv_edit(scene: SimpleNamespace) -> list[Tensor]:
    """KSampler on a pair: outside the mask the target is the source, inside it is not."""
    (latent_mask,) = call("LatentMask", mask=scene.mask, latent=scene.latent)[:1]
    model, pair = call("KVEdit", model=scene.model, source=scene.positive, target=scene.target, latent_mask=latent_mask)
    start = {"samples": torch.zeros_like(samples_of(scene.latent)).repeat(2, 1, 1, 1)}
    (out,) = stock_nodes.common_ksampler(model, 1, 4, 4.0, "euler", "normal", pair, scene.negative, start)
    source, target = out["samples"]
    outside = (latent_mask[0] < 0.5).expand_as(source)
    assert torch.allclose(target[outside], source[outside], atol=1e-5)
    assert (target - source)[~outside].abs().max() > 0.1
    return [target]


def window(scene: SimpleNamespace) -> list[Tensor]:
    """What is cropped and pasted back without an edit is the image."""
    small = torch.zeros_like(scene.mask)
    small[:, 40:56, 30:50] = 1
    image, mask, place = call("CropWindow", image=scene.image, mask=small, size=48, context=8)
    (whole,) = call("PasteWindow", edited=image, source=scene.image, window=place)
    assert torch.equal(whole, scene.image) and image.shape[1] < whole.shape[1]
    return [image, mask, whole]


def decode_inputs(scene: SimpleNamespace, negative: Any) -> dict[str, Any]:
    """The inversion is decoded with these negatives, all over the image."""
    everywhere = torch.ones(1, *samples_of(scene.latent).shape[-2:])
    given = {"model": scene.model, "positive": scene.target, "trajectory": scene.trajectory}
    return {**given, "negative": negative, "latent_mask": everywhere}


def loaded_embeddings(scene: SimpleNamespace) -> list[Tensor]:
    learned = call(
        "NullText",
        model=scene.model,
        trajectory=scene.trajectory,
        positive=scene.positive,
        negative=scene.negative,
        inner_steps=1,
    )[0]
    (file,) = call("SaveEmbeddings", embeddings=learned, filename_prefix="every_node")
    loaded = learned_in(call("LoadEmbeddings", file=file)[0]).tokens
    assert torch.equal(loaded, learned_in(learned).tokens)
    return [loaded]


def measures(scene: SimpleNamespace) -> list[Tensor]:
    edited = 1 - scene.image
    table, page = call("MeasureEdit", source=scene.image, edited=edited, mask=scene.mask)
    assert "PSNR" in table
    return [page]


def flow_inversion(_: SimpleNamespace) -> list[Tensor]:
    """On a random SD3, as the bundled model is no flow model: full guidance to the source gives the source back."""
    scene = Scene(FAMILIES["SD3"])
    trajectory, noised = scene.flow_inversion
    prompts = {"positive": scene.target, "negative": scene.negative, "cfg": 2.0}
    held = {"solver": "Euler", "eta": 1.0, "start": 0.0, "stop": 1.0}
    (edited,) = call("FlowInversionEdit", model=scene.model, trajectory=trajectory, **prompts, **held)
    source = trajectory.get().source_latent
    assert torch.allclose(samples_of(edited).to(source), source, atol=1e-4)
    return [samples_of(noised), samples_of(edited)]


EXECUTED: dict[str, Callable[[SimpleNamespace], list[Tensor]]] = {
    "EditKit_TuneLatent": tuned_latent,
    "EditKit_BlendPixels": pixel_blend,
    "EditKit_BlendPoisson": poisson_blend,
    "EditKit_DiffEdit": diffedit,
    "EditKit_NegativePrompt": negative_prompt,
    "EditKit_KVEdit": kv_edit,
    "EditKit_CropWindow": window,
    "EditKit_PasteWindow": window,
    "EditKit_LoadEmbeddings": loaded_embeddings,
    "EditKit_MeasureEdit": measures,
    "EditKit_FlowInversion": flow_inversion,
    "EditKit_FlowInversionEdit": flow_inversion,
}


@pytest.mark.parametrize("node", EXECUTED)
def test_node_gives_a_finite_result(
    scene: SimpleNamespace, node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ComfyUIHost, "output_folder", lambda self: tmp_path)
    results: list[Any] = EXECUTED[node](scene)
    assert results and all(value.numel() > 0 and value.isfinite().all() for value in results)


def test_every_node_is_executed_in_comfyui() -> None:
    in_workflows = {node["class_type"] for name in shipped.NAMES for node in shipped.api(name).values()}
    assert set(saved()) - in_workflows == set(EXECUTED), "give a new node a workflow, or a function of this module"
