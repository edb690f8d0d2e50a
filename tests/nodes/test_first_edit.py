"""The first edit: one node for the whole method, a ranker found by itself, and a prompt that need not be written twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from editkit.hosts.workflow_prompt import upstream_prompt
from editkit.pipelines.core.errors import EditError, LoadError
from editkit.tests.nodes.graph import call, classes

PROMPT = "a green square on a blue background"


@pytest.fixture(scope="module")
def loaded() -> dict:
    classes()
    from editkit.hosts.host import text_encoder_of
    from editkit.hosts.sockets import conditioning_of

    model, clip, vae = call("LoadModel", model="bundled")
    image, mask, _ = classes()["EditKit_LoadExample"].execute("empty_side").result
    encode = text_encoder_of(clip).encode
    texts = {"positive": conditioning_of(encode(PROMPT)), "negative": conditioning_of(encode(""))}
    return {"model": model, "vae": vae, "image": image, "mask": mask, **texts}


def test_the_single_node_is_the_chain_of_nodes_bit_for_bit(loaded):
    run = {"cfg": 4.0, "seed": 5}
    edited, latent = call("BlendedEdit", **loaded, **run, steps=3, candidates=2, kernels="3,1")
    source = call("EncodeImage", image=loaded["image"], vae=loaded["vae"])[0]
    schedule = call(
        "DilationSchedule", latent_mask=call("LatentMask", mask=loaded["mask"], latent=source)[0], kernels="3,1"
    )[0]
    sigmas = call("EditSigmas", model=loaded["model"], steps=3, strength=1.0)[0]
    noised = call("NoiseLatent", model=loaded["model"], latent=source, sigmas=sigmas, seed=5, copies=2)[0]
    prompts = {name: loaded[name] for name in ("model", "positive", "negative")}
    done = call(
        "BlendedDenoise", **prompts, sigmas=sigmas, latent=noised, source_latent=source, schedule=schedule, **run
    )[0]
    decoded = call("DecodeLatent", latent=done, vae=loaded["vae"])[0]
    whole = call("CompositeSource", edited=decoded, source=loaded["image"], mask=loaded["mask"], feather=4)[0]
    assert torch.equal(latent["samples"], done["samples"])
    assert torch.equal(edited, whole)
    outside = loaded["mask"][0] == 0
    assert torch.equal(edited[:, outside], loaded["image"][:, outside].expand(2, -1, -1))


def test_the_single_node_refuses_a_batch_and_an_empty_mask(loaded):
    twice = {**loaded, "image": loaded["image"].repeat(2, 1, 1, 1)}
    with pytest.raises(EditError, match="2 images but this node edits one"):
        call("BlendedEdit", **twice, steps=1)
    with pytest.raises(EditError, match="mask is empty"):
        call("BlendedEdit", **{**loaded, "mask": torch.zeros(1, 64, 64)}, steps=1)


GRAPH = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["9", 1]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["9", 1]}},
    "3": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["1", 0], "guidance": 3.5}},
    "4": {"class_type": "KSampler", "inputs": {"negative": ["2", 0], "positive": ["3", 0], "latent_image": ["9", 0]}},
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["9", 2]}},
    "6": {"class_type": "EditKit_RankByText", "inputs": {"images": ["5", 0], "ranker": ["9", 0], "text": ""}},
    "7": {"class_type": "EditKit_AlignPrompts", "inputs": {"source_text": "a cat", "target_text": "a dog"}},
    "8": {"class_type": "EditKit_P2PlusEdit", "inputs": {"edit": ["7", 0]}},
}  # fmt: skip


@pytest.mark.parametrize(("node", "text"), [("6", "a cat"), ("8", "a dog"), ("1", ""), ("none", "")])
def test_the_prompt_of_an_edit_is_found_upstream(node, text):
    assert upstream_prompt(GRAPH, node) == text
    assert upstream_prompt(None, node) == ""


def test_a_circle_of_links_has_no_prompt():
    assert upstream_prompt({"1": {"inputs": {"a": ["2", 0]}}, "2": {"inputs": {"a": ["1", 0]}}}, "1") == ""


def test_an_empty_rank_text_takes_the_prompt_without_comfyui(tmp_path: Path):
    from editkit.headless.run import Run
    from editkit.headless.runner import run_workflow

    image = {"class_type": "EditKit_LoadExample", "inputs": {"name": "one_object"}}
    ranker = {"class_type": "EditKit_LoadRanker", "inputs": {"weights": "automatic", "architecture": "automatic"}}
    rank = {"images": ["1", 0], "ranker": ["2", 0], "region": "keep", "keep": 0}
    graph = {"1": image, "2": ranker, "3": {"class_type": "EditKit_RankByText", "inputs": {**rank, "text": PROMPT}}}
    written = run_workflow(graph, Run(tmp_path, tmp_path)).results["3"][2]
    empty = {"1": image, "2": ranker, "3": {"class_type": "EditKit_RankByText", "inputs": {**rank, "text": " "}}}
    with pytest.raises(EditError, match="text is empty"):
        run_workflow(empty, Run(tmp_path, tmp_path))
    nodes = {**GRAPH, "7": {"inputs": {"target_text": PROMPT}}}
    cls = type("Hidden", (classes()["EditKit_RankByText"],), {"hidden": SimpleNamespace(prompt=nodes, unique_id="8")})
    found = run_workflow(graph, Run(tmp_path, tmp_path)).results
    assert cls.execute(found["1"][0], found["2"][0], "", "keep", 0).result[2] == written


def test_a_ranker_file_tells_its_architecture(tmp_path: Path):
    from safetensors.torch import save_file

    from editkit.hosts.diffusers.open_clip_ranker import architecture_of

    tower = {"visual.conv1.weight": torch.zeros(768, 3, 32, 32), "visual.proj": torch.zeros(768, 512)}
    save_file(tower, tmp_path / "some.safetensors")
    assert architecture_of(tmp_path / "some.safetensors") == "ViT-B-32"
    save_file({"vision_model.weight": torch.zeros(1)}, tmp_path / "vision.safetensors")
    with pytest.raises(LoadError, match="is not one of ViT-B-16"):
        architecture_of(tmp_path / "vision.safetensors")
