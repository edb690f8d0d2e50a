"""Memory that runs out while a file is read is no damaged file: the error passes as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from editkit.hosts.bundled.example_images import load_image
from editkit.hosts.diffusers.loading.files import from_pretrained
from editkit.hosts.diffusers.open_clip_ranker import _read_weights
from editkit.pipelines.core.errors import LoadError

OUT = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
]  # fmt: skip


def readers(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    """Each reader of a file, in which `error` is raised."""

    def fails(*_args, **_options):
        raise error

    class Network:
        from_pretrained = fails

    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(Image, "open", fails)
    monkeypatch.setattr(torch, "load", fails)
    return {
        "network": lambda: from_pretrained(Network, folder, "unet", torch.float32),
        "weights": lambda: _read_weights(folder / "a.pt"),
        "image": lambda: load_image(folder / "a.png"),
    }


@pytest.mark.parametrize("reader", ["network", "weights", "image"])
@pytest.mark.parametrize("error", OUT, ids=["python", "gpu", "linux", "windows"])
def test_out_of_memory_is_not_a_damaged_file(tmp_path, monkeypatch, reader, error):
    with pytest.raises(type(error)) as raised:
        readers(tmp_path, monkeypatch, error)[reader]()
    assert raised.value is error


@pytest.mark.parametrize("reader", ["network", "weights", "image"])
def test_any_other_error_is(tmp_path, monkeypatch, reader):
    with pytest.raises(LoadError, match="broken"):
        readers(tmp_path, monkeypatch, RuntimeError("broken"))[reader]()
