"""What tests of the page's widgets do: write a graph, look at a node, read what would be queued."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from editkit.tests.comfyui.page import ComfyPage

SHOTS = os.environ.get("EDITKIT_SHOTS")  # a folder that gets a screenshot of every widget


def graph(**nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """An API-format workflow; ids are numbers in the page, so nodes are numbered in order."""
    number = {name: str(i) for i, name in enumerate(nodes, 1)}

    def wired(value: Any) -> Any:
        return [number[value[0]], value[1]] if isinstance(value, list) else value

    return {
        number[name]: {"class_type": kind, "inputs": {key: wired(value) for key, value in inputs.items()}}
        for name, (kind, inputs) in nodes.items()
    }


def of_type(page: ComfyPage, kind: str) -> dict[str, Any]:
    """The inputs of the only node of a type in the prompt that the page would queue."""
    (found,) = [node["inputs"] for node in page.prompt().values() if node["class_type"] == kind]
    return found


def focus(page: ComfyPage, kind: str, *, scale: float = 1.0, size: tuple[int, int] | None = None) -> None:
    """Put the node of a type into the upper left of the view, at a zoom."""
    page.ask(
        """([kind, scale, size]) => {
            const node = app.graph._nodes.find(node => node.type === kind);
            if (size) node.setSize(size);
            app.canvas.ds.scale = scale;
            app.canvas.ds.offset = [-node.pos[0] + 120 / scale, -node.pos[1] + 120 / scale];
            app.canvas.setDirty(true, true);
        }""",
        [kind, scale, size],
    )
    page.tab.wait_for_timeout(500)


def node_box(page: ComfyPage, kind: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of a node with its title, in pixels of the window."""
    return tuple(
        page.ask(
            """kind => { const n = app.graph._nodes.find(n => n.type === kind), s = app.canvas.ds;
                const r = app.canvas.canvas.getBoundingClientRect();
                return [r.left + (n.pos[0] + s.offset[0]) * s.scale, r.top + (n.pos[1] + s.offset[1] - 30) * s.scale,
                        n.size[0] * s.scale, (n.size[1] + 30) * s.scale]; }""",
            kind,
        )
    )


def shot(page: ComfyPage, name: str, kind: str) -> None:
    """A picture of one node, where a folder is named."""
    if SHOTS:
        left, top, width, height = node_box(page, kind)
        clip = {"x": left - 8, "y": top - 8, "width": width + 16, "height": height + 16}
        page.tab.screenshot(path=Path(SHOTS) / f"{name}.png", clip=clip)


def undo(page: ComfyPage) -> None:
    page.ask("() => document.activeElement?.blur()")
    page.tab.keyboard.press("Control+z")
    page.tab.wait_for_timeout(500)


def shown_text(page: ComfyPage) -> str:
    """What Preview Any shows after a run."""
    return page.ask(
        "() => app.graph._nodes.find(n => n.type === 'PreviewAny').widgets.find(w => w.name.startsWith('preview')).value"
    )


def survives(page: ComfyPage, kind: str, values: dict[str, Any]) -> None:
    """The node's inputs stay through saving and loading, copying, and the API export that a PNG carries too."""
    assert values.items() <= of_type(page, kind).items()
    page.load(page.ask("() => app.graph.serialize()"))
    assert values.items() <= of_type(page, kind).items()
    copies = page.ask(
        """kind => {
            const node = app.graph._nodes.find(node => node.type === kind);
            app.canvas.selectNode(node); app.canvas.copyToClipboard([node]); app.canvas.pasteFromClipboard();
            const found = app.graph._nodes.filter(node => node.type === kind);
            const values = found.map(n => Object.fromEntries(n.widgets.map(w => [w.name, w.value])));
            const last = found.at(-1); app.graph.remove(last);
            return values;
        }""",
        kind,
    )
    assert len(copies) == 2
    for copied in copies:
        assert values.items() <= copied.items()
    page.load_api(page.prompt())
    assert values.items() <= of_type(page, kind).items()


def inside_its_node(page: ComfyPage, kind: str, part: str) -> None:
    """The widget's parts lie inside the node at half zoom, in a small and in a large node, and go when it is collapsed."""
    for scale, size in ((0.5, (400, 500)), (1.0, (260, 300)), (1.0, (620, 640))):
        focus(page, kind, scale=scale, size=size)
        box = page.tab.locator(part).first.bounding_box()
        assert box is not None, f"{part} is not shown at {scale}"
        left, top, width, height = node_box(page, kind)
        assert left <= box["x"] and box["x"] + box["width"] <= left + width + 1
        assert top <= box["y"] and box["y"] + box["height"] <= top + height + 1
    page.ask("kind => app.graph._nodes.find(node => node.type === kind).collapse()", kind)
    page.tab.wait_for_timeout(300)
    assert not page.tab.locator(part).first.is_visible()
    page.ask("kind => app.graph._nodes.find(node => node.type === kind).collapse()", kind)
    page.tab.wait_for_timeout(300)
    assert page.tab.locator(part).first.is_visible()
