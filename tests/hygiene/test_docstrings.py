"""What a docstring owes its reader: a function with many parameters explains each, and names the paper behind it.

Asked of public functions and methods with four or more parameters in `pipelines/`, `hosts/` and `headless/`: `Args`, and
`Returns` and `Raises` where the function returns or raises. A module that implements a paper names its source.
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
# Stand-ins take the inputs of ComfyUI's own nodes.
STAND_INS = "headless/stock_nodes.py"
# Functions whose docstrings are still to be completed: this list may only shrink.
OWED = {
    "hosts/comfyui/attention_hooks.py controlled_options",
    "hosts/comfyui/blend_patch.py native_blended_model",
    "hosts/comfyui/bundled.py load",
    "hosts/comfyui/denoiser.py native_denoiser",
    "hosts/comfyui/guiders.py predict_noise",
    "hosts/comfyui/pair_patch.py call_model",
    "hosts/host.py blended_model",
    "hosts/host.py embeddings_guider",
    "hosts/host.py iterative_guider",
    "hosts/host.py open_denoiser",
    "hosts/latent.py latent_out",
    "pipelines/attention/map_drawing.py spread_steps",
    "pipelines/attention/pair_batch.py trio_context",
    "pipelines/attention/pair_loop.py attention_edit",
    "pipelines/attention/pair_loop.py pair_edit",
    "pipelines/attention/prompts/words.py missing",
    "pipelines/attention/token_maps.py token_maps",
    "pipelines/blended/background_loss.py background_loss",
    "pipelines/blended/blending.py unscale_over_source",
    "pipelines/blended/composite.py composite_source",
    "pipelines/blended/decoder_tuning.py tune_latent",
    "pipelines/blended/prediction.py blended_predictor",
    "pipelines/core/attention_sites.py attend",
    "pipelines/core/guidance.py guided",
    "pipelines/core/masks.py dilation_schedule",
    "pipelines/core/masks.py downsample",
    "pipelines/core/noise.py seeded_draw",
    "pipelines/core/noise.py seeded_noise",
    "pipelines/core/noise.py start_latent",
    "pipelines/core/protocols.py combine",
    "pipelines/core/samplers.py dpmpp_2m",
    "pipelines/core/samplers.py euler",
    "pipelines/core/shapes.py match_batch",
    "pipelines/core/shapes.py same_size",
    "pipelines/core/trajectory.py made_trajectory",
    "pipelines/diffedit.py heat_image",
    "pipelines/diffedit.py mask_in_pixels",
    "pipelines/evaluation/clip_ranking.py text_scores",
    "pipelines/evaluation/drawing.py curve",
    "pipelines/evaluation/metrics.py psnr_outside",
    "pipelines/evaluation/report.py measure_edit",
    "pipelines/imagic.py imagic",
    "pipelines/layerdiffusion/embeddings.py layered_embeddings",
    "pipelines/layerdiffusion/fitting.py fit",
    "pipelines/learning/per_step.py learn_per_step",
    "pipelines/stylediffusion/edit.py style_edit",
    "pipelines/stylediffusion/edit.py style_transfer",
    "pipelines/stylediffusion/networks.py made_networks",
}
# Types that say nothing about shape, unit or meaning. A type of ours has a docstring of its own.
PLAIN = re.compile(r"\b(Tensor|int|float|str|bool|tuple|list|dict|Sequence|Mapping|Callable|Any|object)\b|^$")
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


def is_plain(parameter: ast.arg) -> bool:
    return bool(PLAIN.search(ast.unparse(parameter.annotation) if parameter.annotation else ""))


def own_nodes(function: FunctionNode) -> Iterator[ast.AST]:
    """The nodes of a function without those of the functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [n for n in ast.iter_child_nodes(node) if not isinstance(n, (*FunctionNode.__args__, ast.Lambda))]


def returns(function: FunctionNode) -> bool:
    annotated = function.returns is not None and ast.unparse(function.returns) not in {"None", "NoReturn"}
    return annotated and any(isinstance(node, ast.Return) and node.value is not None for node in own_nodes(function))


def raises(function: FunctionNode) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in own_nodes(function))


@cache
def declared() -> frozenset[str]:
    """Methods of protocols: the protocol explains them, and whoever implements one need not."""
    protocols = [
        node
        for source in sources("pipelines/core", "hosts")
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
    ]
    return frozenset(inner.name for node in protocols for inner in node.body if isinstance(inner, FunctionNode))


def declares(source: Source) -> bool:
    return any(
        isinstance(n, ast.ClassDef) and any("Protocol" in ast.unparse(b) for b in n.bases) for n in source.tree.body
    )


def delegates(text: str) -> bool:
    """The docstring of something that overrides points at what it overrides."""
    return bool(re.search(r"\bSee `\w+\.\w+`", text))


def missing(function: FunctionNode, method: bool) -> list[str]:
    """The sections that the docstring lacks."""
    found = parameters(function, method)
    text = ast.get_docstring(function) or ""
    if len(found) < MANY or delegates(text):
        return []
    wanted = {"Args": True, "Returns": returns(function), "Raises": raises(function)}
    gaps = [name for name, needed in wanted.items() if needed and not re.search(rf"\b{name}:", text)]
    if "Args" not in gaps:
        explained = text.partition("Args:")[2]
        names = [parameter.arg for parameter in found if is_plain(parameter)]
        gaps += [f"the parameter {name}" for name in names if not re.search(rf"\b{name}\b", explained)]
    return gaps


@pytest.mark.parametrize("folder", ROOMS)
def test_many_parameters_are_explained(folder):
    report([
        f"{source.path}:{function.lineno} {function.name}: the docstring lacks {', '.join(gaps)}"
        for source in sources(folder)
        for function, method in public(source)
        if source.path != STAND_INS and not (method and function.name in declared() and not declares(source))
        if (gaps := missing(function, method)) and f"{source.path} {function.name}" not in OWED
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


def test_gaps_are_noticed():
    silent = first_function("def f(a, b, c, d) -> int:\n    if a: raise E()\n    return 1")
    assert missing(silent, False) == ["Args", "Returns", "Raises"]
    partly = first_function(
        "def f(a, b, c, d) -> int:\n    '''Args:\n    a, b: x.\n    c: y.\n    Returns: z.'''\n    return 1"
    )
    assert missing(partly, False) == ["the parameter d"]


def test_short_and_delegating_functions_owe_nothing():
    assert not missing(first_function("def f(self, a, b, c) -> int: return 1"), True)
    assert not missing(first_function("def f(a, b, c, d):\n    'See `Denoiser.denoise`.'"), False)
    assert not missing(first_function("def f(a, b, c, d):\n    '''Args:\n    a, b, c, d: x.'''"), False)
