"""Every argument of the command line is checked before anything is computed; a finished edit is never lost."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from editkit.headless import cli, edit_folder
from editkit.headless.arguments import check_output
from editkit.headless.cli import main
from editkit.headless.edit_folder import write_result
from editkit.hosts.bundled.example_images import FOLDER
from editkit.pipelines.core.errors import EditError, ParameterError
from editkit.tests.toys import random_latent

IMAGE, MASK = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)), torch.ones(1, 8, 8)


def result(candidates: int = 2, **changes) -> SimpleNamespace:
    images = random_latent(candidates, 8, 8, 3).sigmoid()
    fields = {"candidates": images, "scores": None, "tuned": images[:1], "image": images[:1], "losses": [],
              "psnr_plain": math.nan, "psnr_tuned": math.inf, "change_outside": 0.0}  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--candidates", "0"], "--candidates"),
        (["--candidates", "-1"], "--candidates"),
        (["--device", "bogus"], "--device"),
        (["--device", "meta"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--prompt", "a \udcff"], "--prompt"),
        (["--prompt", " "], "--prompt"),
        (["--negative", "\ud800"], "--negative"),
        (["--cfg", "nan"], "--cfg"),
        (["--cfg", "0.5"], "--cfg"),
        (["--cfg", "inf"], "--cfg"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--steps", "0"], "steps"),
        (["--strength", "nan"], "strength"),
        (["--tune-lr", "nan"], "--tune-lr"),
        (["--tune-lr", "0"], "--tune-lr"),
        (["--feather", "-1"], "--feather"),
        (["--kernels", "2"], "kernel"),
        (["--mask-mode", "sharp"], "mode"),
        (["--stages", "halves"], "halves"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--output", "/dev/null/x"], "--output"),
        (["--output", "a\0b"], "--output"),
    ],
)
def test_a_wrong_argument_of_edit_is_one_line_before_anything_runs(tmp_path, capsys, monkeypatch, more, word):
    def never(*arguments, **named):
        raise AssertionError("a model was loaded")

    if "--model" not in more:
        monkeypatch.setattr("editkit.hosts.diffusers.loading.load_bundled", never)
    arguments = ["edit", "--image", str(FOLDER / "empty_side.png"), "--mask", str(FOLDER / "empty_side.mask.png")]
    places = [] if "--output" in more else ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--prompt", "a red ring", *places, *more]) == 1
    message = capsys.readouterr().err
    assert word in message and len(message.splitlines()) == 1 and message.startswith("editkit: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["demo", "--output", "FILE"], "--output"),
        (["demo", "--seed", "-1"], "--seed"),
        (["run", "FILE"], "workflow"),
        (["run", "WORKFLOW", "--output", "FILE"], "--output"),
        (["run", "WORKFLOW", "--input", "FILE"], "--input"),
        (["run", "WORKFLOW", "--server", "ftp://x"], "--server"),
        (["claims", "blended", "--trials", "0"], "--trials"),
    ],
)
def test_a_wrong_argument_of_another_command_is_one_line(tmp_path, capsys, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("text")
    (tmp_path / "WORKFLOW").write_text('{"1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}}}')
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert word in message and len(message.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_output_is_noticed_first(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ParameterError, match="--output"):
        check_output(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- the folder
def test_a_report_is_json_and_repeats_the_edit(tmp_path):
    write_result(result(), IMAGE, MASK, tmp_path, {"prompt": "a \U0001f408", "settings": {"seed": 3}})

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["psnr_outside_plain_decode_db"] is None and report["settings"] == {"seed": 3}
    assert {"editkit", "torch", "diffusers", "python"} <= set(report["versions"])
    assert set(report["files"]) == {path.name for path in tmp_path.iterdir()}


def test_an_edit_says_model_settings_and_prompts():
    denoiser = SimpleNamespace(fingerprint="f", device="cpu", dtype=torch.float32)
    from editkit.pipelines.blended.pipeline import EditSettings

    about = cli._about(SimpleNamespace(denoiser=denoiser), "bundled", EditSettings())
    names = {"seed", "steps", "guidance_scale", "strength", "mask_mode", "candidates", "kernels", "stage_spacing"}
    assert names <= set(about["settings"]) and about["model"] == "bundled" and about["model_fingerprint"] == "f"


def test_candidates_of_an_earlier_edit_do_not_stay_and_other_files_do(tmp_path):
    write_result(result(4, losses=[1.0, 0.5]), IMAGE, MASK, tmp_path, {})
    (tmp_path / "candidate_notes.png").write_text("mine")
    report = json.loads((tmp_path / "report.json").read_text())
    report["files"] += ["../outside.png", "candidate_notes.png"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path.parent / "outside.png").write_text("mine")
    write_result(result(2), IMAGE, MASK, tmp_path, {})
    left = {path.name for path in tmp_path.iterdir()}
    assert "candidate_02.png" in left and not left & {"candidate_03.png", "candidate_04.png", "loss.png"}
    assert "candidate_notes.png" in left and (tmp_path.parent / "outside.png").exists()


def test_an_edit_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    rescue = tmp_path / "rescue"
    rescue.mkdir()
    monkeypatch.setattr(edit_folder.tempfile, "tempdir", str(rescue))
    (tmp_path / "out").write_text("a file came in between")
    with pytest.raises(EditError, match="rescue"):
        write_result(result(), IMAGE, MASK, tmp_path / "out", {})
    assert {"result.png", "report.json"} <= {path.name for path in rescue.glob("editkit-*/*")}


def test_an_interrupted_write_leaves_the_earlier_edit_whole(tmp_path, monkeypatch):
    write_result(result(), IMAGE, MASK, tmp_path, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(tiles):
        raise KeyboardInterrupt

    images = edit_folder._images(result(), 1 - IMAGE, MASK)
    images["result.png"] = stop
    with pytest.raises(KeyboardInterrupt):
        edit_folder._write(tmp_path, images)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
