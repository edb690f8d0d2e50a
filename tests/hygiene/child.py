"""A fresh Python with the package registered: what importing does can only be seen where nothing is imported yet."""

from __future__ import annotations

import os
import subprocess
import sys

from editkit.tests.hygiene.sources import ROOT

# What conftest.py does for this process. Byte code is written, as for a user, so that a second start is a warm one.
REGISTER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("editkit", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
editkit = importlib.util.module_from_spec(spec)
sys.modules["editkit"] = editkit
def register():
    spec.loader.exec_module(editkit)
"""


# Without byte code every start would compile the sources anew, which an installed package does once.
IGNORED = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}


def run_python(code: str, *, cwd: str | os.PathLike[str] | None = None, timeout: float = 300) -> str:
    """Standard output of `code` in a new interpreter without our folder on its path; its traceback fails the test."""
    environment = {key: value for key, value in os.environ.items() if key not in IGNORED}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REGISTER + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
