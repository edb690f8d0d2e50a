"""What scripts import: `editkit.pipelines` and `editkit.hosts.diffusers`, both lazy (docs/python.md)."""

from __future__ import annotations

import ast
from importlib import import_module
from types import ModuleType

import pytest

from editkit.tests.hygiene.child import run_python
from editkit.tests.hygiene.sources import sources

PACKAGES = ("pipelines", "hosts.diffusers")
SAME_NAME = ("diffedit", "imagic", "sdedit")  # a function and the module that defines it


def typed_names(package: str) -> set[tuple[str, str]]:
    """(module, name) of every import that a type checker sees."""
    source = next(found for found in sources(package.split(".")[0]) if found.name == package)
    block = next(node for node in source.tree.body if isinstance(node, ast.If))
    return {
        ("." * node.level + (node.module or ""), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_and_the_loader_see_the_same_names(package):
    module = import_module(f"editkit.{package}")
    homes = {(home, name) for home, names in module._HOMES.items() for name in names.split()}
    assert homes == typed_names(package)
    assert sorted(name for _, name in homes) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_loads(package):
    module = import_module(f"editkit.{package}")
    found = {name: getattr(module, name) for name in module.__all__}
    assert not [name for name, value in found.items() if isinstance(value, ModuleType)]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("name", SAME_NAME)
def test_a_function_wins_over_its_module_in_any_order(name):
    code = f"""
register()
import editkit.pipelines.{name}
from editkit.pipelines import {name}
from editkit.pipelines.{name} import {name} as same
print({name} is same and callable(same))
"""
    assert run_python(code).split() == ["True"]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_them_loads_no_torch(package):
    loaded = run_python(f"register()\nimport editkit.{package}\nprint(*sys.modules)").split()
    assert f"editkit.{package}" in loaded
    assert "torch" not in loaded and "diffusers" not in loaded
