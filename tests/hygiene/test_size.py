"""A module is read in one sitting, a function on one screen."""

from __future__ import annotations

import ast

import pytest

from editkit.tests.hygiene.sources import PRODUCT, FunctionNode, report, sources

FILE_LINES = 400
FUNCTION_LINES = 50
POSITIONAL = 7
NESTING = 4

FOLDERS = (*PRODUCT, "training", "tests", "benchmarks")
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


def test_nesting_is_counted():
    flat = ast.parse("def f():\n if a: pass\n elif b: pass\n elif c: pass\n elif d: pass\n elif e: pass").body[0]
    deep = ast.parse("def f():\n for a in b:\n  if c:\n   with d:\n    while e: pass").body[0]
    assert nesting(flat) == 1
    assert nesting(deep) == 4
