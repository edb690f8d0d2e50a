"""Run a workflow on a ComfyUI server that the user names. No other module opens a connection.

The server is not trusted. It receives the images that Load Image nodes name below the input folder, and no other file.
What it answers is bounded in size and time, checked before it is used, and written under names that are made here.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import requests

from ..hosts.files import save_new
from ..pipelines.core.errors import EditError, LoadError
from ..pipelines.core.progress import Progress, silent
from .runner import check_workflow

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RESULT_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".tif", ".tiff")
LOADERS = ("LoadImage", "LoadImageMask")
LARGEST_REPLY = 64 * 2**20  # bytes of a JSON answer
LARGEST_IMAGE = 512 * 2**20  # bytes of a result
MOST_RESULTS = 10_000
FIELDS = ("filename", "subfolder", "type")  # of a result
LONGEST_MESSAGE = 500  # characters of the server's text that are shown
PAUSE = 0.5  # seconds between two questions whether the workflow is done

T = TypeVar("T")


def run_on_server(
    server: str,
    workflow: Mapping[str, Any],
    inputs: Path,
    output: Path,
    progress: Progress = silent,
    timeout: float = 3600,
) -> list[Path]:
    """Upload the images that Load Image nodes name, queue the workflow, wait, and download the images that it saved.

    Args:
        server: for example http://127.0.0.1:8188.
        workflow: in API format.
        inputs: the folder that Load Image nodes read here. Nothing outside it is uploaded.
        output: the folder for the downloads, made if it does not exist. No file in it is overwritten.
        progress: called once, at the end.
        timeout: seconds to wait for the end.
    Returns: the downloaded files.
    Raises: LoadError for a malformed workflow, a file outside the folder, and where no server answers; EditError with
        the server's message where it refuses, fails, or answers what ComfyUI never does.
    """
    prompt = check_workflow(workflow)
    uploads = list(images_to_upload(prompt, inputs))
    connection = Server(_address(server))
    for name, path in uploads:
        connection.upload(name, path)
    reply = connection.json("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
    prompt_id = reply.get("prompt_id")
    if not isinstance(prompt_id, str) or not re.fullmatch(r"[\w-]{1,100}", prompt_id):
        raise nonsense("/prompt")
    outputs = _wait(connection, prompt_id, timeout)
    saved = [_download(connection, image, output) for image in _saved_images(outputs)]
    progress(len(prompt), len(prompt))
    return saved


# ---------------------------------------------------------------------------------------------------------- connection
def _address(server: str) -> str:
    base = (server if "://" in server else f"http://{server}").rstrip("/")
    try:
        parts = urlsplit(base)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise LoadError(f"--server is {server!r}: give an address such as http://127.0.0.1:8188")
    return base


@dataclass
class Server:
    """A ComfyUI server. Redirects, proxies and credentials of the environment are not followed.

    Attributes:
        base: the address, without a slash at the end.
        seconds: limit for one whole answer.
        session: keeps the connection open.
    """

    base: str
    seconds: float = 120.0
    session: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        self.session.trust_env = False
        self.session.headers["Accept-Encoding"] = "identity"

    def json(self, path: str, value: Any = None) -> Mapping[str, Any]:
        """The JSON object at `path`; a `value` is posted. Raises EditError for any other answer."""
        try:
            reply = json.loads(self.content(path, LARGEST_REPLY, json=value))
        except (ValueError, RecursionError) as error:
            if isinstance(error, EditError):
                raise
            raise nonsense(path) from error
        if not isinstance(reply, Mapping):
            raise nonsense(path)
        return reply

    def upload(self, name: str, path: Path) -> None:
        """Put an image into the server's input folder, under the same name and subfolder."""
        place = PurePosixPath(name)
        subfolder = "" if place.parent == PurePosixPath() else str(place.parent)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LoadError(f"image {name!r} cannot be read ({error})") from error
        fields = {"overwrite": "true", "type": "input", "subfolder": subfolder}
        self.content("/upload/image", LARGEST_REPLY, files={"image": (place.name, content)}, data=fields)

    def content(self, path: str, largest: int, **posted: Any) -> bytes:
        """The answer at `path`; `posted` are contents for `requests`. Raises LoadError, EditError."""
        method = "POST" if any(value is not None for value in posted.values()) else "GET"
        try:
            status, body = within(self.seconds, lambda: self._exchange(method, path, largest, posted))
        except WaitTimeout as error:
            raise EditError(
                f"the server did not finish its answer to {_where(path)} in {self.seconds:.0f} s"
            ) from error
        except requests.RequestException as error:
            raise LoadError(
                f"no ComfyUI answers at {self.base} ({plain(str(error))}): start it, or give another --server"
            ) from error
        if 300 <= status < 400:
            raise EditError(f"the server sends {_where(path)} to another address, which is not followed: name that one")
        if status != 200:
            raise EditError(f"the server refused {_where(path)} ({status}): {_refusal(body)}")
        return body

    def _exchange(self, method: str, path: str, largest: int, posted: Mapping[str, Any]) -> tuple[int, bytes]:
        deadline = time.monotonic() + self.seconds
        with self.session.request(
            method, self.base + path, timeout=(10, self.seconds), allow_redirects=False, stream=True, **posted
        ) as answer:
            chunks, size = [], 0
            for chunk in answer.iter_content(2**16):
                size += len(chunk)
                if size > largest:
                    raise EditError(f"the server's answer to {_where(path)} is larger than {largest // 2**20} MB")
                if time.monotonic() > deadline:
                    break  # nobody waits for it any more
                chunks.append(chunk)
            return answer.status_code, b"".join(chunks)


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or `concurrent.futures.TimeoutError`. A server may send one byte at a time without an end."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001  # raised again where the result is asked for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)


# ------------------------------------------------------------------------------------------------------ what it answers
def plain(text: str) -> str:
    """Text of the server for the terminal: no escape sequences, no line breaks, not endless."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:LONGEST_MESSAGE]).strip()


def nonsense(path: str) -> EditError:
    return EditError(f"the answer to {_where(path)} is none of ComfyUI's: is another program running at that address?")


def _where(path: str) -> str:
    return path.partition("?")[0]


def _refusal(body: bytes) -> str:
    """The server's reason, in one line."""
    try:
        reply = json.loads(body)
        problems = [
            f"node {name} ({node['class_type']}): {problem['message']} {problem.get('details', '')}"
            for name, node in (reply.get("node_errors") or {}).items()
            for problem in node["errors"]
        ]
        return plain("; ".join(problems) or str(reply["error"]["message"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return plain(body.decode(errors="replace"))


def _wait(connection: Server, prompt_id: str, timeout: float) -> Mapping[str, Any]:
    """The outputs of a finished workflow, by node."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = f"/history/{quote(prompt_id, safe='')}"
        history = connection.json(path).get(prompt_id)
        if history is not None:
            if not isinstance(history, Mapping) or not isinstance(history.get("status", {}), Mapping):
                raise nonsense(path)
            status, outputs = history.get("status", {}), history.get("outputs", {})
            if status.get("status_str") == "error":
                raise EditError(f"the server could not finish the workflow: {_failure(status)}")
            if status.get("completed") is not None:
                if not isinstance(outputs, Mapping):
                    raise nonsense(path)
                return outputs
        time.sleep(PAUSE)
    raise EditError(f"the server did not finish within {timeout:.0f} s")


def _failure(status: Mapping[str, Any]) -> str:
    messages = status.get("messages")
    for entry in messages if isinstance(messages, list) else ():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == "execution_error" and isinstance(entry[1], dict):
            detail = entry[1]
            return plain(f"node {detail.get('node_id')} ({detail.get('node_type')}): {detail.get('exception_message')}")
    return "see the server's log"


def _saved_images(outputs: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name, subfolder and type of every image in the server's output folder."""
    found: list[dict[str, str]] = []
    for result in outputs.values():
        images = result.get("images", []) if isinstance(result, Mapping) else None
        if not isinstance(images, list):
            raise nonsense("/history")
        for image in images:
            fields = {key: image[key] for key in FIELDS if key in image} if isinstance(image, dict) else {}
            if len(fields) < len(FIELDS) or not all(isinstance(value, str) for value in fields.values()):
                raise nonsense("/history")
            if fields["type"] == "output":
                found.append(fields)
    if len(found) > MOST_RESULTS:
        raise EditError(f"the server names {len(found)} results, at most {MOST_RESULTS} are downloaded")
    return found


# ---------------------------------------------------------------------------------------------------------------- files
def images_to_upload(prompt: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every image that a Load Image node names. Raises LoadError for a file outside `folder`.

    A name that is no file here is left to the server, which may have it.
    """
    root = folder.resolve()
    named = {
        str(node["inputs"].get("image")).removesuffix(" [input]")
        for node in prompt.values()
        if node["class_type"] in LOADERS and isinstance(node["inputs"].get("image"), str)
    }
    for name in sorted(named):
        try:
            path = (root / name).resolve()
            present = path.is_file()
        except (OSError, ValueError, RuntimeError):
            continue
        if not path.is_relative_to(root):
            raise LoadError(f"image {name!r} is not in {folder}: only files below it are uploaded, see --input")
        if present and path.suffix.lower() in IMAGE_SUFFIXES:
            yield Path(os.path.normpath(name)).as_posix(), path


def _download(connection: Server, image: Mapping[str, str], output: Path) -> Path:
    """Write one result below `output`, in a subfolder as on the server, under a name that no file has."""
    name = _safe(image["filename"].replace("\\", "/").rpartition("/")[2])
    if not name.lower().endswith(RESULT_SUFFIXES):
        raise EditError(f"the server names a result {plain(image['filename'])!r}, which is no image")
    folder = output.joinpath(
        *(_safe(part) for part in re.split(r"[/\\]", image["subfolder"]) if part not in ("", ".", ".."))
    )
    content = connection.content("/view?" + "&".join(f"{key}={quote(image[key])}" for key in image), LARGEST_IMAGE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.resolve().is_relative_to(output.resolve()):
            raise EditError(f"{folder} is a link out of {output}: results are not written through it")
        return save_new(folder / name, lambda path: path.write_bytes(content))
    except OSError as error:
        raise EditError(f"{folder / name} cannot be written ({error})") from error


def _safe(part: str) -> str:
    """A name of a file or folder that every system takes, that is not hidden and has no signs for a terminal."""
    return re.sub(r"[^\w .()+\-\[\]]", "_", part[-100:]).lstrip(". ") or "_"
