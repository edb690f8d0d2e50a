"""The schemas that saved workflows rely on, kept as a snapshot: `python -m editkit.tests.nodes.schemas` accepts additions.

Ids, names, types and order are frozen once released. What may come is a new node, a new optional input behind all
others of its node, a new output behind all others, a new choice of a combo, and another type that an input takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).parent / "schemas.json"
Schemas = dict[str, dict[str, list[dict[str, Any]]]]


def current() -> Schemas:
    """Every node of the pack as it is now."""
    from editkit.headless.runner import load_host

    load_host()
    from editkit.nodes.extension import NODES

    found = [node.define_schema() for node in NODES]
    return {schema.node_id: describe(schema) for schema in sorted(found, key=lambda schema: schema.node_id)}


def describe(schema: Any) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs in order; a combo with the choices that it offers everywhere."""
    inputs = [
        {
            "id": entry.id,
            "type": entry.get_io_type(),
            "optional": bool(entry.optional),
            **({"options": list(entry.options)} if entry.get_io_type() == "COMBO" else {}),
        }
        for entry in schema.inputs
    ]
    outputs = [{"id": entry.id, "name": entry.display_name, "type": entry.get_io_type()} for entry in schema.outputs]
    return {"inputs": inputs, "outputs": outputs}


def breaks(old: Schemas, new: Schemas) -> list[str]:
    """What a saved workflow would stumble over; empty if `new` only adds."""
    return [problem for node in old for problem in _node_breaks(node, old[node], new.get(node))]


def _node_breaks(node: str, old: dict[str, list[dict]], new: dict[str, list[dict]] | None) -> Iterator[str]:
    if new is None:
        yield f"{node} is gone"
        return
    for kind in ("inputs", "outputs"):
        for place, entry in enumerate(old[kind]):
            now = new[kind][place] if place < len(new[kind]) else None
            if now is None or not _fits(entry, now):
                yield f"{node}: {kind[:-1]} {place} was {entry}, is {now}"
    for entry in new["inputs"][len(old["inputs"]) :]:
        if not entry["optional"]:
            yield f"{node}: the new input {entry['id']} is not optional"


def _fits(old: dict[str, Any], now: dict[str, Any]) -> bool:
    """The same entry; a combo may offer more, and an input take more types (saved links keep theirs, which still fits).

    `optional` counts: the page sorts by it, and saved values would move.
    """
    same = all(old.get(key) == now.get(key) for key in ("id", "name", "optional"))
    types, given = ({*entry["type"].split(",")} for entry in (old, now))
    wider = types <= given if "name" not in old else types == given  # an output has a name, an input has none
    return same and wider and set(old.get("options", [])) <= set(now.get("options", []))


def saved() -> Schemas:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def committed() -> Schemas:
    """The snapshot of the last commit, so that a node may change until it is committed; without git the file itself."""
    command = ["git", "show", f"HEAD:./{SNAPSHOT.name}"]
    try:
        shown = subprocess.run(command, cwd=SNAPSHOT.parent, check=True, capture_output=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError):
        return saved()
    return json.loads(shown)


def main() -> int:
    """Write the snapshot if it only grows; say what breaks if it does not."""
    new = current()
    problems = breaks(committed(), new) if SNAPSHOT.exists() else []
    if problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 1
    SNAPSHOT.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
