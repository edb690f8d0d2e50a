"""A module is read in one sitting, a function on one screen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from editkit.tests.hygiene.sources import PRODUCT, ROOT, FunctionNode, report, sources

FILE_LINES = 400
FUNCTION_LINES = 50
POSITIONAL = 7
NESTING = 4

FOLDERS = (*PRODUCT, "training", "tests", "benchmarks")
# Everything but the tests.
LAID_OUT = (*PRODUCT, "workflows", "locales", "training", "benchmarks")
SKIPS = 20
ENTRIES, PIPELINES_ENTRIES = 15, 12
# One declaration after the other: nothing in it to lose sight of.
DECLARATIONS = {"define_schema"}
# In nodes/ a parameter is a socket, which comes by name; in tests/ a fixture.
COUNTED = ("pipelines", "hosts", "training", "benchmarks")
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)


def positional(function: FunctionNode) -> int:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest block inside a block; `elif` and a nested function start no deeper level than they look."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FunctionNode.__args__, ast.ClassDef)):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not chained)))
    return deepest


@pytest.mark.parametrize("folder", FOLDERS)
def test_files(folder):
    report([f"{s.path}: {s.lines} lines, at most {FILE_LINES}" for s in sources(folder) if s.lines > FILE_LINES])


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions(folder):
    problems = []
    for source in sources(folder):
        for function in source.functions():
            lines = (function.end_lineno or 0) - function.lineno + 1
            where = f"{source.path}:{function.lineno} {function.name}"
            if lines > FUNCTION_LINES and function.name not in DECLARATIONS:
                problems.append(f"{where}: {lines} lines, at most {FUNCTION_LINES}")
            if nesting(function) > NESTING:
                problems.append(f"{where}: {nesting(function)} blocks deep, at most {NESTING}")
            if folder in COUNTED and positional(function) > POSITIONAL:
                problems.append(f"{where}: {positional(function)} positional parameters, at most {POSITIONAL}")
    report(problems)


def test_the_formatter_lays_out_the_product():
    """A table of numbers may keep its own lines; a call or a condition may not."""
    skips = [
        f"{s.path}:{i}" for s in sources(*LAID_OUT) for i, line in enumerate(s.text.splitlines(), 1) if skipped(line)
    ]
    assert len(skips) <= SKIPS, "\n".join([f"{len(skips)} lines skip the formatter, at most {SKIPS}", *skips])


def skipped(line: str) -> bool:
    return line.rstrip().endswith("# fmt: skip")


@pytest.mark.parametrize("folder", LAID_OUT)
def test_a_line_binds_at_most_two_literals_or_names(folder):
    """`a, b, c = 1, 2, 3` spares lines and costs the reader; a call that returns three values may be unpacked."""
    report([
        f"{source.path}:{node.lineno} {ast.unparse(node)[:90]}"
        for source in sources(folder)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assign) and crowded(node)
    ])  # fmt: skip


def crowded(node: ast.Assign) -> bool:
    target = node.targets[0]
    return isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) > 2


def entries(folder: Path) -> int:
    """Files and folders that a reader meets, without `__init__.py` and what git ignores."""
    ignored = {"__init__.py", "__pycache__"}
    return sum(path.name not in ignored and not path.name.startswith(".") for path in folder.iterdir())


def test_a_folder_is_seen_at_a_glance():
    """Of Python files: help pages and workflows are one file per node or graph."""
    folders = sorted({(ROOT / source.path).parent for source in sources(*PRODUCT, "training", "benchmarks", "locales")})
    limits = {ROOT / "pipelines": PIPELINES_ENTRIES}
    report([
        f"{folder.relative_to(ROOT)}/ has {entries(folder)} entries, at most {limits.get(folder, ENTRIES)}"
        for folder in folders
        if entries(folder) > limits.get(folder, ENTRIES)
    ])  # fmt: skip


def test_nodes_share_three_files():
    """Every other file of nodes/ is a method with the nodes that an artist sees."""
    hidden = [source.path for source in sources("nodes") if Path(source.path).name.startswith("_")]
    assert {path for path in hidden if not path.endswith("__init__.py")} <= {
        "nodes/_api.py",
        "nodes/_inputs.py",
        "nodes/_labels.py",
    }


def test_crowded_lines_are_noticed():
    assert crowded(ast.parse("a, b, c = 1, x, y.z").body[0])
    assert not crowded(ast.parse("a, b = 1, 2").body[0])
    assert not crowded(ast.parse("a, b, c = f()").body[0])
    assert skipped("x = 1  # fmt: skip")
    assert not skipped("x = '# fmt: skip' + y")


def test_nesting_is_counted():
    flat = ast.parse("def f():\n if a: pass\n elif b: pass\n elif c: pass\n elif d: pass\n elif e: pass").body[0]
    deep = ast.parse("def f():\n for a in b:\n  if c:\n   with d:\n    while e: pass").body[0]
    assert nesting(flat) == 1
    assert nesting(deep) == 4
