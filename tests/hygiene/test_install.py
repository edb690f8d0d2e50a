"""The mapping of the repository root to the package `editkit`, installed both ways from a clone of any name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from editkit.tests.hygiene.sources import ROOT, committed

BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
# A site folder runs its .pth files, as a virtual environment's does.
USE = """
import site, sys
site.addsitedir(sys.argv[1])
import importlib.util, json
import editkit, editkit.pipelines.core.errors
print(json.dumps({
    "root": editkit.__path__[0],
    "error": editkit.pipelines.core.errors.EditError.__module__,
    "nodes": importlib.util.find_spec("nodes") is not None,
    "our nodes": importlib.util.find_spec("editkit.nodes") is not None,
    "path": sys.path,
}))
"""


@pytest.fixture(scope="module", params=["EditKit-1", "editkit"])
def clone(request, tmp_path_factory) -> Path:
    """What git would give somebody, in a folder whose name is no module name, or is the package's own."""
    target = tmp_path_factory.mktemp("clone") / request.param
    for path in committed():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return target


def run(arguments: list[str], cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def install(clone: Path, kind: str, site: Path) -> list[str]:
    """Build a wheel of `kind` as pip would and unpack it into `site`; the names in it."""
    wheels = site.with_name("wheels")
    wheels.mkdir()
    name = run(["-c", BUILD, kind, str(wheels)], clone)
    with zipfile.ZipFile(wheels / name) as wheel:
        wheel.extractall(site)
        return wheel.namelist()


def use(site: Path, elsewhere: Path) -> dict:
    import json

    # -S leaves out the environment's own site folder, where an editkit may be installed already.
    return json.loads(run(["-S", "-c", USE, str(site)], elsewhere))


def test_an_editable_install_keeps_the_root_off_the_path(clone, tmp_path):
    install(clone, "build_editable", tmp_path / "site")
    seen = use(tmp_path / "site", tmp_path)
    assert Path(seen["root"]).samefile(clone)
    assert seen["error"] == "editkit.pipelines.core.errors"
    assert seen["our nodes"]
    assert not seen["nodes"]
    assert not any(Path(entry).resolve() == clone.resolve() for entry in seen["path"] if entry)


def test_a_wheel_holds_the_package_with_its_data_and_nothing_else(clone, tmp_path):
    names = install(clone, "build_wheel", tmp_path / "site")
    ours = [name for name in names if ".dist-info/" not in name]
    assert all(name.startswith("editkit/") for name in ours)
    assert not [name for name in ours if name.startswith(("editkit/tests/", "editkit/benchmarks/", "editkit/output/"))]
    data = [
        path.relative_to(ROOT).as_posix() for path in committed() if path.is_relative_to(ROOT / "hosts" / "bundled")
    ]
    assert {f"editkit/{name}" for name in data} <= set(ours)
    seen = use(tmp_path / "site", tmp_path)
    assert Path(seen["root"]).samefile(tmp_path / "site" / "editkit")
    assert not seen["nodes"]
