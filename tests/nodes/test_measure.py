"""The measuring node on the bundled example: its table and page, with and without mask and text, and its refusals."""

from __future__ import annotations

import pytest
import torch

from editkit.hosts.bundled.example_images import load_example
from editkit.pipelines.core.errors import EditError
from editkit.pipelines.evaluation.report import measure_edit
from editkit.tests.nodes.graph import call


@pytest.fixture(scope="module")
def example():
    return load_example("empty_side")


@pytest.fixture(scope="module")
def ranker():
    return call("LoadRanker", weights="bundled")[0]


def test_the_node_prints_what_was_measured(example, ranker):
    image, mask = example.image, example.mask
    edited = torch.where(mask[..., None] > 0.5, 1 - image, image).repeat(2, 1, 1, 1)
    table, report = call("MeasureEdit", source=image, edited=edited, mask=mask, text=example.prompt, ranker=ranker)
    expected = measure_edit(image, edited, mask=mask, text=example.prompt, ranker=ranker)
    assert table == expected.table() and torch.equal(report, expected.report())
    assert report.shape[0] == 2 and report.shape[-1] == 3
    rows = dict(line.split("\t", 1) for line in table.splitlines())
    assert rows["largest change outside (of 255)"] == "0.00\t0.00\t0.00"
    assert rows["PSNR outside the mask (dB)"] == "100.00\t100.00\t100.00"
    assert float(rows["text: 100 x cosine"].split("\t")[0]) == pytest.approx(
        100 * float(rows["text: cosine"].split("\t")[0]), abs=0.01
    )


def test_mask_and_text_may_be_left_out(example):
    table, report = call("MeasureEdit", source=example.image, edited=example.image)
    assert table.splitlines() == ["measure\timage 1", "PSNR (dB)\t100.00", "SSIM (11 x 11 Gaussian, RGB)\t1.0000"]
    assert report.shape[0] == 1


def test_refusals(example, ranker):
    with pytest.raises(EditError, match="ranker is not connected"):
        call("MeasureEdit", source=example.image, edited=example.image, text="a red ring")
    with pytest.raises(EditError, match="text is empty"):
        call("MeasureEdit", source=example.image, edited=example.image, ranker=ranker)
    with pytest.raises(EditError, match="edited is"):
        call("MeasureEdit", source=example.image, edited=example.image[:, :10])
