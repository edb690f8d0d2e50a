"""SDXL's empty negative prompt: zeros where the folder asks for them, as diffusers' pipeline takes them."""

from __future__ import annotations

import json

import pytest
import torch

from editkit.headless.stock_nodes import STOCK_NODES
from editkit.hosts.diffusers.loading import load_bundled
from editkit.hosts.diffusers.loading.text import zeros_for_empty_prompt
from editkit.hosts.diffusers.text_encoder import ClipTextEncoder, ClipTower
from editkit.pipelines.blended.pipeline import EditSettings, edit_latents


class Tower(ClipTower):
    def encode(self, text):
        return torch.full((1, 77, 4), 1.0 + len(text)), torch.full((1, 3), 2.0 + len(text))


def encoder(**options) -> ClipTextEncoder:
    return ClipTextEncoder([Tower(None, torch.nn.Identity()), Tower(None, torch.nn.Identity())], **options)


def test_an_empty_negative_is_zeros_where_the_folder_asks_for_it():
    found = encoder(zeros_for_empty=True).encode_negative("")
    assert found.tokens.shape == (1, 77, 8) and not found.tokens.any() and not found.pooled.any()
    for text, options in (("blurry", {"zeros_for_empty": True}), ("", {})):
        found, plain = encoder(**options).encode_negative(text), encoder().encode(text)
        assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.pooled, plain.pooled)
    assert encoder(zeros_for_empty=True).encode("").tokens.all(), "a positive prompt is encoded"


@pytest.mark.parametrize("value, expected", [(True, True), (False, False), (None, False)])
def test_model_index_decides(tmp_path, value, expected):
    assert not zeros_for_empty_prompt(tmp_path)
    fields = {} if value is None else {"force_zeros_for_empty_prompt": value}
    (tmp_path / "model_index.json").write_text(json.dumps(fields))
    assert zeros_for_empty_prompt(tmp_path) is expected


def test_an_edit_encodes_its_negative_as_one():
    model, asked = load_bundled(), []
    model.text.encode_negative = lambda text: asked.append(text) or model.text.encode(text)
    image = torch.full((1, 32, 32, 3), 0.5)
    settings = EditSettings(steps=1, candidates=1)
    edit_latents(model.denoiser, model.codec, model.text, image, image[..., 0] * 2, "a red circle", settings=settings)
    assert asked == [""]


def test_the_native_node_for_zeros_runs_headless():
    tokens, pooled = torch.ones(1, 77, 8), torch.ones(1, 3)
    ((found, extras),) = STOCK_NODES["ConditioningZeroOut"](None, [[tokens, {"pooled_output": pooled, "other": 1}]])[0]
    assert not found.any() and not extras["pooled_output"].any() and extras["other"] == 1
    ((found, extras),) = STOCK_NODES["ConditioningZeroOut"](None, [[tokens, {}]])[0]
    assert not found.any() and extras == {}
