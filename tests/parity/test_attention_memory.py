"""An attention edit holds little more than its rows do without one, where whole maps would be many times that."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from editkit.benchmarks.attention_cost import passes_per_call, peaks, seconds, work_on
from editkit.benchmarks.memory import LiveBytes
from editkit.tests.parity.tiny import randomise


def narrow() -> UNet2DConditionModel:
    """Stable Diffusion 1's blocks, a twentieth as wide."""
    model = UNet2DConditionModel(
        sample_size=32,
        cross_attention_dim=16,
        attention_head_dim=4,
        block_out_channels=(32, 32, 64, 64),
        norm_num_groups=8,
    )
    return randomise(model)  # type: ignore[return-value]


def test_an_edit_holds_at_most_a_tenth_more_than_its_rows():
    found = peaks(work_on(narrow(), 16, width=16))
    assert found["plain sampling"] <= found["P2Plus"] <= 1.10 * found["plain sampling"]
    assert found["published loop"] > 5 * found["plain sampling"]


def test_rows_of_the_timed_edit():
    calls, ours, floor = seconds(work_on(narrow(), 8, width=16), 1)
    assert calls == [4, 3, 3, 3, 2] and ours > 0 and floor > 0
    assert passes_per_call(work_on(narrow(), 8, width=16), lambda: None) == []


def test_live_bytes_are_those_of_tensors_that_live():
    held = torch.ones(1000)
    with LiveBytes() as live:
        a = held * 2
        b = a.view(10, 100)
        del a
        c = b + 1
        del b, c
        held.add_(1)
        d = held * 3
    assert live.peak == 8000 and live.now == 4000 and len(d) == 1000
