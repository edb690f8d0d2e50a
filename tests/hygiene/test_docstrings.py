"""What a docstring owes its reader: a function with many parameters explains each, and names the paper behind it.

Asked of public functions and methods with four or more parameters in `pipelines/`, `hosts/` and `headless/`: `Args` with every
parameter, and `Returns` and `Raises` where the function returns or raises. A method may point at the one that declares it
instead ("See `Denoiser.denoise`"). A module that implements a paper names its source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from editkit.tests.hygiene.sources import FunctionNode, Source, report, sources

MANY = 4
ROOMS = ("pipelines", "hosts", "headless")
# What stands for a paper: its year, a section or an equation of it, or the place in docs/methods.md.
CITED = re.compile(r"\b(19|20)\d\d\b|\b[Ss]ection \d|\b[Ee]q(uation|\.)|\b[Ff]igure \d|\balgorithm \d|docs/methods\.md")
# The folders whose modules implement papers, and the modules there that only read, draw or batch for the others.
SUPPORT = {
    "figure",
    "fitting",
    "map_drawing",
    "negative_embeddings",
    "pair_batch",
    "pair_control",
    "pair_sampling",
    "report",
    "widget_syntax",
    "words",
}
# An entry of `Args`: one or more names before a colon.
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.MULTILINE)
# Stand-ins take the inputs of ComfyUI's own nodes.
STAND_INS = "headless/stock_nodes.py"
METHODS = ("attention", "blended", "inversion", "layerdiffusion", "stylediffusion")


def public(source: Source) -> Iterator[tuple[FunctionNode, bool]]:
    """Public functions, and the public methods of public classes (True)."""
    for node in source.tree.body:
        if isinstance(node, FunctionNode) and not node.name.startswith("_"):
            yield node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, FunctionNode) and not inner.name.startswith("_"):
                    yield inner, True


def parameters(function: FunctionNode, method: bool) -> list[ast.arg]:
    own = [*function.args.posonlyargs, *function.args.args]
    bound = method and not any("staticmethod" in ast.unparse(name) for name in function.decorator_list)
    return own[1 if bound else 0 :] + function.args.kwonlyargs


def own_nodes(function: FunctionNode) -> Iterator[ast.AST]:
    """The nodes of a function without those of the functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [n for n in ast.iter_child_nodes(node) if not isinstance(n, (*FunctionNode.__args__, ast.Lambda))]


def returns(function: FunctionNode) -> bool:
    """Whether it gives a value; a method that a protocol only declares has no return statement."""
    annotated = function.returns is not None and ast.unparse(function.returns) not in {"None", "NoReturn"}
    declared = all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in function.body)
    returned = any(isinstance(node, ast.Return) and node.value is not None for node in own_nodes(function))
    return annotated and (declared or returned)


def raises(function: FunctionNode) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in own_nodes(function))


@cache
def explained() -> frozenset[str]:
    """What a docstring may point at: `Class.method` and `module.function` with `Args`."""
    found = set()
    for source in sources("pipelines/core", "hosts"):
        for node in source.tree.body:
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            owner = node.name if isinstance(node, ast.ClassDef) else source.name.rpartition(".")[2]
            found |= {
                f"{owner}.{member.name}"
                for member in members
                if isinstance(member, FunctionNode) and "Args:" in (ast.get_docstring(member) or "")
            }
    return frozenset(found)


def delegates(function: FunctionNode) -> bool:
    """Whether it points at a method or function of the same name that explains the parameters."""
    pointer = re.match(r"See `(\w+\.(\w+))`", ast.get_docstring(function) or "")
    return pointer is not None and pointer[2] == function.name and pointer[1] in explained()


def missing(function: FunctionNode, method: bool) -> list[str]:
    """The sections and parameters that the docstring lacks."""
    found = parameters(function, method)
    text = ast.get_docstring(function) or ""
    if len(found) < MANY or (method and delegates(function)):
        return []
    wanted = {"Args": True, "Returns": returns(function), "Raises": raises(function)}
    gaps = [name for name, needed in wanted.items() if needed and not re.search(rf"\b{name}:", text)]
    if "Args" not in gaps:
        args = re.split(r"^(?:Returns|Raises|Source):", text.partition("Args:")[2], maxsplit=1, flags=re.MULTILINE)[0]
        entries = {name for line in ENTRY.findall(args) for name in line.split(", ")}
        gaps += [f"the parameter {parameter.arg}" for parameter in found if parameter.arg not in entries]
    return gaps


@pytest.mark.parametrize("folder", ROOMS)
def test_many_parameters_are_explained(folder):
    report([
        f"{source.path}:{function.lineno} {function.name}: the docstring lacks {', '.join(gaps)}"
        for source in sources(folder)
        for function, method in public(source)
        if source.path != STAND_INS and (gaps := missing(function, method))
    ])  # fmt: skip


def test_methods_name_their_source():
    """Once in a module: in its own docstring or in that of a function or class."""
    problems = []
    for source in sources(*(f"pipelines/{method}" for method in METHODS)):
        documented = [
            node
            for node in ast.walk(source.tree)
            if isinstance(node, (*FunctionNode.__args__, ast.ClassDef, ast.Module))
        ]
        stem = source.name.rpartition(".")[2]
        if (
            not source.path.endswith("__init__.py")
            and stem not in SUPPORT
            and not any(CITED.search(ast.get_docstring(n) or "") for n in documented)
        ):
            problems.append(f"{source.path} names no paper, section or equation")
    report(problems)


def first_function(text: str) -> FunctionNode:
    node = ast.parse(text).body[0]
    assert isinstance(node, FunctionNode)
    return node


def documented(signature: str, *lines: str) -> FunctionNode:
    text = "".join(f"    {line}\n" for line in ("Do it.", "", *lines))
    return first_function(f"{signature}\n    '''\n{text}    '''\n    if a: raise E()\n    return 1")


FOUR = "def f(a, b, c, d) -> int:"
ALL = ("Args:", "    a, b, c, d: x.", "Returns: y.", "Raises: E.")


def test_gaps_are_noticed():
    assert missing(first_function(f"{FOUR}\n    if a: raise E()\n    return 1"), False) == ["Args", "Returns", "Raises"]
    assert missing(documented(FOUR, "Args:", "    a, b: x.", "    c: d.", *ALL[2:]), False) == ["the parameter d"]
    assert missing(documented(FOUR, *ALL[:3]), False) == ["Raises"]
    assert not missing(documented(FOUR, *ALL), False)


def test_types_do_not_replace_an_entry():
    typed = "def f(a: Tensor, b: Tensor, c: int, denoiser: Denoiser) -> int:"
    assert missing(documented(typed, "Args:", "    a, b, c: x.", *ALL[2:]), False) == ["the parameter denoiser"]


def test_a_name_in_a_sentence_is_no_entry():
    lines = ("Args:", "    a, b, c: as", "        d: x.", *ALL[2:])
    assert missing(documented(FOUR, *lines), False) == ["the parameter d"]


def test_declared_methods_owe_their_result():
    declared = "def f(a, b, c, d) -> int:\n    '''Do it.\n\n    Args:\n        a, b, c, d: x.\n    '''"
    assert missing(first_function(declared), False) == ["Returns"]


def test_short_functions_owe_nothing():
    assert not missing(first_function("def f(self, a, b, c) -> int: return 1"), True)


def test_methods_may_point_at_their_declaration():
    text = "def denoise(self, z, sigma, contexts, control):\n    'See `%s`.'"
    assert not missing(first_function(text % "Denoiser.denoise"), True)
    for elsewhere in ("Denoiser.combine", "Nobody.denoise", "denoise"):
        assert missing(first_function(text % elsewhere), True) == ["Args"]
    assert missing(first_function(text % "Denoiser.denoise"), False) == ["Args"]
