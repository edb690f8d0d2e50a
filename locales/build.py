"""Generate the texts that follow from the node schemas: `python -m editkit.locales.build`.

locales/en/nodeDefs.json    labels and tooltips, the file a translation starts from
web/docs/NODE.md            title, "Inputs" and "Outputs"; the other sections of a help page are written by hand
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCALE = Path("locales/en/nodeDefs.json")
DOCS = Path("web/docs")
HEADINGS = ("What it does", "When to use it", "Example", "Inputs", "Outputs", "Limits", "Paper")
REPRODUCTION = "Reproduction switches: {names}. They repeat what published scripts do; keep the defaults for new edits."
LARGE = 2**63

Info = Mapping[str, Any]


def node_infos() -> list[Info]:
    """The entry of every node in `/object_info`, sorted by id."""
    from ..headless.runner import load_host

    load_host()
    from ..nodes.extension import NODES

    return sorted((node.GET_NODE_INFO_V1() for node in NODES), key=lambda info: info["name"])


def inputs(info: Info) -> list[tuple[str, str, Mapping[str, Any], bool]]:
    """Name, type, options and whether it is optional, in the page's order."""
    groups = info["input"]
    return [
        (name, kind, options, group == "optional")
        for group in ("required", "optional")
        for name, (kind, options) in groups.get(group, {}).items()
    ]


def label(name: str, options: Mapping[str, Any]) -> str:
    """What the page writes beside an input."""
    return options.get("display_name") or name


def node_definitions(infos: list[Info]) -> dict[str, Any]:
    """The content of nodeDefs.json."""
    return {
        info["name"]: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                name: {"name": label(name, options), "tooltip": options["tooltip"]}
                for name, _, options, _ in inputs(info)
            },
            "outputs": {
                str(slot): {"name": name, "tooltip": tooltip}
                for slot, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
            },
        }
        for info in infos
    }


def input_table(info: Info) -> str:
    """One line per input; then the inputs that only reproduce published scripts, named once."""
    lines = [
        f"| {_named(name, options)}{' (optional)' if optional else ''} | {kind.replace(',', ' or ')} "
        f"| {_default(options)} | {_range(options)} | {_escaped(options['tooltip'])} |"
        for name, kind, options, optional in inputs(info)
    ]
    switches = [f"*{label(name, options)}*" for name, _, options, _ in inputs(info) if options.get("advanced")]
    note = ["", REPRODUCTION.format(names=", ".join(switches))] if switches else []
    return "\n".join(["| input | type | default | range | |", "|---|---|---|---|---|", *lines, *note])


def _named(name: str, options: Mapping[str, Any]) -> str:
    shown = label(name, options)
    return f"`{name}`" if shown == name else f"{shown} (`{name}`)"


def output_table(info: Info) -> str:
    named = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    return "\n".join(
        [
            "| output | type | |",
            "|---|---|---|",
            *(f"| {name} | {kind} | {_escaped(tip)} |" for name, kind, tip in named),
        ]
    )


def _default(options: Mapping[str, Any]) -> str:
    value = options.get("default", "")
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else _escaped(str(value))


def _range(options: Mapping[str, Any]) -> str:
    if "options" in options:
        return ", ".join(_escaped(str(option)) for option in options["options"])
    if "min" not in options:
        return ""
    return " to ".join("2^64 - 1" if bound > LARGE else f"{bound:g}" for bound in (options["min"], options["max"]))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def with_tables(page: str, info: Info) -> str:
    """A help page with its title and both tables renewed."""
    page = re.sub(r"\A# .*", lambda _: f"# {info['display_name']}", page)
    page = _section(page, "Inputs", input_table(info))
    return _section(page, "Outputs", output_table(info))


def _section(page: str, heading: str, body: str) -> str:
    pattern = rf"(?<=^## {heading}\n).*?(?=^## |\Z)"
    return re.sub(pattern, lambda _: f"\n{body}\n\n", page, count=1, flags=re.DOTALL | re.MULTILINE)


def files() -> dict[Path, str]:
    """Every generated file: path below the root, and text."""
    infos = node_infos()
    texts = {LOCALE: json.dumps(node_definitions(infos), indent=2, ensure_ascii=False) + "\n"}
    for info in infos:
        path = DOCS / f"{info['name']}.md"
        template = f"# {info['display_name']}\n\n" + "\n".join(f"## {heading}\n" for heading in HEADINGS)
        page = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else template
        texts[path] = with_tables(page, info)
    return texts


def main() -> int:
    for path, text in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
