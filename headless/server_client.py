"""Run a workflow on a ComfyUI server that the user names. No other module opens a connection."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pipelines.core.errors import EditError, LoadError
from ..pipelines.core.progress import Progress, silent

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def run_on_server(
    server: str,
    workflow: Mapping[str, Any],
    inputs: Path,
    output: Path,
    progress: Progress = silent,
    timeout: float = 3600,
) -> list[Path]:
    """Upload the images that the workflow names, queue it, wait, and download the images that it saved.

    Args:
        server: for example http://127.0.0.1:8188.
        workflow: in API format.
        inputs: the folder that Load Image nodes read here.
        output: the folder for the downloads, made if it does not exist.
        progress: called once, at the end.
        timeout: seconds to wait for the end.

    Returns: the downloaded files.

    Raises: LoadError where no server answers; EditError with the server's message where it refuses or fails.
    """
    base = server if "://" in server else f"http://{server}"
    base = base.rstrip("/")
    prompt = workflow.get("prompt", workflow)
    _upload_inputs(base, prompt, inputs)
    reply = _json(base, "/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
    history = _wait(base, reply["prompt_id"], len(prompt), progress, timeout)
    return _download(base, history, output)


def _open(base: str, path: str, data: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    request = urllib.request.Request(base + path, data=data, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise EditError(f"the server refused {path}: {_refusal(error.read())}") from error
    except (urllib.error.URLError, OSError) as error:
        raise LoadError(f"no ComfyUI answers at {base} ({error}): start it, or give another --server") from error


def _refusal(body: bytes) -> str:
    try:
        reply = json.loads(body)
        problems = [
            f"node {name} ({node['class_type']}): {problem['message']} {problem.get('details', '')}"
            for name, node in (reply.get("node_errors") or {}).items()
            for problem in node["errors"]
        ]
        return "; ".join(problems) or str(reply["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]


def _json(base: str, path: str, value: Any = None) -> Any:
    data = None if value is None else json.dumps(value).encode()
    return json.loads(_open(base, path, data, {"Content-Type": "application/json"}))


def _upload_inputs(base: str, prompt: Mapping[str, Any], folder: Path) -> None:
    names = {
        value
        for node in prompt.values()
        for value in node.get("inputs", {}).values()
        if isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES) and (folder / value).is_file()
    }
    for name in sorted(names):
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}\r\n'
            f'Content-Disposition: form-data; name="image"; filename="{Path(name).name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + (folder / name).read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        _open(base, "/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def _wait(base: str, prompt_id: str, nodes: int, progress: Progress, timeout: float) -> Mapping[str, Any]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        history = _json(base, f"/history/{prompt_id}").get(prompt_id)
        if history and history.get("status", {}).get("completed") is not None:
            if history["status"].get("status_str") == "error":
                raise EditError(f"the server could not finish the workflow: {_failure(history)}")
            progress(nodes, nodes)
            return history
        time.sleep(0.5)
    raise EditError(f"the server did not finish within {timeout:.0f} s")


def _failure(history: Mapping[str, Any]) -> str:
    for kind, detail in history["status"].get("messages", []):
        if kind == "execution_error":
            return f"node {detail.get('node_id')} ({detail.get('node_type')}): {detail.get('exception_message', '').strip()}"
    return "see the server's log"


def _download(base: str, history: Mapping[str, Any], output: Path) -> list[Path]:
    saved = []
    for result in history.get("outputs", {}).values():
        for image in result.get("images", []):
            if image.get("type") != "output":
                continue
            query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
            output.mkdir(parents=True, exist_ok=True)
            path = output / Path(image["filename"]).name
            path.write_bytes(_open(base, f"/view?{query}"))
            saved.append(path)
    return saved
