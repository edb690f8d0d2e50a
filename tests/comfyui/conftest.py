"""Tests against a real ComfyUI: COMFYUI_PATH names its checkout, whose requirements this Python must have.

`host/` imports ComfyUI into the process and is therefore run in a child process by test_host.py: its top-level modules
(`nodes`, `comfy`, ...) must not meet the stand-ins that other tests use.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

IN_CHILD = bool(os.environ.get("EDITKIT_HOST_CHILD"))
collect_ignore = [] if IN_CHILD else ["host"]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI checkout; skips where there is none."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set: no ComfyUI to test with")
    return Path(path)
