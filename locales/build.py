"""Generate the texts that follow from the node schemas: `python -m editkit.locales.build`.

locales/en/nodeDefs.json    labels and tooltips
locales/LANGUAGE/*.json     the same in other languages (locales/translate.py)
web/docs/NODE/en.md         title, image, "Inputs" and "Outputs"; the other sections of a help page are written by hand
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..nodes._labels import RARELY_USED
from . import translate

ROOT = Path(__file__).parent.parent
LOCALE = Path("locales/en/nodeDefs.json")
DOCS = Path("web/docs")
HEADINGS = ("What it does", "When to use it", "Example", "Inputs", "Outputs", "Limits", "Paper")
REPRODUCTION = "Reproduction switches: {names}. They repeat what published scripts do; keep the defaults for new edits."
LARGE = 2**63
# The images of methods in web/docs/images, and the nodes whose pages show them.
IMAGES = {
    "blended_edit": ("BlendedEdit", "BlendedDenoise", "BlendedModel", "NoiseLatent", "CompositeSource", "RankByText"),
    "thin_mask": ("DilationSchedule", "LatentMask"),
    "diffedit": ("DiffEdit", "DiffEditMask", "MaskedDecode"),
    "null_text_reconstruction": ("NullText", "NegativePrompt", "InvertDDIM", "EmbeddingsGuider"),
    "p2p_replace": ("AlignPrompts", "P2Plus"),
    "p2plus_real_image": ("P2PlusEdit",),
    "masactrl": ("MasaCtrl",),
    "plug_and_play": ("FeatureInjection",),
    "style_inversion_edit": ("StyleInvert", "StyleEdit"),
    "style_transfer": ("StyleTransfer",),
    "layered_edit": ("LayeredEmbeddings", "LayeredTune", "LayeredReference", "IterativeGuidance"),
    "imagic": ("Imagic",),
    "sdedit": ("SDEdit",),
    "differential_diffusion": ("ReleaseSchedule",),
}

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


def input_list(info: Info) -> str:
    """One item per input; then the inputs that only reproduce published scripts, named once."""
    rare = RARELY_USED.get(info["name"], ())
    lines = [_item(*entry) for entry in inputs(info)]
    switches = [
        f"*{label(name, options)}*"
        for name, _, options, _ in inputs(info)
        if options.get("advanced") and name not in rare
    ]
    note = ["", REPRODUCTION.format(names=", ".join(switches))] if switches else []
    return "\n".join([*lines, *note])


def _item(name: str, kind: str, options: Mapping[str, Any], optional: bool) -> str:
    """What an input is called, takes and means; a list fits a narrow panel, where a table would not."""
    shown = label(name, options)
    named = f"**{shown}**" if shown.replace(" ", "_") == name else f"**{shown}** (`{name}`)"
    facts = [kind.replace(",", " or "), _range(options), _default(options), "optional" if optional else ""]
    return f"- {named}: {_escaped(options['tooltip'])} *{'; '.join(filter(None, facts))}*"


def output_list(info: Info) -> str:
    named = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    return "\n".join(f"- **{name}**: {_escaped(tip)} *{kind}*" for name, kind, tip in named)


def _default(options: Mapping[str, Any]) -> str:
    value = options.get("default", "")
    if isinstance(value, bool):
        return "on" if value else "off"
    text = f"{value:g}" if isinstance(value, float) else _escaped(str(value))
    return f"default {text}" if text else ""


def _range(options: Mapping[str, Any]) -> str:
    if "options" in options:
        return ", ".join(_escaped(str(option)) for option in options["options"])
    if "min" not in options:
        return ""
    return " to ".join("2^64 - 1" if bound > LARGE else f"{bound:g}" for bound in (options["min"], options["max"]))


def _escaped(text: str) -> str:
    return re.sub(r"([*_])", r"\\\1", text.replace("\n", " "))


def with_lists(page: str, info: Info) -> str:
    """A help page with its title, its image and both lists renewed."""
    page = re.sub(r"\A# .*\n(\n!\[.*\n)?", lambda _: _head(info), page)
    page = _section(page, "Inputs", input_list(info))
    return _section(page, "Outputs", output_list(info))


def _head(info: Info) -> str:
    image = next((name for name, nodes in IMAGES.items() if info["name"].removeprefix("EditKit_") in nodes), None)
    shown = f"\n![What it does to an image](images/{image}.jpg)\n" if image else ""
    return f"# {info['display_name']}\n{shown}"


def _section(page: str, heading: str, body: str) -> str:
    pattern = rf"(?<=^## {heading}\n).*?(?=^## |\Z)"
    return re.sub(pattern, lambda _: f"\n{body}\n\n", page, count=1, flags=re.DOTALL | re.MULTILINE)


def files() -> dict[Path, str]:
    """Every generated file: path below the root, and text."""
    infos = node_infos()
    definitions = node_definitions(infos)
    texts = {LOCALE: json.dumps(definitions, indent=2, ensure_ascii=False) + "\n"}
    texts |= translate.files(translate.english(definitions, {info["category"] for info in infos}))
    for info in infos:
        path = DOCS / info["name"] / "en.md"
        template = f"# {info['display_name']}\n\n" + "\n".join(f"## {heading}\n" for heading in HEADINGS)
        page = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else template
        texts[path] = with_lists(page, info)
    return texts


def main() -> int:
    for path, text in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
