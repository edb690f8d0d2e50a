"""What the pack must never do in a user's process, found in its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from editkit.tests.hygiene.sources import PRODUCT, Source, dotted, report, sources

UNSAFE_MODULES = {"ctypes", "dill", "joblib", "marshal", "multiprocessing", "pickle", "pty", "shelve", "subprocess"}
NETWORK_MODULES = {
    "aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket", "urllib", "websocket",
    "websockets",
}  # fmt: skip
# `editkit run --server URL` talks to the ComfyUI that the user names; nothing else may.
NETWORK_FILE = "headless/server_client.py"

RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
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


def runs_code(source: Source) -> Finding:
    for name, call in source.calls():
        if name in RUNS_CODE or name.startswith(("os.exec", "os.spawn")):
            yield call.lineno, f"calls {name}"
        if name == "torch.load" and not has_true(call, "weights_only"):
            yield call.lineno, "torch.load without weights_only=True runs what is in the file"


def prints(source: Source) -> Finding:
    if not source.path.startswith(("headless/cli", "headless/claims/")):
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
    hosts = {"comfy", "folder_paths", "server", "latent_preview"} | {
        name
        for found in source.imports()
        if found.root.startswith("comfy") and not found.relative
        for name in found.names
    }
    for node in ast.walk(source.tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Attribute) and dotted(target).split(".")[0] in hosts:
                yield node.lineno, f"assigns to {dotted(target)}"
    for name, call in source.calls():
        if name == "setattr" and call.args and dotted(call.args[0]).split(".")[0] in hosts:
            yield call.lineno, f"sets an attribute of {dotted(call.args[0])}"


def has_true(call: ast.Call, name: str) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def is_accelerator(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("cuda", "mps", "xpu"))
    )


RULES = [
    unsafe_imports,
    network,
    runs_code,
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
    ],
)
def test_the_rules_let_pass(rule, code):
    assert not list(rule(Source("pipelines/x.py", code, ast.parse(code))))
