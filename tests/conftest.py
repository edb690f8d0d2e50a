"""Registers the repository root as the package `editkit`, whatever the folder is called.

The root must never be on sys.path: ComfyUI has a top-level module called `nodes`, and ours would shadow it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _register_package() -> None:
    if "editkit" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "editkit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["editkit"] = module
    spec.loader.exec_module(module)


_register_package()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long", default=False):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: add --long"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums do not depend on the machine's core count, and tests that run side by side do not wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    return ROOT
