"""Packages whose public names load on first use (PEP 562): importing `editkit.pipelines` must not load torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package in which a public name wins over a submodule of the same name.

    Python binds a submodule as an attribute of its package as soon as anything imports it. Without this class
    `editkit.pipelines.sdedit` would be the function or the module, depending on what was imported before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("__all__", ())):
            super().__setattr__(name, value)


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: relative module names, each with the public names that it defines, separated by spaces.
    """
    home_of = {name: module for module, names in homes.items() for name in names.split()}
    sys.modules[package].__class__ = _Package

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home_of[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return load, names
