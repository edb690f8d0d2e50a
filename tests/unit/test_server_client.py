"""The client against a hostile server on this machine: what it is given, where its answers go, how long it may take."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from editkit.headless import server_client
from editkit.headless.cli import main
from editkit.headless.server_client import Server, images_to_upload, plain, run_on_server, within
from editkit.pipelines.core.errors import EditError, LoadError

WORKFLOW = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}
TRICKLE = 40  # bytes of an answer that never ends; the test is over long before


class Hostile(ThreadingHTTPServer):
    """Answers like ComfyUI, except where `answers` has something else for a path.

    Attributes:
        answers: by path: bytes, a status with bytes and headers, or "trickle".
        images: what the history says was saved.
        seen: path and body of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict = {}
        self.images: list = [{"filename": "r.png", "subfolder": "", "type": "output"}]
        self.seen: list[tuple[str, str, bytes]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str) -> object:
        history = {
            "p": {"status": {"completed": True, "status_str": "success"}, "outputs": {"9": {"images": self.images}}}
        }
        usual = {
            "/upload/image": b'{"name": "a.png"}',
            "/prompt": b'{"prompt_id": "p"}',
            "/history/p": json.dumps(history).encode(),
            "/view": b"pixels",
        }
        return self.answers.get(path, usual.get(path, (404, b"not found", {})))


class Handler(BaseHTTPRequestHandler):
    server: Hostile

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.path, str(self.headers.get("Content-Type")), body))
        answer = self.server.answer(path)
        status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if content == "trickle":
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            for _ in range(TRICKLE):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Hostile]:
    monkeypatch.setattr(server_client, "PAUSE", 0.01)
    made = Hostile()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path) -> Path:
    """An input folder with two images of one name, links in and out, and a private image beside it."""
    made = tmp_path / "input"
    for name in ("a.png", "x/a.png", "note.txt"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (tmp_path / "private.png").write_text("private")
    (made / "out.png").symlink_to(tmp_path / "private.png")
    (made / "in.png").symlink_to(made / "a.png")
    return made


def loading(*names: str, kind: str = "LoadImage", key: str = "image") -> dict:
    return {str(n): {"class_type": kind, "inputs": {key: name}} for n, name in enumerate(names)}


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# -------------------------------------------------------------------------------------------------------------- uploads
def test_a_run_uploads_waits_and_downloads(server, folder, tmp_path):
    assert run_on_server(server.address, WORKFLOW, folder, tmp_path / "out") == [tmp_path / "out" / "r.png"]
    assert (tmp_path / "out" / "r.png").read_bytes() == b"pixels"


def test_two_inputs_of_one_name_keep_their_subfolders(server, folder, tmp_path):
    run_on_server(server.address, loading("a.png", "x/a.png", "in.png"), folder, tmp_path / "out")
    uploaded = set()
    for path, kind, body in server.seen:
        if path == "/upload/image":
            parts = BytesParser(policy=default).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
            fields = {part.get_param("name", header="content-disposition"): part for part in parts.iter_parts()}
            content = fields["image"].get_payload(decode=True)
            uploaded.add((fields["subfolder"].get_content().strip(), fields["image"].get_filename(), content))
    assert uploaded == {("", "a.png", b"a.png"), ("x", "a.png", b"x/a.png"), ("", "in.png", b"a.png")}


@pytest.mark.parametrize("name", ["../private.png", "PRIVATE", "out.png", "x/../../private.png"])
def test_no_file_outside_the_input_folder_is_uploaded(server, folder, tmp_path, name):
    name = str(tmp_path / "private.png") if name == "PRIVATE" else name
    with pytest.raises(LoadError, match="--input"):
        run_on_server(server.address, loading(name), folder, tmp_path / "out")
    assert not server.seen


def test_only_load_image_nodes_name_uploads(folder):
    assert not list(images_to_upload(loading("a.png", kind="CLIPTextEncode", key="text"), folder))
    assert not list(images_to_upload(loading("a.png", kind="LoadImage", key="note"), folder))
    assert not list(images_to_upload(loading("note.txt", "absent.png", "a.png [output]"), folder))
    assert [name for name, _ in images_to_upload(loading("a.png [input]", kind="LoadImageMask"), folder)] == ["a.png"]


# ------------------------------------------------------------------------------------------------------------ downloads
@pytest.mark.parametrize(
    "image",
    [
        {"filename": "../../evil.png", "subfolder": ""},
        {"filename": "/etc/evil.png", "subfolder": ""},
        {"filename": "evil.png", "subfolder": "../.."},
        {"filename": "evil.png", "subfolder": "/etc"},
        {"filename": "..\\..\\evil.png", "subfolder": "..\\x"},
        {"filename": "\x1b]0;evil\x07.png", "subfolder": "\x1b[31m"},
        {"filename": ".hidden.png", "subfolder": ".ssh"},
        {"filename": "e" * 5000 + ".png", "subfolder": "s" * 5000},
    ],
)
def test_a_server_cannot_choose_where_a_download_goes(server, folder, tmp_path, image):
    before = set(written(tmp_path))
    server.images = [{**image, "type": "output"}]
    (saved,) = run_on_server(server.address, WORKFLOW, folder, tmp_path / "out")
    made = set(written(tmp_path)) - before
    assert made == {saved.relative_to(tmp_path).as_posix()} and saved.is_relative_to(tmp_path / "out")
    assert str(saved).isprintable()
    assert not any(part.startswith(".") for part in saved.relative_to(tmp_path).parts)


@pytest.mark.parametrize("name", [".bashrc", "conftest.py", "x", "..", ""])
def test_only_images_are_downloaded(server, folder, tmp_path, name):
    server.images = [{"filename": name, "subfolder": "", "type": "output"}]
    with pytest.raises(EditError, match="no image"):
        run_on_server(server.address, WORKFLOW, folder, tmp_path / "out")


def test_nothing_is_overwritten_and_no_link_is_followed(server, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "r.png").symlink_to(tmp_path / "private.png")
    server.images = [{"filename": "r.png", "subfolder": s, "type": "output"} for s in ("", "a", "b", "a")]
    saved = run_on_server(server.address, WORKFLOW, folder, out)
    assert [path.relative_to(out).as_posix() for path in saved] == ["r (2).png", "a/r.png", "b/r.png", "a/r (2).png"]
    assert (tmp_path / "private.png").read_text() == "private"
    (out / "away").symlink_to(tmp_path)
    server.images = [{"filename": "r.png", "subfolder": "away", "type": "output"}]
    with pytest.raises(EditError, match="link"):
        run_on_server(server.address, WORKFLOW, folder, out)
    assert not (tmp_path / "r.png").exists()


# -------------------------------------------------------------------------------------------------------- size and time
def test_an_answer_without_an_end_is_given_up(server):
    server.answers["/prompt"] = (200, "trickle", {})
    begun = time.monotonic()
    with pytest.raises(EditError, match="did not finish"):
        Server(server.address, seconds=0.5).json("/prompt", {})
    assert time.monotonic() - begun < 3


def test_a_large_answer_is_refused(server):
    server.answers["/view"] = b"x" * 200_000
    with pytest.raises(EditError, match="larger"):
        Server(server.address).content("/view", 100_000)


def test_a_workflow_that_never_ends_is_given_up(server, folder, tmp_path):
    server.answers["/history/p"] = b"{}"
    with pytest.raises(EditError, match="within"):
        run_on_server(server.address, WORKFLOW, folder, tmp_path / "out", timeout=0.2)


def test_what_a_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        within(1.0, lambda: 1 // 0)


# -------------------------------------------------------------------------------------------------------------- answers
def test_redirects_are_not_followed(server, folder, tmp_path):
    other = Hostile()
    server.answers["/prompt"] = (302, b"", {"Location": other.address + "/prompt"})
    with pytest.raises(EditError, match="another address"):
        run_on_server(server.address, WORKFLOW, folder, tmp_path / "out")
    assert not other.seen
    other.server_close()


def test_a_proxy_of_the_environment_is_not_used(server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert run_on_server(server.address, WORKFLOW, folder, tmp_path / "out")


STATUS = b'{"p": {"status": {"completed": true}, "outputs": '


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/prompt", b"<html>hello</html>"),
        ("/prompt", b"{}"),
        ("/prompt", b"[]"),
        ("/prompt", b'{"prompt_id": 3}'),
        ("/prompt", b'{"prompt_id": "../view"}'),
        ("/prompt", b"[" * 100_000),
        ("/prompt", b"\xff"),
        ("/prompt", (500, b"\x1b[31mbroken", {})),
        ("/upload/image", (404, b"", {})),
        ("/history/p", b'{"p": 3}'),
        ("/history/p", b'{"p": {"status": []}}'),
        ("/history/p", STATUS + b"3}}"),
        ("/history/p", STATUS + b'{"9": []}}}'),
        ("/history/p", STATUS + b'{"9": {"images": 3}}}}'),
        ("/history/p", STATUS + b'{"9": {"images": ["x"]}}}}'),
        ("/history/p", STATUS + b'{"9": {"images": [{"filename": 3, "subfolder": "", "type": "output"}]}}}}'),
        (
            "/history/p",
            b'{"p": {"status": {"status_str": "error", "completed": false, "messages": [["execution_error", 3]]}}}',
        ),
        ("/view", (403, b"no", {})),
    ],
)
def test_any_other_answer_is_one_clear_line(server, folder, tmp_path, capsys, path, content):
    server.answers[path] = content
    (tmp_path / "w.json").write_text(json.dumps(WORKFLOW))
    arguments = ["run", str(tmp_path / "w.json"), "--server", server.address, "--input", str(folder)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("editkit: ") and len(message.splitlines()) == 1 and "\x1b" not in message
    assert not written(tmp_path / "out")


def test_the_servers_reasons_are_shown_without_escape_sequences(server, folder, tmp_path):
    problem = {"message": "\x1b[2Jbad \u202evalue", "details": "in\nput"}
    reply = {"node_errors": {"3": {"class_type": "X", "errors": [problem]}}}
    server.answers["/prompt"] = (400, json.dumps(reply).encode(), {})
    with pytest.raises(EditError, match=r"node 3 \(X\): .*bad") as refusal:
        run_on_server(server.address, WORKFLOW, folder, tmp_path / "out")
    assert str(refusal.value).isprintable() and len(plain("x" * 10_000)) < 1000


def test_no_server_is_one_clear_line(folder, tmp_path):
    with pytest.raises(LoadError, match="no ComfyUI answers"):
        run_on_server("http://127.0.0.1:9", WORKFLOW, folder, tmp_path / "out")
