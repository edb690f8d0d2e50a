"""A real ComfyUI server for tests: start it with this repository as a custom node, run workflows over HTTP, stop it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

READY_SECONDS = 600
FOLDERS = ("custom_nodes", "input", "output", "temp", "user/default/workflows", "models")
# a profile that has been opened before: a new one covers the page with a template browser, and the page of 1.27 throws
# while it derives the mouse settings from the navigation mode
SETTINGS = {
    "Comfy.InstalledVersion": "1.27.10",
    "Comfy.TutorialCompleted": True,
    "Comfy.Canvas.NavigationMode": "standard",
    "Comfy.Canvas.LeftMouseClickBehavior": "select",
    "Comfy.Canvas.MouseWheelScroll": "panning",
    "Comfy.Minimap.Visible": False,
}


class WorkflowError(AssertionError):
    """A workflow that the server refused or that failed; the message has the server's reasons."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """ComfyUI on the CPU with `pack` as its only custom node; a context manager.

    Args:
        comfyui: ComfyUI's checkout.   base: an empty folder for its inputs, outputs and log.
        pack: the custom node's folder (linked, not copied).   flags: more arguments for main.py.
    """

    def __init__(
        self, comfyui: Path, base: Path, pack: Path, *, flags: tuple[str, ...] = (), python: str | None = None
    ):
        self.comfyui, self.base, self.pack, self.flags = comfyui, base, pack, flags
        self.python = python or os.environ.get("COMFYUI_PYTHON", sys.executable)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log_path = base / "comfy.log"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        """Start and wait until it answers. Raises RuntimeError with the end of the log if it does not."""
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / "editkit"
        if not link.exists():
            link.symlink_to(self.pack, target_is_directory=True)
        (self.base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
        command = [self.python, "-u", "main.py", "--cpu", "--listen", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1]]
        command += ["--base-directory", str(self.base), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--database-url", f"sqlite:///{self.base}/user/comfyui.db", *self.flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start; the end of its log:\n{self.log[-4000:]}")

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def request(self, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, data=data, headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def post(self, path: str, body: Any) -> Any:
        return json.loads(
            self.request(path, json.dumps(body).encode(), {"Content-Type": "application/json"}) or b"null"
        )

    def upload(self, path: Path, name: str | None = None) -> str:
        """Put an image into the server's input folder; returns its name there."""
        target = self.base / "input" / (name or path.name)
        target.write_bytes(path.read_bytes())
        return target.name

    def submit(self, workflow: dict[str, Any]) -> str:
        """Queue an API-format workflow; returns its prompt id. Raises WorkflowError if it is not accepted."""
        try:
            answer = self.post("/prompt", {"prompt": workflow, "client_id": uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            raise WorkflowError(error.read().decode(errors="replace")) from error
        if answer.get("node_errors"):
            raise WorkflowError(json.dumps(answer["node_errors"], indent=1))
        return answer["prompt_id"]

    def result(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """Wait for a queued workflow; its outputs by node id. Raises WorkflowError if it failed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry["status"].get("completed"):
                return entry["outputs"]
            if entry is not None:
                messages = [detail for kind, detail in entry["status"]["messages"] if kind == "execution_error"]
                raise WorkflowError("\n".join(_reason(detail) for detail in messages) or json.dumps(entry["status"]))
            time.sleep(0.2)
        raise WorkflowError(f"the workflow took longer than {timeout:.0f} s; the end of the log:\n{self.log[-2000:]}")

    def run(self, workflow: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue an API-format workflow and wait for its outputs."""
        return self.result(self.submit(workflow), timeout)

    def interrupt(self) -> None:
        self.request("/interrupt", b"{}", {"Content-Type": "application/json"})

    def image(self, entry: dict[str, str]) -> bytes:
        """The file behind one entry of an output's `images`."""
        return self.request("/view?" + urllib.parse.urlencode(entry))


def _reason(detail: dict[str, Any]) -> str:
    trace = "".join(detail.get("traceback", []))
    return f"{detail.get('node_type')}: {detail.get('exception_type')}: {detail.get('exception_message')}\n{trace}"
