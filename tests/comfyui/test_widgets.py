"""EditKit's widgets in ComfyUI's page, in a headless Chromium, by mouse and keyboard.

Needs what test_pages.py needs. A widget only writes ordinary inputs, so each test ends at the prompt that the page queues.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editkit.tests.comfyui.page import ComfyPage, find_chromium
from editkit.tests.comfyui.server import ComfyServer
from editkit.tests.comfyui.widget_steps import focus, graph, inside_its_node, of_type, shot, shown_text, survives, undo
from editkit.tests.workflows import shipped

COLOURS = {"red": 0xE03030, "green": 0x30C030, "blue": 0x3030E0}


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), shipped.ROOT) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> str:
    pytest.importorskip("playwright", reason="playwright is not installed: no page to test with")
    found = find_chromium()
    if not found:
        pytest.skip("no Chromium on the PATH, and CHROMIUM is not set: no page to test with")
    return found


@pytest.fixture(scope="module")
def page(server: ComfyServer, chromium: str) -> Iterator[ComfyPage]:
    with ComfyPage(server.url, chromium) as page:
        yield page
    assert not page.errors
    assert not [line for line in page.console if "editkit" in line.lower()]


# ------------------------------------------------------------------------------------------------------- rank gallery
def candidates() -> dict[str, Any]:
    """Three coloured squares, ranked by a text."""
    flat = {"width": 96, "height": 96, "batch_size": 1}
    return graph(
        example=("EditKit_LoadExample", {"name": "one_object"}),
        red=("EmptyImage", {**flat, "color": COLOURS["red"]}),
        blue=("EmptyImage", {**flat, "color": COLOURS["blue"]}),
        two=("ImageBatch", {"image1": ["red", 0], "image2": ["example", 0]}),
        three=("ImageBatch", {"image1": ["two", 0], "image2": ["blue", 0]}),
        ranker=("EditKit_LoadRanker", {}),
        rank=(
            "EditKit_RankByText",
            {
                "images": ["three", 0],
                "ranker": ["ranker", 0],
                "text": "a red circle",
                "region": "masked",
                "keep": 1,
                "mask": ["example", 1],
            },
        ),
        order=("PreviewAny", {"source": ["rank", 3]}),
    )


def test_rank_gallery_pins_a_candidate(page: ComfyPage) -> None:
    kind = "EditKit_RankByText"
    page.load_api(candidates())
    assert of_type(page, kind)["pick"] == -1
    page.run()
    focus(page, kind)
    cards = page.tab.locator(".ek-card")
    order = [int(cards.nth(i).get_attribute("data-index")) for i in range(cards.count())]
    assert sorted(order) == [0, 1, 2] and shown_text(page) == str(order[0])
    shot(page, "gallery", kind)
    cards.nth(2).click()
    page.tab.wait_for_timeout(300)
    assert of_type(page, kind)["pick"] == order[2] == int(cards.first.get_attribute("data-index"))
    page.run()
    assert shown_text(page) == str(order[2])
    shot(page, "gallery_picked", kind)
    cards.first.focus()
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_timeout(300)
    assert of_type(page, kind)["pick"] == order[0]
    undo(page)
    assert of_type(page, kind)["pick"] == order[2]
    survives(page, kind, {"pick": order[2]})


def test_rank_gallery_at_any_size_and_zoom(page: ComfyPage) -> None:
    kind = "EditKit_RankByText"
    page.load_api(candidates())
    page.run()
    inside_its_node(page, kind, ".ek-card")
    assert page.tab.locator(".ek-card").first.is_visible()


# --------------------------------------------------------------------------------------------------- before and after
def composite() -> dict[str, Any]:
    flat = {"width": 96, "height": 96, "batch_size": 1, "color": COLOURS["green"]}
    return graph(
        example=("EditKit_LoadExample", {"name": "red_circle"}),
        edit=("EmptyImage", flat),
        whole=("EditKit_CompositeSource", {"edited": ["edit", 0], "source": ["example", 0], "mask": ["example", 1], "feather": 0}),
        save=("PreviewImage", {"images": ["whole", 0]}),
    )  # fmt: skip


def test_before_and_after_slides_by_mouse_and_keyboard(page: ComfyPage) -> None:
    kind = "EditKit_CompositeSource"
    page.load_api(composite())
    before = page.prompt()
    page.run()
    focus(page, kind)
    shot(page, "compare", kind)
    knob, stage = page.tab.locator(".ek-knob"), page.tab.locator(".ek-stage").bounding_box()
    middle = stage["y"] + stage["height"] / 2

    def share() -> float:
        box = knob.bounding_box()
        return (box["x"] + box["width"] / 2 - stage["x"]) / stage["width"]

    assert share() == pytest.approx(0.5, abs=0.02)
    page.tab.mouse.move(stage["x"] + 0.5 * stage["width"], middle)
    page.tab.mouse.down()
    page.tab.mouse.move(stage["x"] + 0.25 * stage["width"], middle, steps=4)
    page.tab.mouse.up()
    assert share() == pytest.approx(0.25, abs=0.02)
    for _ in range(10):
        page.tab.keyboard.press("ArrowRight")
    assert share() == pytest.approx(0.35, abs=0.02)
    page.tab.get_by_role("button", name="Outside").click()
    assert page.tab.locator(".ek-stage img").count() == 1
    shot(page, "compare_difference", kind)
    assert page.prompt() == before
    inside_its_node(page, kind, ".ek-stage")


# ---------------------------------------------------------------------------------------------------------- word chips
def prompts(**inputs: Any) -> dict[str, Any]:
    texts = {"source_text": "a red circle on a gray background", "target_text": "a yellow star on a gray background"}
    values = {"mode": "auto", "weights": "", "windows": "", "blend_words": "", "keep_words": "", "legacy_tail": False}
    return graph(
        load=("EditKit_LoadModel", {"model": "bundled"}),
        align=("EditKit_AlignPrompts", {"clip": ["load", 1], **texts, **values, **inputs}),
        report=("PreviewAny", {"source": ["align", 2]}),
    )


def chip(page: ComfyPage, key: str) -> Any:
    return page.tab.locator(f'[data-ek="{key}"]')


def test_word_chips_edit_the_inputs(page: ComfyPage) -> None:
    kind = "EditKit_AlignPrompts"
    page.load_api(prompts())
    focus(page, kind)
    assert page.tab.locator(".ek-replaced").count() == 2
    chip(page, "target 2").click()
    assert of_type(page, kind)["blend_words"] == "star"
    chip(page, "source 2").click()
    assert of_type(page, kind)["blend_words"] == "star, circle"
    chip(page, "target 6").click()
    chip(page, "target 6").click()
    assert of_type(page, kind)["keep_words"] == "background"
    box = chip(page, "target 1").bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.tab.mouse.wheel(0, -100)
    page.tab.wait_for_timeout(300)
    page.tab.mouse.wheel(0, -100)
    page.tab.wait_for_timeout(300)
    assert of_type(page, kind)["weights"] == "yellow: 1.2"
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] / 2 + 30, box["y"] + box["height"] / 2, steps=5)
    page.tab.mouse.up()
    assert of_type(page, kind)["weights"] == "yellow: 1.7"
    page.tab.keyboard.press("ArrowDown")
    assert of_type(page, kind)["weights"] == "yellow: 1.6"
    end = chip(page, "last 2").bounding_box()
    track = page.tab.locator(".ek-range").nth(2).bounding_box()
    page.tab.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2)
    page.tab.mouse.down()
    page.tab.mouse.move(track["x"] + track["width"] / 2, end["y"], steps=5)
    page.tab.mouse.up()
    assert of_type(page, kind)["windows"] == "star: 0-0.5"
    page.tab.keyboard.press("ArrowLeft")
    assert of_type(page, kind)["windows"] == "star: 0-0.45"
    shot(page, "words", kind)
    undo(page)
    assert of_type(page, kind)["windows"] == "star: 0-0.5"
    page.run()
    told = shown_text(page)
    assert "target star: 0-0.5, may change" in told and "target yellow: x1.6" in told
    survives(page, kind, {"weights": "yellow: 1.6", "windows": "star: 0-0.5", "keep_words": "background"})
    inside_its_node(page, kind, ".ek-chip")


# --------------------------------------------------------------------------------------------------------- mask strip
def dilation(image: str) -> dict[str, Any]:
    values = {"kernels": "7,5,3,1", "scale_with_size": False, "invert": False, "published_rule": False}
    return graph(
        image=("LoadImage", {"image": image}),
        vae=("EditKit_LoadModel", {"model": "bundled"}),
        mask=("EditKit_LatentMask", {"mask": ["image", 1], "vae": ["vae", 2], "mode": "max", "threshold": 0.5}),
        schedule=("EditKit_DilationSchedule", {"latent_mask": ["mask", 0], **values}),
        shown=("PreviewImage", {"images": ["schedule", 1]}),
    )


def marked(page: ComfyPage) -> list[int]:
    """How many latent pixels of each stage are marked in the strip."""
    return page.ask("""() => [...document.querySelectorAll(".ek-tile canvas")].map(canvas => {
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, i) => i % 4 === 0 && value > 127).length; })""")


def test_mask_strip_follows_the_inputs_and_sets_shares(page: ComfyPage, server: ComfyServer, tmp_path: Path) -> None:
    from PIL import Image

    kind = "EditKit_DilationSchedule"
    painted = Image.new("RGBA", (128, 96), (90, 140, 200, 255))
    painted.paste((0, 0, 0, 0), (56, 40, 72, 56))  # what the mask editor leaves: transparent where it was painted
    painted.save(tmp_path / "painted.png")
    page.load_api(dilation(server.upload(tmp_path / "painted.png")))
    focus(page, kind)
    assert marked(page) == [64, 36, 16, 4]  # before any run
    page.ask("() => app.graph._nodes.find(n => n.widgets?.some(w => w.name === 'kernels')).widgets[0].value = '3,1'")
    page.tab.wait_for_timeout(500)
    assert marked(page) == [16, 4]
    page.ask(
        "() => app.graph._nodes.find(n => n.widgets?.some(w => w.name === 'kernels')).widgets[0].value = '7,5,3,1'"
    )
    page.run()
    page.tab.wait_for_timeout(300)
    assert marked(page) == [64, 36, 16, 4]
    track, knob = page.tab.locator(".ek-track").bounding_box(), page.tab.locator(".ek-track i").first.bounding_box()
    middle = knob["y"] + knob["height"] / 2
    page.tab.mouse.move(knob["x"] + knob["width"] / 2, middle)
    page.tab.mouse.down()
    page.tab.mouse.move(track["x"] + 0.4 * track["width"], middle, steps=4)
    page.tab.mouse.up()
    assert of_type(page, kind)["shares"] == "40,10,25,25"
    page.tab.keyboard.press("ArrowRight")
    assert of_type(page, kind)["shares"] == "45,5,25,25"
    shot(page, "masks", kind)
    undo(page)
    assert of_type(page, kind)["shares"] == "40,10,25,25"
    page.run()
    survives(page, kind, {"shares": "40,10,25,25"})
    inside_its_node(page, kind, ".ek-track")


# ----------------------------------------------------------------------------------------------------- learning, live
def decoder(steps: int) -> dict[str, Any]:
    values = {
        "steps": steps,
        "lr": 1e-4,
        "background_weight": 100.0,
        "patience": 0,
        "last_blocks": 0,
        "low_memory": False,
    }
    example = {"source": ["example", 0], "mask": ["example", 1]}
    return graph(
        load=("EditKit_LoadModel", {"model": "bundled"}),
        example=("EditKit_LoadExample", {"name": "red_circle"}),
        latent=("EditKit_EncodeImage", {"image": ["example", 0], "vae": ["load", 2]}),
        tune=("EditKit_TuneDecoder", {"vae": ["load", 2], "latent": ["latent", 0], **example, **values}),
        report=("PreviewAny", {"source": ["tune", 3]}),
        shown=("PreviewImage", {"images": ["tune", 1]}),
    )


def test_a_learning_is_shown_and_stopped_by_its_button(page: ComfyPage) -> None:
    kind = "EditKit_TuneDecoder"
    page.load_api(decoder(2000))
    focus(page, kind)
    chart = page.tab.locator(".ek-chart")
    assert not chart.count()
    page.ask("() => { window.ended = false; app.api.addEventListener('execution_success', () => { window.ended = true; },"
             " {once: true}); app.queuePrompt(0); }")  # fmt: skip
    chart.wait_for(timeout=60_000)
    page.tab.wait_for_timeout(1500)
    assert len(page.tab.locator(".ek-chart polyline").get_attribute("points").split()) > 2
    shot(page, "learning", kind)
    page.tab.get_by_role("button", name="Stop here and keep").click()
    page.tab.wait_for_function("() => window.ended", timeout=60_000)
    page.tab.wait_for_timeout(500)
    assert "stopped early" in shown_text(page)
    assert not chart.count()


# ---------------------------------------------------------------------------------------------------- attention maps
def test_attention_maps_show_and_pick_words(page: ComfyPage) -> None:
    kind = "EditKit_AttentionMaps"
    workflow = prompts()
    wires = {"model": ["1", 0], "edit": ["2", 0], "latent": ["5", 0], "sigmas": ["6", 0], "image": ["4", 0]}
    values = {"prompt": "source", "words": "red, circle, background", "levels": 2, "start": 0.0, "end": 1.0}
    values |= {"layers": "all", "grid": 0, "seed": 1}
    more = {
        "4": {"class_type": "EditKit_LoadExample", "inputs": {"name": "red_circle"}},
        "5": {"class_type": "EditKit_EncodeImage", "inputs": {"image": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "EditKit_EditSigmas", "inputs": {"model": ["1", 0], "steps": 4, "strength": 0.8}},
        "7": {
            "class_type": kind,
            "inputs": {**wires, **values},
        },
        "8": {"class_type": "MaskPreview", "inputs": {"mask": ["7", 2]}},
    }
    page.load_api({**workflow, **more})
    page.run()
    focus(page, kind, size=(340, 700))
    words, image = page.tab.locator('[data-ek^="map "]'), page.tab.locator(".ek-stage img")
    assert words.count() == 3
    first = image.get_attribute("src")
    words.nth(1).hover()
    assert image.get_attribute("src") != first
    words.nth(1).click()
    page.tab.wait_for_timeout(300)
    assert of_type(page, kind)["picked"] == "circle"
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_timeout(300)
    assert of_type(page, kind)["picked"] == "circle, background"
    shot(page, "maps", kind)
    undo(page)
    assert of_type(page, kind)["picked"] == "circle"
    page.run()
    inside_its_node(page, kind, ".ek-stage")
    survives(page, kind, {"picked": "circle"})


# ------------------------------------------------------------------------------------------------- without the script
def test_a_workflow_runs_alike_without_the_script(page: ComfyPage) -> None:
    workflow = candidates()
    workflow["7"]["inputs"]["pick"] = 1
    page.load_api(workflow)
    with_script, saved = page.prompt(), page.ask("() => app.graph.serialize()")
    page.run()
    told = shown_text(page)
    with page.sibling(blocked="/editkit/js/") as plain:
        plain.load(saved)
        assert plain.prompt() == with_script
        plain.run()
        assert shown_text(plain) == told == "1"
        assert not plain.tab.locator(".editkit").count() and not plain.errors


def test_the_script_loads_fast(page: ComfyPage) -> None:
    """Every module but the entry fetched, parsed and run anew; the best of fifteen, as other work slows the machine."""
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        pytest.skip("other work keeps this machine busy: a time in milliseconds says nothing")
    with page.sibling() as other:
        other.tab.unroute_all()  # each request would pass through this process
        took = other.ask("""async () => {
            const at = (await (await fetch("/extensions")).json()).filter(name => name.includes("/editkit/js/")
                && !name.endsWith("/editkit.js"));
            const times = [];
            for (let i = 0; i < 15; i++) {
                const begin = performance.now();
                await Promise.all(at.map(name => import(`${name}?${i}`)));
                times.push(performance.now() - begin);
            }
            return [at.length, Math.min(...times)]; }""")
    assert took[0] > 8
    assert took[1] < 50, took
