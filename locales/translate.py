"""Translations of everything the page writes: `python -m editkit.locales.translate LANGUAGE` prints what is still English.

locales/LANGUAGE/texts.json       translations by their English text, the only file that a translator edits
locales/LANGUAGE/nodeDefs.json    made of it: labels and tooltips of the nodes
locales/LANGUAGE/main.json        made of it: categories, and the texts of the page's own widgets

A changed English text has no translation any more, so a stale one cannot stay; a test lists both kinds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LANGUAGES = ("zh", "ja", "ko")
FOLDER = Path(__file__).parent


def english(definitions: Mapping[str, Any], categories: set[str]) -> dict[str, dict[str, Any]]:
    """The contents of the files that are translated, by file name."""
    main = json.loads((FOLDER / "en" / "main.json").read_text(encoding="utf-8"))
    names = sorted({part for category in categories for part in category.split("/")})
    return {"nodeDefs.json": dict(definitions), "main.json": {**main, "nodeCategories": {name: name for name in names}}}


def phrases(value: Any) -> Iterator[str]:
    """Every text in a nested dict."""
    if isinstance(value, str):
        yield value
    else:
        for inner in value.values():
            yield from phrases(inner)


def texts_of(language: str) -> dict[str, str]:
    path = FOLDER / language / "texts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def translated(value: Any, texts: Mapping[str, str]) -> Any:
    """A nested dict with every text replaced; one without a translation stays English."""
    if isinstance(value, str):
        return texts.get(value, value)
    return {key: translated(inner, texts) for key, inner in value.items()}


def missing(source: Mapping[str, Any], language: str) -> list[str]:
    """English texts without a translation, in the order of the files."""
    texts = texts_of(language)
    return list(dict.fromkeys(text for text in phrases(source) if text and text not in texts))


def unused(source: Mapping[str, Any], language: str) -> list[str]:
    """Translations of texts that nothing writes any more."""
    return sorted(texts_of(language).keys() - set(phrases(source)))


def files(source: Mapping[str, dict[str, Any]]) -> dict[Path, str]:
    """Every generated file of every language: path below the root, and text."""
    return {
        Path("locales") / language / name: json.dumps(translated(content, texts), indent=2, ensure_ascii=False) + "\n"
        for language in LANGUAGES
        for texts in [texts_of(language)]
        if texts
        for name, content in source.items()
    }


def main(language: str) -> int:
    """Print the texts that still need a translation, as JSON."""
    from .build import node_definitions, node_infos

    infos = node_infos()
    source = english(node_definitions(infos), {info["category"] for info in infos})
    todo = json.dumps(dict.fromkeys(missing(source, language), ""), indent=2, ensure_ascii=False)
    sys.stdout.buffer.write(todo.encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
