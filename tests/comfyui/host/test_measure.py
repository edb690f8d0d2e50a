"""The measuring node in ComfyUI: its page is previewed and its table shown."""

from __future__ import annotations

import torch

from editkit.hosts.loading import load_bundled_ranker
from editkit.nodes.evaluation.measure import MeasureEdit


def test_the_node() -> None:
    source, mask = torch.full((1, 40, 56, 3), 0.25), torch.zeros(1, 40, 56)
    mask[:, 10:30, 10:30] = 1
    ranker = load_bundled_ranker()
    output = MeasureEdit.execute(source, source + 0.1 * mask[..., None], mask, "a red circle", ranker)
    table, report = output.result
    assert "PSNR inside the mask (dB)\t20.00" in table.splitlines() and "text: cosine" in table
    assert report.shape[0] == 1 and report.device.type == "cpu"
    assert output.ui["text"] == [table] and output.ui["images"]
