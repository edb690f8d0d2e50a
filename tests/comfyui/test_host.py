"""Runs `host/` (ComfyUI inside the process) in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def test_adapters_in_comfyui(comfyui: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "EDITKIT_HOST_CHILD": "1", "COMFYUI_PATH": str(comfyui), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE / "host"), "-q", "-c", str(ROOT / "pyproject.toml")]
    # from an empty folder: `-m pytest` puts the current one on sys.path
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
