"""The tests themselves: each file that looks like one is one, and no test hides another."""

from __future__ import annotations

import ast
from collections import Counter

from editkit.tests.hygiene.sources import FunctionNode, Source, dotted, report, sources


def collected(source: Source) -> list[str]:
    """Names of what pytest collects at the top of a file and in its classes."""
    scopes = [source.tree, *(n for n in source.tree.body if isinstance(n, ast.ClassDef) and n.name.startswith("Test"))]
    functions = [n for scope in scopes for n in scope.body if isinstance(n, FunctionNode)]
    return [function.name for function in functions if function.name.startswith("test")]


def test_every_test_file_has_tests():
    files = [source for source in sources("tests") if source.path.rpartition("/")[2].startswith("test_")]
    assert len(files) > 10
    report([f"{source.path} has no test" for source in files if not collected(source)])


def test_tests_are_in_files_that_pytest_collects():
    others = [source for source in sources("tests") if not source.path.rpartition("/")[2].startswith("test_")]
    report([f"{source.path}: {name} is never run" for source in others for name in collected(source)])


def test_no_test_replaces_another_of_the_same_name():
    report([
        f"{source.path}: {name} stands there {count} times"
        for source in sources("tests")
        for name, count in Counter(collected(source)).items()
        if count > 1 and not any(isinstance(node, ast.ClassDef) for node in source.tree.body)
    ])  # fmt: skip


def test_every_test_checks_something():
    """An assertion, an expected error, a helper that asserts, or an explicit failure."""
    checks = ("raises", "fail", "report", "warns", "assert_close", "assert_allclose")
    problems = []
    for source in sources("tests"):
        helpers = {f.name for f in source.functions() if any(isinstance(node, ast.Assert) for node in ast.walk(f))}
        for function in (f for f in source.functions() if f.name.startswith("test_")):
            called = {dotted(node.func).rpartition(".")[2] for node in ast.walk(function) if isinstance(node, ast.Call)}
            asserts = any(isinstance(node, ast.Assert) for node in ast.walk(function))
            known = called & {*checks, *(helpers - {function.name})}
            if (
                not asserts
                and not known
                and not any(name.startswith(("assert_", "check_", "must_")) for name in called)
            ):
                problems.append(f"{source.path}:{function.lineno} {function.name} checks nothing")
    report(problems)


def test_skips_say_why():
    problems = []
    for source in sources("tests"):
        for name, call in source.calls():
            if name.endswith(("mark.skip", "mark.skipif", "mark.xfail")) and not any(
                k.arg == "reason" for k in call.keywords
            ):
                problems.append(f"{source.path}:{call.lineno} {name} without reason=")
    report(problems)
