"""What nodes leave in memory: nothing but the user's own MODEL, CLIP and VAE.

The process itself shrinks less: the C library's allocator keeps freed memory for later use.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress

import comfy.model_management as management
import pytest
import torch

from editkit.tests.comfyui.host.families import FAMILIES
from editkit.tests.comfyui.host.recipes import RECIPES
from editkit.tests.comfyui.host.scene import Scene

LEARNING = ("TuneDecoder", "TuneLatent", "NullText", "StyleInvert", "LayeredEmbeddings", "LayeredTune", "Imagic")
SAMPLING = ("BlendedDenoise", "DiffEdit", "P2PlusEdit")


def tensors() -> Iterator[torch.Tensor]:
    for held in gc.get_objects():
        with suppress(Exception):  # objects that other libraries made may refuse to be asked
            if isinstance(held, torch.Tensor):
                yield held


def held_bytes() -> int:
    """Of every tensor in the process after ComfyUI unloaded its models."""
    management.unload_all_models()
    gc.collect()
    return sum(
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors()}.values()
    )


@pytest.fixture(scope="module")
def scene() -> Scene:
    with torch.inference_mode():
        return Scene(FAMILIES["SD 1.5"])


@pytest.mark.parametrize("node", LEARNING + SAMPLING)
def test_nothing_stays_but_what_the_user_holds(scene: Scene, node: str) -> None:
    run = RECIPES[f"EditKit_{node}"]
    run(scene)  # makes what the scene keeps
    before = held_bytes()
    run(scene)
    assert held_bytes() == before


def test_a_held_tensor_is_seen() -> None:
    before = held_bytes()
    held = torch.zeros(1000)
    assert held_bytes() == before + held.nbytes
