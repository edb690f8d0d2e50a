"""What the pack must never do in a user's process, found in its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from editkit.tests.hygiene.sources import PRODUCT, Source, report, sources

UNSAFE_MODULES = {
    "builtins", "code", "codeop", "ctypes", "dill", "imp", "joblib", "marshal", "multiprocessing", "pickle", "pty", "runpy",
    "shelve", "subprocess",
}  # fmt: skip
NETWORK_MODULES = {
    "aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket", "urllib", "websocket",
    "websockets",
}  # fmt: skip
# `editkit run --server URL` talks to the ComfyUI that the user names; nothing else may.
NETWORK_FILE = "headless/server_client.py"

# Whatever fetches a file, wherever it is imported from.
DOWNLOADS = {
    "cached_download", "download_url_to_file", "hf_hub_download", "load_state_dict_from_url", "snapshot_download", "urlopen",
    "urlretrieve",
}  # fmt: skip
DOWNLOAD_MODULES = ("torch.hub", "torch.utils.model_zoo")

RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
IMPORTS = {"importlib.import_module", "importlib.reload", "importlib.util.spec_from_file_location"}
# Import our own modules by relative names.
IMPORTING_FILES = {"pipelines/core/lazy.py", "headless/claims/registry.py"}
HOSTS = {
    "PIL", "comfy", "comfy_api", "comfy_execution", "diffusers", "execution", "folder_paths", "latent_preview", "numpy",
    "open_clip", "safetensors", "server", "torch", "transformers",
}  # fmt: skip
SWITCHES = ("torch.backends.",)  # restored where they are set; tests/laws/test_learning.py
GLOBAL_RNG = {
    "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.manual_seed", "torch.rand_like", "torch.randint_like",
    "torch.randn_like", "torch.random.manual_seed", "torch.seed", "torch.set_rng_state",
}  # fmt: skip
NEEDS_GENERATOR = {
    "torch.bernoulli", "torch.multinomial", "torch.normal", "torch.rand", "torch.randint", "torch.randn", "torch.randperm",
}  # fmt: skip
RNG_MODULES = ("random.", "np.random.", "numpy.random.")
# Makes a generator of its own and leaves the global one alone.
LOCAL_RNG = {"np.random.default_rng", "numpy.random.default_rng"}
FACTOR_OPERATORS = (ast.Mult, ast.FloorDiv, ast.Div, ast.Mod)

Finding = Iterator[tuple[int, str]]


def unsafe_imports(source: Source) -> Finding:
    for found in source.imports():
        if not found.relative and found.root in UNSAFE_MODULES:
            yield found.line, f"imports {found.module}"
        if not found.relative and found.names == ("*",):
            yield found.line, f"imports everything of {found.module}"


def network(source: Source) -> Finding:
    if source.path != NETWORK_FILE:
        for found in source.imports():
            if not found.relative and found.root in NETWORK_MODULES:
                yield found.line, f"imports {found.module}"
    for name, call in source.calls():
        if name.endswith(".from_pretrained") and not has_true(call, "local_files_only"):
            yield call.lineno, "from_pretrained without local_files_only=True may ask a hub"
    for name, node, _ in source.names():
        if name.rpartition(".")[2] in DOWNLOADS or f"{name}.".startswith(tuple(f"{m}." for m in DOWNLOAD_MODULES)):
            yield line_of(node), f"{name} downloads"


def runs_code(source: Source) -> Finding:
    for name, node, call in source.names():
        if name.removeprefix("builtins.") in RUNS_CODE or name.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
            yield line_of(node), f"names {name}"
        if name == "torch.load" and not (call and has_true(call, "weights_only")):
            yield line_of(node), "torch.load without weights_only=True runs what is in the file"
    for _, call in source.calls():
        if any(k.arg == "allow_pickle" and not is_false(k.value) for k in call.keywords):
            yield call.lineno, "allow_pickle runs what is in the file"


def imports_by_name(source: Source) -> Finding:
    """A module imported by a function escapes the rules on imports."""
    for name, node, call in source.names():
        if name in IMPORTS and (source.path not in IMPORTING_FILES or call is None or absolute(call)):
            yield line_of(node), f"{name} of anything but an own module"


def absolute(call: ast.Call) -> bool:
    """Whether a call of import_module may import something that is not below a given package."""
    first = call.args[0]
    return len(call.args) < 2 or (isinstance(first, ast.Constant) and not str(first.value).startswith("."))


def prints(source: Source) -> Finding:
    if not source.path.startswith(("headless/cli", "headless/batch/command", "headless/claims/")):
        yield from ((call.lineno, "prints") for name, call in source.calls() if name in {"print", "pprint.pprint"})


def asserts(source: Source) -> Finding:
    """Gone under `python -O`, and no message for a user: raise an EditError."""
    yield from ((node.lineno, "asserts") for node in ast.walk(source.tree) if isinstance(node, ast.Assert))


def global_randomness(source: Source) -> Finding:
    for name, call in source.calls():
        if name in GLOBAL_RNG or (name.startswith(RNG_MODULES) and not (name in LOCAL_RNG and call.args)):
            yield call.lineno, f"{name} draws from or sets a global generator"
        if name in NEEDS_GENERATOR and not any(keyword.arg == "generator" for keyword in call.keywords):
            yield call.lineno, f"{name} without generator="
        if name.endswith((".normal_", ".uniform_", ".random_")) and not any(
            k.arg == "generator" for k in call.keywords
        ):
            yield call.lineno, f"{name} without generator="


def fixed_device(source: Source) -> Finding:
    for name, call in source.calls():
        if name.endswith((".cuda", ".mps")) and not name.startswith("torch."):
            yield call.lineno, f"calls {name}(): move to the model's device"
        places = [*call.args, *(k.value for k in call.keywords if k.arg == "device")]
        if name.endswith(".to") or any(k.arg == "device" for k in call.keywords):
            yield from ((call.lineno, f"names the device {p.value!r}") for p in places if is_accelerator(p))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda:"):
            yield node.lineno, f"names the device {node.value!r}"


def literal_factor(source: Source) -> Finding:
    """The VAE knows how many pixels a latent pixel has; it is not always 8."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, FACTOR_OPERATORS):
            if any(isinstance(side, ast.Constant) and side.value == 8 for side in (node.left, node.right)):
                yield node.lineno, "computes with a literal 8: ask the codec for its factor"


def host_patches(source: Source) -> Finding:
    """Assigning to something of the host changes it for every other pack."""

    def of_host(node: ast.AST) -> bool:
        name = source.full(node)
        imported = {alias.split(".")[0] for alias in source.aliases.values()} | {f.root for f in source.imports()}
        return name.split(".")[0] in HOSTS & imported and not name.startswith(SWITCHES)

    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and of_host(node):
            yield node.lineno, f"assigns to {source.full(node)}"
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and of_host(node.value):
            yield node.lineno, f"assigns to an entry of {source.full(node.value)}"
    for name, call in source.calls():
        if name in ("setattr", "delattr") and call.args and of_host(call.args[0]):
            yield call.lineno, f"sets an attribute of {source.full(call.args[0])}"


def has_true(call: ast.Call, name: str) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def line_of(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def is_accelerator(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("cuda", "mps", "xpu"))
    )


RULES = [
    unsafe_imports,
    network,
    runs_code,
    imports_by_name,
    prints,
    asserts,
    global_randomness,
    fixed_device,
    literal_factor,
    host_patches,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_pack_never(rule: Callable[[Source], Finding]):
    report([f"{source.path}:{line} {what}" for source in sources(*PRODUCT) for line, what in rule(source)])


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (unsafe_imports, "import pickle"),
        (unsafe_imports, "def f():\n    from subprocess import run"),
        (unsafe_imports, "from torch import *"),
        (network, "import urllib.request"),
        (network, "def f(c): return c.from_pretrained('x')"),
        (network, "c.from_pretrained('x', local_files_only=False)"),
        (runs_code, "eval('1')"),
        (runs_code, "torch.load('x.pt')"),
        (runs_code, "os.execv('x', [])"),
        (runs_code, "from torch import load\nload('x.pt')"),
        (runs_code, "import torch as t\nt.load('x.pt')"),
        (runs_code, "read = torch.load"),
        (runs_code, "import numpy as np\nnp.load('x', allow_pickle=True)"),
        (runs_code, "run = eval"),
        (runs_code, "map(exec, lines)"),
        (runs_code, "from os import system\nsystem('x')"),
        (unsafe_imports, "import builtins\nbuiltins.eval('1')"),
        (imports_by_name, "import importlib\nimportlib.import_module('requests')"),
        (imports_by_name, "from importlib import import_module as get\nget('requests', 'editkit')"),
        (network, "torch.hub.load('x', 'y')"),
        (network, "from torch.hub import load_state_dict_from_url as get\nget('x')"),
        (network, "from diffusers.utils import hf_hub_download\nhf_hub_download('x')"),
        (prints, "print(1)"),
        (asserts, "assert x"),
        (global_randomness, "torch.manual_seed(0)"),
        (global_randomness, "torch.randn(3)"),
        (global_randomness, "torch.randn_like(x)"),
        (global_randomness, "x.normal_()"),
        (global_randomness, "np.random.rand(3)"),
        (global_randomness, "rng = np.random.default_rng()"),
        (fixed_device, "x.cuda()"),
        (fixed_device, "x.to('cuda')"),
        (fixed_device, "torch.zeros(1, device='cuda')"),
        (fixed_device, "d = 'cuda:0'"),
        (literal_factor, "h = height // 8"),
        (literal_factor, "h = 8 * height"),
        (host_patches, "import comfy.lora\ncomfy.lora.f = g"),
        (host_patches, "from comfy import samplers\nsamplers.KSAMPLER.sample = g"),
        (host_patches, "from comfy import samplers\nsetattr(samplers, 'x', 1)"),
        (host_patches, "import comfy.samplers as samplers\nsamplers.KSAMPLER = g"),
        (host_patches, "import comfy.samplers as s\ns.KSAMPLER.sample, x = g, 1"),
        (host_patches, "import comfy.samplers as s\ns.SCHEDULERS['x'] = g"),
        (host_patches, "import torch\ntorch.nn.Module.forward = g"),
        (host_patches, "from diffusers.models import attention_processor as a\ndel a.Attention.forward"),
    ],
)
def test_the_rules_notice(rule, code):
    assert list(rule(Source("pipelines/x.py", code, ast.parse(code))))


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (runs_code, "model.eval()"),
        (runs_code, "torch.load('x', weights_only=True)"),
        (network, "c.from_pretrained('x', local_files_only=True)"),
        (global_randomness, "torch.randn(3, generator=torch.Generator().manual_seed(1))"),
        (global_randomness, "rng = np.random.default_rng([1, seed])"),
        (fixed_device, "if x.device.type == 'cuda': torch.cuda.empty_cache()"),
        (fixed_device, "d = torch.device('cuda') if torch.cuda.is_available() else torch.device('cpu')"),
        (literal_factor, "h = height // factor + 8"),
        (host_patches, "self.comfy = 1"),
        (host_patches, "import torch\ntorch.backends.cudnn.deterministic = True"),
        (host_patches, "server = find()\nserver.url = 1"),
        (runs_code, "np.load('x', allow_pickle=False)"),
        (runs_code, "from torch import load\nload('x', weights_only=True)"),
        (network, "hub = 1"),
    ],
)
def test_the_rules_let_pass(rule, code):
    assert not list(rule(Source("pipelines/x.py", code, ast.parse(code))))
