"""Whole photographs at their own odd sizes through the nodes in ComfyUI: minutes each, so only when asked for."""

from __future__ import annotations

import os

import pytest
import torch

from editkit.benchmarks.photographs import GAIN, NAMES, RATE, drawn_mask, photograph
from editkit.hosts.bundled import tiny_folder
from editkit.hosts.comfyui.bundled import build_bundled
from editkit.pipelines.evaluation.metrics import psnr_outside
from editkit.tests.nodes.graph import blended_chain, call

pytestmark = pytest.mark.skipif(
    not os.environ.get("EDITKIT_WHOLE_PHOTOGRAPHS"), reason="takes minutes: set EDITKIT_WHOLE_PHOTOGRAPHS=1"
)


@pytest.mark.parametrize("name", NAMES)
def test_whole_photograph(name):
    with torch.inference_mode():
        shipped = build_bundled(tiny_folder())
        image = photograph(name)
        mask = drawn_mask(*image.shape[1:3])
        chain = blended_chain(*shipped, image, mask, "a red circle on a white background", steps=20, copies=1)
        tuned = call("TuneDecoder", vae=shipped[2], latent=chain["edited"], source=image, mask=mask, lr=RATE)
        plain = call("DecodeLatent", latent=chain["edited"], vae=shipped[2])[0]
        result, change = call("CompositeSource", edited=tuned[1], source=image, mask=mask)
    before, after = (float(psnr_outside(result, image, mask)) for result in (plain, tuned[1]))
    print(  # noqa: T201  # the figures are the point of asking for it
        f"{name} {image.shape[2]}x{image.shape[1]}: changed {change}, plain {before:.2f} dB, tuned {after:.2f} dB"
    )
    assert after - before >= GAIN
    assert change == 0 and result.shape == image.shape
    assert torch.equal(result[mask == 0], image[mask == 0])
