"""Image towers as sequences of tokens: what their own pooling makes of the same tokens is the towers' answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from editkit.hosts.diffusers.image_encoder import load_vision_tokens
from editkit.hosts.diffusers.open_clip_ranker import OpenClipRanker, load_bundled_ranker
from editkit.pipelines.core.errors import FamilyError, LoadError
from editkit.pipelines.core.protocols import ImageEncoder

IMAGE = torch.rand(2, 40, 56, 3, generator=torch.Generator().manual_seed(0))


def test_the_bundled_ranker_gives_what_its_attention_pool_reads():
    ranker = load_bundled_ranker()
    tokens = ranker.image_tokens(IMAGE)
    assert isinstance(ranker, ImageEncoder) and tokens.shape == (2, 10, 320) and not tokens.requires_grad
    assert torch.allclose(tokens[:, 0], tokens[:, 1:].mean(1), atol=1e-5)
    pool = ranker.model.visual.attnpool
    pooled = pool(tokens[:, 1:].transpose(1, 2).reshape(2, 320, 3, 3))
    assert torch.allclose(F.normalize(pooled, dim=-1), ranker.embed_images(IMAGE), atol=1e-5)


@pytest.fixture(scope="module")
def vit() -> OpenClipRanker:
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(
            embed_dim=6,
            vision_cfg={"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32},
            text_cfg={"context_length": 8, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
        )
    return OpenClipRanker(model.eval().requires_grad_(False), None, (32, 32))


def test_a_vision_transformer_gives_all_tokens_after_the_last_norm(vit):
    tokens = vit.image_tokens(IMAGE)
    assert tokens.shape == (2, 1 + 16, 16)
    projected = F.normalize(tokens[:, 0] @ vit.model.visual.proj, dim=-1)
    assert torch.allclose(projected, vit.embed_images(IMAGE), atol=1e-5)
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 17), atol=1e-5)  # a norm with its first weights


def test_another_tower_is_refused_by_name(vit):
    class Other(torch.nn.Module):
        pass

    ranker = OpenClipRanker(torch.nn.Linear(1, 1), None, (32, 32))
    ranker.model.visual = Other()
    with pytest.raises(FamilyError, match="Other"):
        ranker.image_tokens(IMAGE)


def test_transformers_tower_from_a_folder(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = load_vision_tokens(tmp_path)
    tokens = encoder.image_tokens(IMAGE)
    images = encoder.processor(images=list(IMAGE.numpy()), return_tensors="pt", do_rescale=False)["pixel_values"]
    with torch.no_grad():
        pooled = model(images).pooler_output
    assert tokens.shape == (2, 17, 16) and torch.allclose(tokens[:, 0], pooled, atol=1e-5)
    with pytest.raises(LoadError, match="CLIP vision model"):
        load_vision_tokens(tmp_path / "missing")
