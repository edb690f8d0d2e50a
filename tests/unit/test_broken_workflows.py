"""A workflow that is broken in any way is one clear error, and Load Image reads nothing outside its folder."""

from __future__ import annotations

import json

import pytest
import torch

from editkit.headless.cli import main
from editkit.headless.run import Run
from editkit.headless.runner import check_workflow, execution_order, run_workflow
from editkit.pipelines.core.errors import EditError, LoadError
from editkit.pipelines.evaluation.drawing import save_image

LOADED = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}


@pytest.mark.parametrize(
    "content",
    [
        '{"1": {}}'.encode("utf-16"),
        b"\xff\xfe",
        b'{"1": ' * 100_000,
        b'{"1": ' + b"9" * 5000 + b"}",
        b'{"1": {"class_type": "LoadImage", "inputs": {"image": NaN}}}',
        b"null",
        b"[]",
        b'{"1": {"class_type": "LoadImage", "inputs": null}}',
        b'{"1": {"class_type": ["LoadImage"], "inputs": {}}}',
        b'{"1": {"class_type": null}}',
        b'{"1": null}',
    ],
)
def test_broken_files_are_one_line(tmp_path, capsys, content):
    (tmp_path / "w.json").write_bytes(content)
    assert main(["run", str(tmp_path / "w.json"), "--output", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_chain_may_be_longer_than_the_stack():
    links = {str(n): {"class_type": "InvertMask", "inputs": {"mask": [str(n + 1), 0]}} for n in range(5000)}
    nodes = {**links, "5000": LOADED}
    assert execution_order(check_workflow(nodes)) == [str(n) for n in range(5000, -1, -1)]
    nodes["5000"] = {"class_type": "InvertMask", "inputs": {"mask": ["0", 0]}}
    with pytest.raises(LoadError, match="cycle"):
        execution_order(check_workflow(nodes))


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ({"1": LOADED, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", -1]}}}, "output -1"),
        ({"1": LOADED, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 2]}}}, "output 2"),
        ({"1": {"class_type": "LoadImage", "inputs": {"image": 3}}}, "image"),
        ({"1": {"class_type": "LoadImage", "inputs": {"image": "a\0.png"}}}, "--input"),
        ({"1": {"class_type": "LoadImage", "inputs": {"image": "\ud800"}}}, "image"),
        ({"1": {"class_type": "EmptyLatentImage", "inputs": {"width": "wide", "height": 64}}}, "whole number"),
        ({"1": {"class_type": "EditKit_LoadExample", "inputs": {"name": {"a": 1}}}}, "name"),
        ({"1": {"class_type": "EditKit_EditSigmas", "inputs": {"model": "x", "steps": 3, "strength": 1}}}, "connect"),
        ({"1": {"class_type": "EditKit_LoadModel", "inputs": {"model": ["2"]}}}, "model"),
    ],
)
def test_broken_values_name_the_node(tmp_path, nodes, word):
    save_image(torch.zeros(2, 2, 3), tmp_path / "a.png")
    with pytest.raises(EditError, match=word):
        run_workflow(nodes, Run(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["LoadImage", "LoadImageMask"])
@pytest.mark.parametrize(
    "name", ["../private.png", "ABSOLUTE", "link.png", "folder/private.png", "../private.png [input]"]
)
def test_load_image_reads_nothing_outside_its_folder(tmp_path, kind, name):
    """The file exists, so only the check of its place can refuse it."""
    private, folder = tmp_path / "private.png", tmp_path / "input"
    save_image(torch.zeros(2, 2, 3), private)
    folder.mkdir()
    (folder / "link.png").symlink_to(private)
    (folder / "folder").symlink_to(tmp_path)
    inputs = {"image": str(private) if name == "ABSOLUTE" else name}
    inputs |= {"channel": "red"} if kind == "LoadImageMask" else {}
    with pytest.raises(LoadError, match="--input"):
        run_workflow({"1": {"class_type": kind, "inputs": inputs}}, Run(folder, tmp_path / "out"))


def test_files_below_the_folder_are_read(tmp_path):
    save_image(torch.zeros(2, 2, 3), tmp_path / "sub" / "a.png")
    nodes = json.loads(json.dumps({"1": {"class_type": "LoadImage", "inputs": {"image": "sub/a.png"}}}))
    assert run_workflow(nodes, Run(tmp_path, tmp_path / "out")).results["1"][0].shape == (1, 2, 2, 3)
