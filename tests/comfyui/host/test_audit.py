"""What nodes do in ComfyUI's process, seen by the interpreter's audit hook (tests/hygiene/watch.py) while every node runs.

No socket, process, foreign code, pickled class, or file written outside ComfyUI's output and temp folders. Afterwards
ComfyUI's modules, the state of the interpreter, and the MODEL, CLIP and VAE are compared with before.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.model_management as management
import folder_paths
import pytest
import torch
from torch import nn

from editkit.tests.comfyui.host.families import FAMILIES, Family
from editkit.tests.comfyui.host.recipes import RECIPES
from editkit.tests.comfyui.host.scene import Scene
from editkit.tests.comfyui.host.tiny import digest, same_weights
from editkit.tests.hygiene.sources import PRODUCT, ROOT, report
from editkit.tests.nodes.graph import call

FLOW = {"EditKit_FlowInversion", "EditKit_FlowInversionEdit"}  # they need a flow model
COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "weight_function",
    "bias_function",
)


class BundledScene(Scene):
    """The bundled model instead of a random one."""

    def __init__(self) -> None:
        model, clip, vae = call("LoadModel", model="bundled")
        super().__init__(Family(lambda: model, lambda: clip, 4, "bundled"))
        self.vae = vae

    def sampled(self, *given: Any, **named: Any) -> None:
        with torch.random.fork_rng(devices=[]):  # ComfyUI's own samplers seed the global generator
            super().sampled(*given, **named)

    def guided(self, *given: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            super().guided(*given)


def networks(scene: Scene) -> dict[str, nn.Module]:
    return {
        "MODEL": scene.model.model,
        "CLIP": scene.clip.cond_stage_model,
        "VAE": scene.vae.first_stage_model,
        "ranker": scene.ranker._ranker.model,
    }


def attributes(network: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by name: methods set on it, hooks, and what its weights are, beside their numbers."""
    found = {}
    for name, part in network.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers"):
                found.update({f"{name}.{inner}": kept(tensor) for inner, tensor in value.items() if tensor is not None})
            elif key in HOOKS:
                found.update({f"{name}.{key}": list(value)} if value else {})  # ComfyUI leaves empty ones itself
            elif callable(value):
                found[f"{name}.{key}"] = value
    return found


def kept(tensor: torch.Tensor) -> list:
    """ComfyUI makes new parameters of weights that it patched and gives back."""
    return [type(tensor), tensor.dtype, tensor.shape, tensor.device, tensor.requires_grad, tensor.is_inference()]


def patches(scene: Scene) -> str:
    """Everything that nodes may attach to a MODEL, a CLIP or a VAE."""
    patchers = [scene.model, scene.clip.patcher, scene.vae.patcher]
    tables = ("patches", "object_patches", "model_options", "wrappers", "callbacks", "attachments", "injections")
    return repr([[(name, getattr(patcher, name, None)) for name in tables] for patcher in patchers])


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The watch of tests/hygiene, which also compares ComfyUI's modules here."""
    spec = importlib.util.spec_from_file_location("editkit_watch", ROOT / "tests" / "hygiene" / "watch.py")
    assert spec and spec.loader
    watch: Any = importlib.util.module_from_spec(spec)
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("OUT", "IN")}
    own = [os.path.realpath(ROOT / folder) for folder in PRODUCT]
    vars(watch).update(folders, ROOT=str(ROOT), OWN=own, register=lambda: None)
    spec.loader.exec_module(watch)
    host = os.path.realpath(os.environ["COMFYUI_PATH"])
    watch.HOSTS.update(COMFYUI)
    watch.INSTALLED.append(host)
    watch.READABLE.append(host)
    return watch


@pytest.fixture(autouse=True)
def _folders(watch: Any) -> Iterator[None]:
    """ComfyUI's own output and temp folders, inside the folder that may be written."""
    before = folder_paths.get_output_directory(), folder_paths.get_temp_directory()
    folder_paths.set_output_directory(watch.OUT)
    folder_paths.set_temp_directory(str(Path(watch.OUT) / "temp"))
    yield
    folder_paths.set_output_directory(before[0])
    folder_paths.set_temp_directory(before[1])


def run_all() -> SimpleNamespace:
    """Run every node, flow nodes on a random SD3; what was made, by which the comparison goes on."""
    scene, flow = BundledScene(), Scene(FAMILIES["SD3"])
    made = SimpleNamespace(scene=scene, attributes={}, weights={}, patches=patches(scene))
    for name, network in networks(scene).items():
        made.attributes[name], made.weights[name] = attributes(network), digest(network)
    for node, recipe in RECIPES.items():
        recipe(flow if node in FLOW else scene)
    return made


def test_nodes_leave_nothing_but_their_output(watch: Any) -> None:
    for name in ("diffusers", "transformers", "open_clip", "PIL.Image"):
        importlib.import_module(name)  # what a library does when it is imported is its own
    torch.optim.Adam([torch.zeros(1)])  # the first one of a process wraps its `step` for the profiler
    watch.start()
    made = run_all()
    found = watch.found()
    management.unload_all_models()
    for name, network in networks(made.scene).items():
        before, now = made.attributes[name], attributes(network)
        for key in dict(chain(before.items(), now.items())):
            if key not in before or key not in now or not same(before[key], now[key]):
                found.append(f"{key} of the {name} changed")
        if not same_weights(network, made.weights[name]):
            found.append(f"weights of the {name} changed")
    if patches(made.scene) != made.patches:
        found.append(f"patches: {made.patches} became {patches(made.scene)}")
    report(found)
    assert list(Path(watch.OUT).rglob("*.safetensors"))


def same(before: Any, now: Any) -> bool:
    return now is before or (isinstance(before, list) and before == now)


ESCAPES = {
    "importlib.import_module('socket').create_connection(('127.0.0.1', 9))": "socket.connect",
    "importlib.import_module('subprocess').run(['true'])": "subprocess.Popen",
    "p = importlib.import_module('pickle'); p.loads(p.dumps(OSError))": "pickle.find_class",
    "Path('evil.txt').write_text('x')": "writes",
    "own('run = eval; run(\"1 + 1\")')": "runs text",
    "import comfy.samplers; comfy.samplers.calc_cond_batch = print": "comfy.samplers.calc_cond_batch was replaced",
    "import comfy.sd; comfy.sd.VAE.decode = print": "comfy.sd.VAE.decode was replaced",
    "import torch; torch.manual_seed(3)": "random numbers",
}


def test_the_watch_sees(watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.samplers
    import comfy.sd

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", comfy.samplers.calc_cond_batch)  # put back afterwards
    monkeypatch.setattr(comfy.sd.VAE, "decode", comfy.sd.VAE.decode)
    with torch.random.fork_rng(devices=[]):
        watch.start()
        for code in ESCAPES:
            with suppress(OSError):
                exec(code, vars(watch))
        found = " ".join(watch.found())
    assert [word for word in ESCAPES.values() if word not in found] == []
