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
    with suppress(AttributeError):  # the packaged fork has no global switch
        comfy.utils.set_progress_bar_enabled(False)
    _alias_packaged_modules(Path(path))
    logging.getLogger().setLevel(logging.WARNING)


def _alias_packaged_modules(path: Path) -> None:
    """Give the packaged fork of ComfyUI upstream's module names, as it does itself for custom nodes."""
    if not (path / "comfy_compatibility").is_dir():
        return
    import comfy.model_management
    import comfy_extras
    from comfy.interruption import InterruptProcessingException
    from comfy_compatibility.vanilla import prepare_vanilla_environment

    prepare_vanilla_environment()
    comfy.model_management.InterruptProcessingException = InterruptProcessingException
    comfy_extras.__path__.append(str(path / "comfy_extras" / "nodes"))


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
