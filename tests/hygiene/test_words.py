"""The field's words: what an expert looks up is named as the papers name it, what an artist reads as ComfyUI names it.

`pytest tests/hygiene/test_words.py` checks names in the code, comments, docstrings and messages, the nodes' texts, help
pages, locales, the notes of workflows, the README and the documentation. Ids of nodes and sockets are frozen and may keep
an old word; anything between backticks is a name and not prose.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from editkit.tests.hygiene.sources import PRODUCT, ROOT, FunctionNode, Source, committed, report, sources

FOLDERS = (*PRODUCT, "training", "benchmarks", "workflows", "locales")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/", "web/docs/", "hosts/bundled/MODEL_CARD.md")


@dataclass(frozen=True)
class Rule:
    """A word that we do not use.

    Attributes:
        instead: what to write.
        name: a pattern for names, which are compared in lower case with one underscore between words; "" allows all.
        prose: a pattern for text; "" allows all.
        names_in: the folders whose names are compared (default: all).
    """

    instead: str
    name: str = ""
    prose: str = ""
    names_in: tuple[str, ...] = FOLDERS


def word(*words: str) -> str:
    """A pattern for names that contain one of `words` as a whole word."""
    return rf"(?:^|_)(?:{'|'.join(words)})(?:_|$)"


RULES = {
    "picture": Rule("image", word("pictures?"), r"\bpictures?\b"),
    "clean prediction": Rule(
        "denoised (clean is the noise-free source latent)",
        word("clean_pred(iction)?s?", "source_clean", "clean_(source|target|edited|cond|uncond)"),
        r"\bclean (prediction|estimate|guess)s?\b|predict\w* (the |a )?clean\b",
    ),
    "level": Rule("sigma", word("levels?"), r"\bnoise levels?\b|\blevels? of (the )?noise\b"),
    "cell": Rule("latent pixel", word("cells?"), r"\bcells?\b(?! of the table)"),
    "network row": Rule(
        "forward pass, model call",
        "",
        r"\b(network|model|bare|extra|more|costs? an?|of|\d|one|two|three|four) rows?(?= (of the network|a step|in every))"
        r"|\b(network|model|bare) rows?\b|costs? (a|one|two|three|\d) rows?\b|rows per step\b|evaluates? \w+ rows?\b",
    ),
    "part of the run": Rule(
        "fraction of the steps",
        "",
        r"\b(parts?|halves|half|fractions?|share) of the (run|grid)\b",
    ),
    "equal noise": Rule("equal log-sigma (stages of a mask schedule)", "", r"\b[Ee]qual noise\b(?! draws)"),
    "words look at": Rule(
        "attend to; cross-attention maps",
        "",
        r"\b(words?|tokens?|layers?|it|they) look(s|ed)? at\b|\bwords (see|look)\b|where (the|its|their) words? look",
    ),
    "looks": Rule("appearance", word("looks?"), r"\b(the|its|their|our|of|other|new|same) looks\b"),
    "values (StyleDiffusion)": Rule(
        "value embeddings", "", r"\b(learned|learnt|style|inverted|held) values\b(?! embeddings)"
    ),
    "climb": Rule("invert, inversion prompt", word("climb(s|ed|ing)?"), r"\bclimb(s|ed|ing)?\b|\bway up\b"),
    "towards, against": Rule("positive, negative", word("towards", "against"), "", ("pipelines", "hosts", "nodes")),
    "pull, cut": Rule(
        "inversion guidance, threshold",
        word("pull(s|ed|ing)?", "cut(s|off)?"),
        r"\bpull(s|ed|ing)? (of|towards|to|back|the)\b",
        ("pipelines", "hosts", "nodes"),
    ),
    "judge": Rule("ranker, scorer (the oracle gives a verdict)", word("judg(e|es|ed|ing)"), r"\bjudg(e|es|ed|ing)\b"),
    "thing": Rule("object", word("things?"), r"\b(?<!same )things?\b"),
    "hold, saw": Rule(
        "early stopping: freeze, observe",
        word("held(?!_out)", "hold", "saw"),
        "",
        ("pipelines/learning", "pipelines/inversion", "pipelines/stylediffusion"),
    ),
    "gradient range": Rule("loss scaling", word("gradient_range"), r"\bgradient range\b|\bGradientRange\b"),
    "subject": Rule("object", word("subjects?"), r"\bsubjects?\b"),
}
# Modules that were named for nothing an expert would look up.
MODULES = {
    "columns": "token_maps",
    "gates": "step_ranges",
    "links": "report",
    "injection": "plug_and_play",
    "relatives": "masactrl, plug_and_play",
    "standins": "stock_nodes",
    "pictures": "images",
}


@cache
def frozen_ids() -> frozenset[str]:
    """Ids of inputs, outputs and options: graphs that users saved contain them."""
    schemas = json.loads((ROOT / "tests" / "nodes" / "schemas.json").read_text(encoding="utf-8"))
    sockets = [socket for node in schemas.values() for socket in (*node["inputs"], *node["outputs"])]
    return frozenset(socket["id"] for socket in sockets)


# ---------------------------------------------------------------------------------------------------------------- names
def words_of(name: str) -> str:
    """`HeldValueEmbeddings` and `_held_value` as `held_value_embeddings` and `held_value`."""
    return "_".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)).lower()


@cache
def defined(source: Source) -> tuple[tuple[str, int], ...]:
    """Every name that a file gives: of functions, classes, parameters, variables and attributes."""
    return tuple(_defined(source))


def _defined(source: Source) -> Iterator[tuple[str, int]]:
    for node in ast.walk(source.tree):
        if isinstance(node, (*FunctionNode.__args__, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def wrong_names(source: Source, rule: Rule, frozen: frozenset[str] = frozenset()) -> list[str]:
    if not rule.name or not source.path.startswith(rule.names_in):
        return []
    found = [
        (name, line) for name, line in defined(source) if name not in frozen and re.search(rule.name, words_of(name))
    ]
    return [
        f"{source.path}:{line} {name}: write {rule.instead}" for name, line in sorted(set(found), key=lambda f: f[1])
    ]


def wrong_paths(source: Source) -> Iterator[str]:
    """A latent has a trajectory; only a file has a path."""
    for node in ast.walk(source.tree):
        annotated = isinstance(node, ast.arg | ast.AnnAssign) and node.annotation and ast.unparse(node.annotation)
        name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target) if annotated else ""
        if annotated and name.rpartition("_")[2] in {"path", "paths"} and "Trajectory" in annotated:
            yield f"{source.path}:{node.lineno} {name}: {annotated}: write trajectory"


# ---------------------------------------------------------------------------------------------------------------- prose
def prose_of_code(source: Source) -> Iterator[tuple[str, int]]:
    """Comments, docstrings and messages. A string without a space is an id or a key."""
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string):
            for offset, line in enumerate(token.string.splitlines()):
                yield line, token.start[0] + offset


def prose_of_page(text: str) -> Iterator[tuple[str, int]]:
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced:
            yield line, number


def strings(value: object) -> Iterator[str]:
    """Every text below a JSON value; keys are ids."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def notes(graph: object) -> Iterator[str]:
    """Titles of nodes and groups, and what the notes say."""
    if isinstance(graph, dict):
        yield from (graph[key] for key in ("title", "text") if isinstance(graph.get(key), str))
        if "Note" in str(graph.get("type", "")):
            yield from strings(graph.get("widgets_values", []))
    for inner in graph.values() if isinstance(graph, dict) else graph if isinstance(graph, list) else ():
        yield from notes(inner)


@cache
def texts() -> tuple[tuple[str, int, str], ...]:
    """All prose: file, line (0 in JSON) and text without what is between backticks."""
    found = [(s.path, line, text) for s in sources(*FOLDERS) for text, line in prose_of_code(s)]
    for path in committed():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(PAGES) and path.suffix == ".md":
            found += [(name, line, text) for text, line in prose_of_page(path.read_text(encoding="utf-8"))]
        elif path.suffix == ".json" and name.startswith(("locales/", "workflows/")):
            value = json.loads(path.read_text(encoding="utf-8"))
            found += [(name, 0, text) for text in (strings if name.startswith("locales/") else notes)(value)]
    return tuple((name, line, re.sub(r"`[^`]*`", "", text)) for name, line, text in found)


# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("name", RULES)
def test_names(name):
    report([line for source in sources(*FOLDERS) for line in wrong_names(source, RULES[name], frozen_ids())])


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.prose])
def test_texts(name):
    rule = RULES[name]
    hits = [(file, line, text, found) for file, line, text in texts() if (found := re.search(rule.prose, text))]
    report([
        f"{file}:{line} ...{text[max(0, found.start() - 30) : found.end() + 30].strip()}...: write {rule.instead}"
        for file, line, text, found in hits
    ])  # fmt: skip


def test_a_latent_has_a_trajectory_and_a_file_has_a_path():
    report([line for source in sources(*FOLDERS) for line in wrong_paths(source)])


def test_modules():
    report([
        f"{source.path}: name it {MODULES[Path(source.path).stem]}"
        for source in sources(*FOLDERS)
        if Path(source.path).stem in MODULES
    ])  # fmt: skip


def code(text: str) -> Source:
    return Source("pipelines/learning/x.py", text, ast.parse(text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("picture", "def draw(picture): ..."),
        ("level", "for _level in noise: ..."),
        ("thing", "class ThingMask: ..."),
        ("hold, saw", "self.held = 1"),
        ("towards, against", "against: int = 3"),
        ("judge", "def judged(): ..."),
    ],
)
def test_old_names_are_noticed(name, text):
    assert wrong_names(code(text), RULES[name])
    assert not wrong_names(
        code(text), RULES[name], frozenset({"picture", "_level", "ThingMask", "held", "against", "judged"})
    )


@pytest.mark.parametrize(
    "text", ["held_out = 1", "nothing = 1", "log.setLevel(2)", "execute = 1", "leveled = overlook = 2"]
)
def test_other_names_pass(text):
    assert not [line for rule in RULES.values() for line in wrong_names(code(text), rule)]


def test_old_texts_are_noticed():
    old = {
        "picture": "the whole picture",
        "words look at": "where the words look",
        "network row": "costs a row",
        "part of the run": "Part of the run that uses it",
        "thing": "one thing in the frame",
        "climb": "the way up",
        "clean prediction": "the clean prediction",
    }
    for name, text in old.items():
        assert re.search(RULES[name].prose, text.lower()), name
    for text in (
        "the same thing",
        "rows of the batch",
        "nothing is predicted",
        "a file path",
        "a clean latent",
        "key and value",
    ):
        assert not [name for name, rule in RULES.items() if rule.prose and re.search(rule.prose, text)], text


def test_paths_of_latents_are_noticed():
    assert list(wrong_paths(code("def f(path: Trajectory): ...")))
    assert not list(wrong_paths(code("def f(path: Path, trajectory: Trajectory): ...")))
