"""The project's own sources, parsed: what the hygiene tests look at."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# The rooms that a user installs; training is packaged too, but no command of the product needs it.
PRODUCT = ("pipelines", "hosts", "nodes", "headless")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module: absolute name, inside our package written `.nodes.masks`.

    Attributes:
        module: the name; `from . import a` and `from .a import b` give the module `a` where it is one.
        line: where.
        top_level: whether it runs when the importing module is imported.
        relative: whether it was written with leading dots.
        names: what was imported out of it (empty for `import x`).
    """

    module: str
    line: int
    top_level: bool
    relative: bool
    names: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        return self.module.lstrip(".").split(".")[0]


@dataclass(frozen=True, eq=False)
class Source:
    """A Python file: its path below the root with forward slashes, its text, tree and dotted name (`pipelines.masks`)."""

    path: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """What one leading dot means here."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    def functions(self) -> Iterator[FunctionNode]:
        return (node for node in self.nodes if isinstance(node, FunctionNode))

    @cached_property
    def _calls(self) -> tuple[tuple[str, ast.Call], ...]:
        return tuple((dotted(node.func), node) for node in self.nodes if isinstance(node, ast.Call))

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call with the dotted name that it calls (`torch.randn`, `x.cuda`); others have an empty name."""
        return iter(self._calls)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What local names stand for: `load` of `from torch import load`, `s` of `import comfy.samplers as s`."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        return found

    @cached_property
    def _names(self) -> tuple[tuple[str, ast.AST, ast.Call | None], ...]:
        called = {id(node.func): node for node in self.nodes if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in self.nodes if isinstance(node, ast.Attribute)}
        read = (
            node
            for node in self.nodes
            if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner and isinstance(node.ctx, ast.Load)
        )
        return tuple((self.full(node), node, called.get(id(node))) for node in read)

    def names(self) -> Iterator[tuple[str, ast.AST, ast.Call | None]]:
        """Every name that is read (`torch.hub.load`), in full whatever it was imported as, with the call of it if it is called."""
        return iter(self._names)

    def full(self, node: ast.AST) -> str:
        """The dotted name of a chain of attributes, with what its first name was imported as."""
        first, dot, rest = dotted(node).partition(".")
        return self.aliases.get(first, first) + dot + rest

    def imports(self, *, types: bool = False) -> Iterator[Import]:
        """Every import; those that only a type checker sees with `types`."""
        for node, inside in _statements(self.tree, inside_function=False, types=types):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, node.lineno, not inside, relative=False) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from self._from_import(node, inside)

    def _from_import(self, node: ast.ImportFrom, inside: bool) -> Iterator[Import]:
        if not node.level:
            names = tuple(alias.name for alias in node.names)
            yield Import(node.module or "", node.lineno, not inside, relative=False, names=names)
            return
        parts = self.package.split(".")
        base = [part for part in parts[: len(parts) - node.level + 1] if part]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            full = ".".join([*base, alias.name])
            module = full if full in module_names() else ".".join(base)
            yield Import("." + module, node.lineno, not inside, relative=True, names=(alias.name,))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes; of one that starts with something else (`f().c`) only the last name, `?.c`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return ""


def _statements(tree: ast.AST, *, inside_function: bool, types: bool) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        if not types and isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node, inside_function
        inner = inside_function or isinstance(node, FunctionNode | ast.Lambda)
        yield from _statements(node, inside_function=inner, types=types)


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """The Python files of the root's `folders`, or of the root itself and all of them when none is named."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    if not folders:
        paths = [path for path in committed() if path.suffix == ".py"]
    return tuple(_parse(path) for path in paths)


def _parse(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text, str(path)))


@cache
def module_names() -> frozenset[str]:
    """Dotted names of the package's modules, without the package's own name."""
    paths = [path for folder in (*PRODUCT, "training") for path in (ROOT / folder).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return frozenset(name.removesuffix(".__init__") for name in names)


@cache
def committed() -> tuple[Path, ...]:
    """Every file that git has or would take. Without git (an unpacked archive), every file outside hidden folders."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return tuple(sorted(path for path in found if path.is_file()))


def report(problems: list[str]) -> None:
    """Fail with one line per problem."""
    assert not problems, "\n" + "\n".join(problems)
