"""The prompt that an edit was made with, read from the workflow itself: nodes and links in API format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CONDITIONS = ("positive", "target", "mixed", "edit")  # inputs that take the prompt of an edit
TEXTS = ("target_text", "text", "value", "string")  # widgets that hold one


def upstream_prompt(nodes: Mapping[str, Any] | None, node_id: Any) -> str:
    """The text of the nearest positive prompt before a node, "" where there is none.

    Args:
        nodes: the workflow by node id, each with "inputs"; None where the host does not tell.
        node_id: the node to start from.
    """
    if not nodes:
        return ""
    for node in _before(nodes, str(node_id)):
        for name in CONDITIONS:
            source = _linked(node, name)
            if source is not None:
                text = next(_texts(nodes, source), "")
                if text:
                    return text
    return ""


def _before(nodes: Mapping[str, Any], start: str) -> Iterator[Mapping[str, Any]]:
    """The node and everything it depends on, nearest first."""
    waiting, seen = [start], {start}
    while waiting:
        node = nodes.get(waiting.pop(0))
        if node is None:
            continue
        yield node
        for name in node.get("inputs", {}):
            source = _linked(node, name)
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)


def _texts(nodes: Mapping[str, Any], start: str) -> Iterator[str]:
    """Every text in a chain of conditioning nodes, nearest first."""
    for node in _before(nodes, start):
        for name in TEXTS:
            text = node.get("inputs", {}).get(name)
            if isinstance(text, str) and text.strip():
                yield text


def _linked(node: Mapping[str, Any], name: str) -> str | None:
    """The node that an input is connected to."""
    value = node.get("inputs", {}).get(name)
    return str(value[0]) if isinstance(value, (list, tuple)) and len(value) == 2 else None
