"""The page's texts in other languages: none is missing, none is stale."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from editkit.locales import translate
from editkit.locales.build import files, node_definitions, node_infos

PLACEHOLDER = re.compile(r"\{\w+\}")
WRITTEN = {language for language in translate.LANGUAGES if translate.texts_of(language)}


@pytest.fixture(scope="module")
def source():
    infos = node_infos()
    return translate.english(node_definitions(infos), {info["category"] for info in infos})


@pytest.mark.parametrize("language", sorted(WRITTEN))
def test_no_text_is_missing_or_stale(source, language):
    assert translate.missing(source, language) == [], f"add them to locales/{language}/texts.json"
    assert translate.unused(source, language) == [], f"remove them from locales/{language}/texts.json"


@pytest.mark.parametrize("language", sorted(WRITTEN))
def test_translations_keep_placeholders_and_are_not_english(language):
    texts = translate.texts_of(language)
    for english, text in texts.items():
        assert Counter(PLACEHOLDER.findall(english)) == Counter(PLACEHOLDER.findall(text)), english
        assert text.strip() and "\ufffd" not in text, english
    sentences = [english for english in texts if len(english.split()) > 4]
    assert not [english for english in sentences if texts[english].isascii()], "still English"


def test_generated_files_are_current(root):
    made = {path: text for path, text in files().items() if path.parts[0] == "locales"}
    for path, text in made.items():
        assert (root / path).read_text(encoding="utf-8") == text, "run python -m editkit.locales.build"


def test_a_changed_text_has_no_translation(source, tmp_path, monkeypatch):
    monkeypatch.setattr(translate, "FOLDER", tmp_path)
    (tmp_path / "xx").mkdir()
    (tmp_path / "xx" / "texts.json").write_text('{"before": "vorher"}', encoding="utf-8")
    assert translate.missing({"a": {"b": "after"}}, "xx") == ["after"]
    assert translate.unused({"a": {"b": "after"}}, "xx") == ["before"]
    assert translate.translated({"a": {"b": "before", "c": "after"}}, {"before": "vorher"}) == {
        "a": {"b": "vorher", "c": "after"}
    }
