"""The pack in a real server: it loads without a word, and every node is described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editkit.tests.comfyui.server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfy"), ROOT) as server:
        yield server


def test_pack_loads_without_a_warning(server: ComfyServer) -> None:
    lines = [line for line in server.log.splitlines() if "editkit" in line.lower() or "EditKit" in line]
    wrong = [line for line in lines if "IMPORT FAILED" in line or "WARN" in line.upper() or "ERROR" in line.upper()]
    assert not wrong, "\n".join(wrong)
    assert "IMPORT FAILED" not in server.log
    assert "Error while calling comfy_entrypoint" not in server.log


def test_every_node_is_listed_with_tooltips(server: ComfyServer) -> None:
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("EditKit_")}
    assert "EditKit_BlendedDenoise" in nodes
    for name, info in nodes.items():
        assert info["display_name"], name
        assert info["description"], name
        assert all(info["output_tooltips"]), name
        for group in info["input"].values():
            for socket, spec in group.items():
                assert spec[1].get("tooltip"), f"{name}.{socket}"
