"""ComfyUI's page in a headless Chromium, for tests: load a workflow, ask the page about it, take a screenshot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-unsafe-swiftshader",
)  # fmt: skip
READY = """() => window.app?.graph && window.app.extensionManager
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50"""
NODES = """() => window.app.graph._nodes.map(node => ({
    id: node.id, type: node.type, title: node.title, known: !!window.LiteGraph.registered_node_types[node.type],
    errors: !!node.has_errors, box: [...node.pos, ...node.size], least: [...node.computeSize()],
    inputs: (node.inputs ?? []).map(input => input.name),
    values: (node.widgets ?? []).filter(w => w.serialize !== false).map(w => w.value)}))"""


def find_chromium() -> str | None:
    """The browser to use: CHROMIUM, or one on the PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


RUN = """timeout => new Promise(resolve => {
    const api = window.app.api, end = reason => setTimeout(() => resolve(reason), 400);
    api.addEventListener("execution_success", () => end(""), {once: true});
    for (const kind of ["execution_error", "execution_interrupted"])
        api.addEventListener(kind, event => end(JSON.stringify(event.detail)), {once: true});
    setTimeout(() => resolve("not finished in time"), timeout);
    const refused = () => { const found = JSON.stringify(window.app.lastNodeErrors ?? {}); found !== "{}" && resolve(found); };
    window.app.queuePrompt(0).then(refused, error => resolve(String(error)));
})"""


class ComfyPage:
    """One open page; a context manager. `errors` holds what went wrong on it, `console` what was logged as an error.

    Args:
        url: a running server's address.    chromium: the browser's program.
        blocked: part of the addresses that the page does not get; "" blocks nothing.
    """

    def __init__(self, url: str, chromium: str, *, blocked: str = "") -> None:
        self.url, self.chromium, self.blocked = url, chromium, blocked
        self._driver: Any = None  # stays None in a sibling, which lives in another page's browser
        self._browser: Any = None
        self.errors: list[str] = []
        self.console: list[str] = []

    def __enter__(self) -> ComfyPage:
        from playwright.sync_api import sync_playwright

        if self._browser is None:
            self._driver = sync_playwright().start()
            self._browser = self._driver.chromium.launch(executable_path=self.chromium, headless=True, args=list(FLAGS))
        self._page = self._browser.new_page(viewport={"width": 1900, "height": 1000})
        self._page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._page.on("console", self._log)
        # the page asks other hosts for templates and versions: refused at once, so that nothing waits for them
        self._page.route(
            "**/*", lambda route: route.continue_() if self._is_allowed(route.request.url) else route.abort()
        )
        self._page.goto(self.url, wait_until="domcontentloaded")
        self._page.wait_for_function(READY, timeout=120_000)
        self._page.wait_for_timeout(1500)  # extensions' setup and the default workflow
        self._page.keyboard.press("Escape")
        return self

    def __exit__(self, *_: object) -> None:
        self._page.close()
        if self._driver is not None:
            self._browser.close()
            self._driver.stop()

    def sibling(self, *, blocked: str = "") -> ComfyPage:
        """Another page in the same browser, to be entered in its turn."""
        other = ComfyPage(self.url, self.chromium, blocked=blocked)
        other._browser = self._browser
        return other

    def _is_allowed(self, url: str) -> bool:
        return url.startswith((self.url, "data:", "blob:")) and not (self.blocked and self.blocked in url)

    def _log(self, message: Any) -> None:
        if message.type == "error":
            self.console.append(f"{message.text} {message.location}")

    @property
    def tab(self) -> Any:
        """Playwright's page, for the mouse and the keyboard."""
        return self._page

    def ask(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript function called in the page with `argument`."""
        return self._page.evaluate(script, argument)

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a UI-format workflow."""
        self.ask("workflow => window.app.loadGraphData(workflow)", workflow)
        self._page.wait_for_timeout(600)

    def nodes(self) -> list[dict[str, Any]]:
        """The loaded workflow's nodes: id, type, whether the page knows the type, box, least size, inputs, values."""
        return self.ask(NODES)

    def prompt(self) -> dict[str, Any]:
        """The loaded workflow in API format, as the page would queue it."""
        return self.ask("async () => (await window.app.graphToPrompt()).output")

    def load_api(self, workflow: Mapping[str, Any]) -> None:
        """Open an API-format workflow; the page lays the nodes out."""
        self.ask("workflow => window.app.loadApiJson(workflow, 'test')", workflow)
        self._page.wait_for_timeout(600)

    def run(self, timeout: float = 120) -> None:
        """Queue the loaded workflow and wait until it has run, every node of it. Raises AssertionError if it fails."""
        # of a node whose result is cached the server sends nothing that the page could show
        self.ask("""() => window.app.api.fetchApi("/free", {method: "POST", body: '{"free_memory": true}',
            headers: {"Content-Type": "application/json"}})""")
        self._page.wait_for_timeout(400)
        failed = self.ask(RUN, 1000 * timeout)
        assert not failed, failed

    def screenshot(self, path: Path) -> None:
        self._page.screenshot(path=path)
