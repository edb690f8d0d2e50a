"""What was saved is never lost: names are names and not patterns, numbers are taken once, files are whole or absent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from editkit.headless.run import Run
from editkit.headless.stock_nodes import STOCK_NODES
from editkit.hosts.diffusers.host import headless_run
from editkit.hosts.files import save_embedding_file, save_lora_file, save_whole
from editkit.pipelines.core.errors import EditError, ParameterError

IMAGE = torch.rand(1, 4, 4, 3, generator=torch.Generator().manual_seed(0))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("save", [save_embedding_file, save_lora_file])
@pytest.mark.parametrize("prefix", ["portrait [v2]", "a*", "**", "what?", "[!a]", "u", "sub/[x]/y"])
def test_no_prefix_is_a_pattern_and_nothing_is_overwritten(tmp_path, save, prefix):
    with headless_run(output_folder=tmp_path):
        first = save(prefix, lambda path: path.write_bytes(b"0"))
        first.with_name(first.name.replace("_00001", "_²")).write_bytes(b"other")  # a digit that int() does not know
        files = [first, *(save(prefix, lambda path, n=n: path.write_bytes(str(n).encode())) for n in (1, 2))]
    assert [file.read_bytes() for file in files] == [b"0", b"1", b"2"]
    assert [file.stem[-6:] for file in files] == ["_00001", "_00002", "_00003"]


@pytest.mark.parametrize("prefix", ["a\0b", "x" * 300, "y/" + "ä" * 150, "\ud800", "../out", "/etc/x", "", " ", "."])
def test_names_that_no_file_may_have_are_refused(tmp_path, prefix):
    with headless_run(output_folder=tmp_path / "output"), pytest.raises(ParameterError, match="filename_prefix"):
        save_embedding_file(prefix, lambda path: path.write_bytes(b""))
    assert not names(tmp_path)


def test_threads_never_take_the_same_number(tmp_path):
    def save(number: int) -> Path:
        with headless_run(output_folder=tmp_path):
            return save_lora_file("race", lambda path: path.write_text(str(number)))

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(save, range(64)))
    assert sorted(int(file.read_text()) for file in files) == list(range(64)) and len(set(files)) == 64


def test_each_thread_writes_to_the_output_folder_of_its_run(tmp_path):
    def save(number: int) -> Path:
        with headless_run(output_folder=tmp_path / str(number)):
            return save_lora_file("mine", lambda path: path.write_text(str(number)))

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(save, range(16)))
    assert [file.relative_to(tmp_path).parts[0] for file in files] == [str(number) for number in range(16)]


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        save_whole(tmp_path / "a.txt", fail)
    with headless_run(output_folder=tmp_path), pytest.raises(EditError, match="disk full"):
        save_lora_file("b", fail)
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


# ---------------------------------------------------------------------------------------------------------- Save Image
@pytest.mark.parametrize("prefix", ["", ".", "sub/", "sub/.", "../out", "a/../../out", "a [1]", "*"])
def test_headless_images_stay_in_the_output_folder_and_count_up(tmp_path, prefix):
    run = Run(tmp_path, tmp_path / "out")
    for _ in range(2):
        STOCK_NODES["SaveImage"](run, IMAGE.repeat(2, 1, 1, 1), prefix)
    assert len(set(run.saved)) == 4 == len(names(tmp_path))
    assert all(path.is_relative_to(tmp_path / "out") for path in run.saved)
    assert [path.stem[-6:] for path in run.saved] == ["_00001", "_00002", "_00003", "_00004"]


@pytest.mark.parametrize("prefix", ["..", "../x", "/x", "a/../../x", "a\0", "x" * 300, "\ud800"])
def test_headless_images_never_leave_the_output_folder(tmp_path, prefix):
    with pytest.raises(ParameterError, match="filename_prefix"):
        STOCK_NODES["SaveImage"](Run(tmp_path, tmp_path / "out"), IMAGE, prefix)
    assert not names(tmp_path)


def test_images_are_not_written_through_a_link(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "private.png").write_text("private")
    (out / "a_00001.png").symlink_to(tmp_path / "private.png")
    (out / "away").symlink_to(tmp_path)
    run = Run(tmp_path, out)
    STOCK_NODES["SaveImage"](run, IMAGE, "a")
    assert [path.name for path in run.saved] == ["a_00002.png"] and (tmp_path / "private.png").read_text() == "private"
    with pytest.raises(ParameterError, match="filename_prefix"):
        STOCK_NODES["SaveImage"](run, IMAGE, "away/b")
