"""The bundled model and its ranker, loaded once."""

from __future__ import annotations

import pytest

from editkit.hosts.bundled import ranker_folder
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.diffusers.open_clip_ranker import load_ranker


@pytest.fixture(scope="session")
def model():
    return load_bundled()


@pytest.fixture(scope="session")
def ranker():
    return load_ranker(ranker_folder())
