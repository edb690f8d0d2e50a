"""Boots ComfyUI inside this process, on the CPU, before any test module is imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

COMFYUI = os.environ.get("COMFYUI_PATH")
collect_ignore_glob = [] if COMFYUI else ["test_*.py"]


def _boot(path: str) -> None:
    sys.path.insert(0, path)
    arguments, sys.argv = sys.argv, ["comfyui", "--cpu"]  # ComfyUI reads its options at import
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.samplers
        import comfy.utils
    finally:
        sys.argv = arguments
    with suppress(AttributeError):  # later versions have the server decide
        comfy.utils.set_progress_bar_enabled(False)
    logging.getLogger().setLevel(logging.WARNING)


if COMFYUI:
    _boot(COMFYUI)


@pytest.fixture(autouse=True)
def _like_a_node() -> Iterator[None]:
    """ComfyUI runs nodes under inference mode, which makes their tensors unfit for autograd."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the bundled layout with random weights."""
    from editkit.tests.comfyui.host.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bundled(folder: Path):
    """MODEL, CLIP, VAE built inside a node, so that their weights are inference tensors."""
    from editkit.hosts.comfyui.bundled import build_bundled

    with torch.inference_mode():
        return build_bundled(folder)


@pytest.fixture
def model(bundled):
    return bundled[0]


@pytest.fixture
def clip(bundled):
    return bundled[1]


@pytest.fixture
def vae(bundled):
    return bundled[2]
