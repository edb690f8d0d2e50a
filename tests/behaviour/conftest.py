"""The bundled model and its ranker, loaded once."""

from __future__ import annotations

import pytest

from editkit.pipelines.backends.folder import load_bundled
from editkit.pipelines.backends.openclip import load_ranker
from editkit.pipelines.bundled import ranker_folder


@pytest.fixture(scope="session")
def model():
    return load_bundled()


@pytest.fixture(scope="session")
def ranker():
    return load_ranker(ranker_folder())
