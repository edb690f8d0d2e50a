"""The command line: exit codes, messages, files; and the headless workflow runner."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from editkit.headless.arguments import warn_of_photograph
from editkit.headless.cli import main
from editkit.headless.run import Run
from editkit.headless.runner import check_workflow, execution_order, run_workflow
from editkit.hosts.bundled.example_images import FOLDER, load_example, load_image, load_mask
from editkit.pipelines.core.errors import EditError, LoadError
from editkit.pipelines.evaluation.drawing import save_image


def edit(tmp_path, *more):
    return main(
        ["edit", "--image", str(FOLDER / "empty_side.png"), "--mask", str(FOLDER / "empty_side.mask.png"),
         "--prompt", "a red ring left of a yellow star on a sky background", "--steps", "2", "--tune-steps", "2",
         "--candidates", "2", "--device", "cpu", "--output", str(tmp_path / "out"), *more]
    )  # fmt: skip


def test_edit_writes_everything_and_changes_nothing_outside(tmp_path, capsys):
    assert edit(tmp_path) == 0
    out = tmp_path / "out"
    names = {"source", "mask", "candidate_01", "candidate_02", "tuned", "result", "sheet", "loss"}
    assert {path.stem for path in out.glob("*.png")} == names
    report = json.loads((out / "report.json").read_text())
    assert report["largest_change_outside"] == 0 and len(report["scores"]) == 2
    source, result, mask = (
        load_image(out / "source.png"),
        load_image(out / "result.png"),
        load_mask(out / "mask.png"),
    )
    assert torch.equal(source[mask == 0], result[mask == 0]) and not torch.equal(source, result)
    assert "outside the mask: changed by 0" in capsys.readouterr().out
    for name in names:  # every PNG says how it was made
        assert json.loads(Image.open(out / f"{name}.png").text["editkit"]) == report
    assert {
        "prompt",
        "negative",
        "image",
        "mask",
        "model",
        "model_fingerprint",
        "settings",
        "rank_text",
        "ranker",
    } <= set(report)
    assert {"seed", "steps", "strength", "guidance_scale", "candidates", "kernels"} <= set(report["settings"])


def test_one_candidate_needs_no_ranker(tmp_path):
    assert edit(tmp_path, "--candidates", "1", "--tune-steps", "0") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scores"] is None


@pytest.mark.parametrize(
    "more, word",
    [
        (["--kernels", "4,2"], "kernels"),
        (["--kernels", "3,1", "--stages", "halves"], "halves"),
        (["--strength", "0"], "strength"),
        (["--mask-mode", "sharp"], "mode"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--model", "/nowhere"], "folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_1(tmp_path, capsys, more, word):
    assert edit(tmp_path, *more) == 1
    message = capsys.readouterr().err
    assert word in message and "Traceback" not in message


def test_wrong_arguments_are_exit_code_2():
    with pytest.raises(SystemExit) as stop:
        main(["edit", "--steps", "many"])
    assert stop.value.code == 2


def test_another_size_of_mask_is_refused(tmp_path, capsys):
    save_image(torch.ones(10, 12), tmp_path / "mask.png")
    assert edit(tmp_path, "--mask", str(tmp_path / "mask.png")) == 1
    assert "12 x 10" in capsys.readouterr().err


def test_an_empty_mask_is_refused_before_the_model_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("editkit.headless.cli._load", lambda options: pytest.fail("the model was loaded"))
    save_image(torch.zeros(96, 96), tmp_path / "mask.png")
    assert edit(tmp_path, "--mask", str(tmp_path / "mask.png")) == 1
    assert "--mask is empty, so nothing would be edited" in capsys.readouterr().err


@pytest.mark.parametrize("scene", ["empty_side", "scribble", None])
def test_the_bundled_model_warns_of_a_photograph_and_of_no_scene(caplog, scene):
    from skimage import data

    photograph = torch.from_numpy(data.astronaut()[None, :200, :310]).float() / 255
    warn_of_photograph(photograph if scene is None else load_example(scene).image)
    assert ("perhaps a photograph" in caplog.text) == (scene is None)


def test_transparent_pixels_are_the_mask(tmp_path):
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.save(tmp_path / "a.png")
    mask = load_mask(tmp_path / "a.png")
    assert mask.tolist() == [[[0, 1, 0], [0, 0, 0]]]


# -------------------------------------------------------------------------------------------------------- workflows
def workflow() -> dict:
    return {
        "1": {"class_type": "EditKit_LoadExample", "inputs": {"name": "empty_side"}},
        "2": {"class_type": "EditKit_BlendPixels", "inputs": {
            "edited": ["3", 0], "source": ["1", 0], "mask": ["1", 1], "feather": 0, "linear_light": False}},
        "3": {"class_type": "LoadImage", "inputs": {"image": "other.png"}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "mixed"}},
    }  # fmt: skip


def test_a_workflow_runs_in_order_of_its_links(tmp_path):
    example = load_example("empty_side")
    save_image(1 - example.image[0], tmp_path / "other.png")
    run = run_workflow(workflow(), Run(tmp_path, tmp_path / "out"))
    made = load_image(run.saved[0])
    assert torch.allclose(made[example.mask == 0], example.image[example.mask == 0], atol=3e-3)
    assert torch.allclose(made[example.mask == 1], 1 - example.image[example.mask == 1], atol=5e-3)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"3": {"class_type": "NoSuchNode", "inputs": {}}}, "NoSuchNode"),
        ({"3": {"class_type": "LoadImage", "inputs": {"image": "../../etc/passwd"}}}, "--input"),
        ({"1": {"class_type": "EditKit_LoadExample", "inputs": {"name": "x"}}}, "node 1"),
        ({"3": {"class_type": "LoadImage", "inputs": {}}}, "image"),
        ({"1": {"class_type": "EditKit_LoadExample", "inputs": {"name": ["4", 0]}}}, "cycle"),
        ({"3": {"class_type": "LoadImage", "inputs": {"image": ["9", 0]}}}, "missing node 9"),
    ],
)
def test_broken_workflows_name_the_node(tmp_path, change, word):
    save_image(load_example("empty_side").image[0], tmp_path / "other.png")
    with pytest.raises(EditError, match=word):
        run_workflow({**workflow(), **change}, Run(tmp_path, tmp_path / "out"))


def test_ui_format_is_refused_by_name():
    with pytest.raises(LoadError, match="UI-format"):
        check_workflow({"nodes": [], "links": []})
    with pytest.raises(LoadError, match="class_type"):
        check_workflow({"1": {"inputs": {}}})


def test_order_is_topological():
    assert execution_order(workflow()) == ["1", "3", "2", "4"]


def test_pictures_may_not_be_saved_outside(tmp_path):
    save_image(load_example("empty_side").image[0], tmp_path / "other.png")
    bad = workflow()
    bad["4"]["inputs"]["filename_prefix"] = "../../elsewhere"
    with pytest.raises(EditError, match="filename_prefix"):
        run_workflow(bad, Run(tmp_path, tmp_path / "out"))


# -------------------------------------------------------------------------------------------------------------- claims
def test_claims_prints_every_table_also_after_a_miss(monkeypatch, capsys):
    from editkit.headless.claims import blended, registry, style

    asked = []
    monkeypatch.setattr(style, "main", lambda count=16: asked.append(f"style {count}") or False)
    monkeypatch.setattr(blended, "main", lambda count=64: asked.append(f"blended {count}") or True)
    assert main(["claims", "style", "blended", "--trials", "8"]) == 1 and asked == ["style 8", "blended 8"]
    assert main(["claims", "blended"]) == 0 and asked[-1] == "blended 64"
    assert main(["claims", "magic"]) == 1
    assert "magic" in (message := capsys.readouterr().err) and all(name in message for name in registry.TABLES)


def test_every_table_has_its_module():
    from importlib import import_module
    from inspect import signature

    from editkit.benchmarks.registry import TABLES

    for table in TABLES.values():
        first = next(iter(signature(import_module(f"{table.package}.{table.module}").main).parameters), "")
        assert (first == "count") == table.trials, table.module
