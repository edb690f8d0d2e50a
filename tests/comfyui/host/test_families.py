"""Every node on every published family, built in full layout with few channels: a finite result, or a refusal by name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import editkit
from editkit.hosts.comfyui import denoiser as host_denoiser
from editkit.hosts.comfyui.gradients import OVERWRITE, rotates, rotation_has_gradients
from editkit.hosts.comfyui.host import ComfyUIHost
from editkit.hosts.host import open_denoiser
from editkit.hosts.sockets import context_of
from editkit.pipelines.core.errors import EditError
from editkit.pipelines.learning.optimise import learning_mode
from editkit.tests.comfyui.host.families import FAMILIES
from editkit.tests.comfyui.host.recipes import RECIPES
from editkit.tests.comfyui.host.scene import Scene
from editkit.tests.nodes.graph import classes

CONVOLUTIONS = {"FeatureInjection", "StyleInvert", "StyleEdit", "StyleTransfer"}  # needs a U-Net
ATTENTION = {  # needs separate self- and cross-attention, or joint attention in blocks that can be replaced
    "P2Plus", "P2PlusEdit", "KVEdit", "MasaCtrl", "FeatureInjection", "AttentionMaps", "StyleInvert", "StyleEdit", "StyleTransfer",
}  # fmt: skip
LEARNING = {
    "NullText",
    "LayeredEmbeddings",
    "LayeredTune",
    "SaveLora",
    "Imagic",
}  # cannot learn through in-place blocks
FLOW = {"FlowInversion", "FlowInversionEdit"}  # needs a flow model
REFUSED = {
    "SD 1.5": FLOW,
    "SD 2.1-v": FLOW,
    "SDXL": FLOW,
    "SD3": CONVOLUTIONS,
    "Flux": CONVOLUTIONS | LEARNING,
    "HunyuanImage 2.1": ATTENTION | LEARNING,
    "Lumina 2": ATTENTION | {"AlignPrompts"},
}
NO_GRADIENTS = "modified by an inplace operation|no autograd formula was registered"
FOREIGN = ("width 40 but", "is not the prompt that the trajectory was made with")
UNPADDED = "clip gives 77 tokens but an embedding of"  # how Lumina 2's prompts are refused where words are aligned


def registered() -> list[Any]:
    """The nodes that ComfyUI gets from the extension."""

    async def nodes() -> list[Any]:
        return await (await editkit.comfy_entrypoint()).get_node_list()

    return asyncio.run(nodes())


NODES = [node.define_schema().node_id for node in registered()]


def inputs(node: str) -> set[str]:
    return {item.io_type for item in classes()[node].define_schema().inputs}


NEEDS_A_MODEL = ("EditKit_SaveLora", "EditKit_LoadEmbeddings")  # to make what they save or load


def refused(family: str, node: str) -> bool:
    if family == "Qwen-Image":  # its latents have a frame axis
        return ("MODEL" in inputs(node) or "EDITKIT_EMBEDDINGS" in inputs(node)) or node in NEEDS_A_MODEL
    name = node.removeprefix("EditKit_")
    if family == "Lumina 2" and not rotation_has_gradients():  # newer versions of ComfyUI
        return name in REFUSED[family] | LEARNING
    return name in REFUSED.get(family, ())


@pytest.fixture(scope="module", params=list(FAMILIES))
def scene(request: pytest.FixtureRequest) -> Scene:
    made = Scene(FAMILIES[request.param])
    made.title = request.param
    return made


@pytest.fixture(autouse=True)
def _output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComfyUIHost, "output_folder", lambda self: tmp_path)


def test_every_node_has_a_recipe() -> None:
    assert set(RECIPES) == set(NODES), "give a new node a recipe in recipes.py"


@pytest.mark.parametrize("node", NODES)
def test_node_runs_or_refuses_the_family_by_name(scene: Scene, node: str) -> None:
    if not refused(scene.title, node):
        RECIPES[node](scene)
        return
    with pytest.raises(EditError) as caught:
        RECIPES[node](scene)
    assert scene.family.name.lower() in str(caught.value).lower() or UNPADDED in str(caught.value)


@pytest.mark.parametrize("node", [node for node in NODES if {"MODEL", "CONDITIONING"} <= inputs(node)])
def test_text_of_another_encoder_is_refused_by_its_socket(scene: Scene, node: str) -> None:
    if scene.title == "Qwen-Image":
        pytest.skip("takes no still image at all")
    foreign = Scene.__new__(Scene)
    vars(foreign).update({key: value for key, value in vars(scene).items() if key != "inversion"})
    inverted = scene.inversion  # of the model's own text
    text = [[torch.zeros(1, 77, 40), {"pooled_output": torch.zeros(1, 40)}]]
    vars(foreign).update(inversion=inverted, positive=text, target=text, negative=text)
    for made in ("null_text", "style", "layered", "tuned", "learned", "flow_inversion"):
        vars(foreign).pop(made, None)
    if node in {"EditKit_EmbeddingsGuider", "EditKit_StyleTransfer"}:  # what was learned belongs to the model
        vars(foreign).update({made: getattr(scene, made) for made in ("learned", "style") if made in vars(scene)})
    if node == "EditKit_InvertDDIM":
        del vars(foreign)["inversion"]
    with pytest.raises(EditError) as caught:
        RECIPES[node](foreign)
    assert any(word in str(caught.value) for word in FOREIGN) or refused(scene.title, node)


def test_a_pooled_text_of_another_encoder_is_refused(scene: Scene) -> None:
    """SD3 and Flux take T5's text of one width, but pooled texts of others."""
    text, extras = scene.positive[0]
    needs = scene.title in {"SDXL", "SD3", "Flux"}
    others = {"numbers": {**extras, "pooled_output": torch.zeros(1, 40)}, "has no pooled text": {}}
    for words, given in others.items():
        if not needs:
            return
        broken = Scene.__new__(Scene)
        vars(broken).update({**vars(scene), "target": [[text, given]]})
        with pytest.raises(EditError, match=words):
            RECIPES["EditKit_SDEdit"](broken)


def test_gradients_are_true_where_learning_is_allowed_and_break_where_it_is_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who computes in place is a table (`OVERWRITE`), and ComfyUI may change: each family is really differentiated."""
    if scene.title == "Qwen-Image":
        pytest.skip("takes no still image at all")
    monkeypatch.setattr(host_denoiser, "refuse_learning", lambda model: None)
    context, z = context_of(scene.positive, "positive"), torch.randn(1, scene.family.channels, 8, 8)
    with open_denoiser(scene.model, z.shape, [context], learning=True) as denoiser, learning_mode():
        weight, along = torch.randn(z.shape), torch.randn(context.tokens.shape)
        tokens, z = context.tokens.clone(), z.clone()

        def loss(tokens: torch.Tensor) -> torch.Tensor:
            return (denoiser.denoise(z, 0.7, [context.with_tokens(tokens)])[0] * weight).sum()

        leaf = tokens.requires_grad_(True)
        network = scene.model.model.diffusion_model
        inplace = {kind.__name__ for kind in type(network).__mro__} & set(OVERWRITE)
        if inplace or (rotates(network) and not rotation_has_gradients()):
            with pytest.raises(RuntimeError, match=NO_GRADIENTS):
                loss(leaf).backward()
            return
        loss(leaf).backward()
        with torch.no_grad():
            change = (loss(tokens + 1e-2 * along) - loss(tokens - 1e-2 * along)) / 2e-2
        assert leaf.grad is not None
        torch.testing.assert_close((leaf.grad * along).sum(), change, rtol=2e-2, atol=2e-2)
