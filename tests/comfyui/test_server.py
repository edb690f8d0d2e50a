"""The pack in a real server: it loads without a word, and every node is described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editkit.tests.comfyui.server import ComfyServer, WorkflowError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), ROOT) as server:
        yield server


def test_pack_loads_without_a_warning(server: ComfyServer) -> None:
    """ComfyUI's own nodes may lack a package of theirs, so only the lines about EditKit count; each names its folder."""
    lines = [line for line in server.log.splitlines() if "editkit" in line.lower()]
    assert lines
    wrong = [line for line in lines if any(word in line.upper() for word in ("IMPORT FAILED", "WARN", "ERROR"))]
    assert not wrong, "\n".join(wrong)


def test_every_node_is_listed_with_tooltips(server: ComfyServer) -> None:
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("EditKit_")}
    assert "EditKit_BlendedDenoise" in nodes
    for name, info in nodes.items():
        assert info["display_name"], name
        assert info["description"], name
        assert all(info["output_tooltips"]), name
        for group in ("required", "optional"):  # what the page shows; the host fills in the hidden ones
            for socket, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{socket}"


def chain() -> dict:
    """Our steps and the host's in one graph: a blended loop in two ranges, a tuned VAE, and KSampler on a blended MODEL."""
    positive, negative, ours = ["text", 0], ["empty", 0], ["load", 0]
    grid = {"model": ours, "positive": positive, "negative": negative, "cfg": 3.0, "sigmas": ["sigmas", 0], "seed": 7}
    loop = {**grid, "source_latent": ["encode", 0], "schedule": ["schedule", 0]}
    noised = {"model": ours, "latent": ["encode", 0], "sigmas": ["sigmas", 0], "step": 0, "seed": 7, "copies": 2}
    ksampler = {"sampler_name": "dpmpp_2m", "scheduler": "karras", "steps": 4, "denoise": 0.8, "cfg": 3.0, "seed": 7}
    shrink = {"latent_mask": ["latent_mask", 0], "kernels": "5,3,1", "scale_with_size": False, "invert": False}
    node = {
        "load": ("EditKit_LoadModel", {"model": "bundled"}),
        "example": ("EditKit_LoadExample", {"name": "empty_side"}),
        "encode": ("EditKit_EncodeImage", {"image": ["example", 0], "vae": ["load", 2]}),
        "text": ("CLIPTextEncode", {"clip": ["load", 1], "text": "a red circle on a gray background"}),
        "empty": ("CLIPTextEncode", {"clip": ["load", 1], "text": ""}),
        "latent_mask": (
            "EditKit_LatentMask",
            {"mask": ["example", 1], "latent": ["encode", 0], "mode": "max", "threshold": 0.5},
        ),
        "schedule": ("EditKit_DilationSchedule", {**shrink, "published_rule": False, "parts": "equal log-sigma"}),
        "sigmas": ("EditKit_EditSigmas", {"model": ours, "steps": 6, "strength": 0.8}),
        "noise": ("EditKit_NoiseLatent", {**noised, "start": "noised source"}),
        "first": ("EditKit_BlendedDenoise", {**loop, "latent": ["noise", 0], "start_step": 0, "end_step": 2}),
        "second": ("EditKit_BlendedDenoise", {**loop, "latent": ["first", 0], "start_step": 2, "end_step": 10000}),
        "decoded": ("VAEDecode", {"samples": ["second", 0], "vae": ["load", 2]}),
        "blended": ("EditKit_BlendedModel", {"model": ours, "schedule": ["schedule", 0]}),
        "ksampler": (
            "KSampler",
            {
                **ksampler,
                "model": ["blended", 0],
                "positive": positive,
                "negative": negative,
                "latent_image": ["encode", 0],
            },
        ),
        "composite": ("LatentBatch", {"samples1": ["second", 0], "samples2": ["ksampler", 0]}),
        "all": ("VAEDecode", {"samples": ["composite", 0], "vae": ["load", 2]}),
        "preview": ("PreviewImage", {"images": ["all", 0]}),
        "loop": ("PreviewImage", {"images": ["decoded", 0]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in node.items()}


def test_our_nodes_and_the_hosts_in_one_graph(server: ComfyServer) -> None:
    before = len(server.log)
    outputs = server.run(chain())
    assert len(outputs["loop"]["images"]) == 2
    assert len(outputs["preview"]["images"]) == 3
    assert server.image(outputs["preview"]["images"][0]).startswith(b"\x89PNG")
    assert "Traceback" not in server.log[before:]


def test_a_wrong_input_is_one_clear_error(server: ComfyServer) -> None:
    workflow = chain()
    workflow["second"]["inputs"]["start_step"] = 3
    with pytest.raises(WorkflowError, match="latent has sigma"):
        server.run(workflow)
