"""The ranker over open_clip: a small model saved and read back, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from editkit.hosts.diffusers.open_clip_ranker import CLIP_MEAN, CLIP_STD, OpenClipRanker, load_open_clip, load_ranker
from editkit.pipelines.core.errors import FamilyError, LoadError
from editkit.pipelines.core.protocols import Ranker
from editkit.pipelines.evaluation.clip_ranking import rank_by_text
from editkit.tests.toy_codec import random_image

open_clip = pytest.importorskip("open_clip")

SIZE = 32
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {
    "size": [SIZE, SIZE],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def write(folder: Path, config: dict | None = None, *, drop: str | None = None) -> Path:
    """A folder in open_clip's layout with random weights."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = CLIP(**MODEL).state_dict()
    save_file({k: v.contiguous() for k, v in state.items() if k != drop}, folder / "open_clip_model.safetensors")
    text = json.dumps(config or {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("ranker"))


@pytest.fixture(scope="module")
def ranker(folder) -> OpenClipRanker:
    return load_ranker(folder)


def test_embeddings_are_open_clips_own(folder, ranker):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.SimpleTokenizer()
    images = random_image(3, SIZE, SIZE)
    normal = (images.movedim(-1, 1) - torch.tensor(PREPROCESS["mean"])[:, None, None]) / torch.tensor(
        PREPROCESS["std"]
    )[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(ranker.embed_images(images), model.encode_image(normal, normalize=True))
        texts = ["a red circle", "two cats"]
        torch.testing.assert_close(ranker.embed_texts(texts), model.encode_text(tokens(texts), normalize=True))
    assert isinstance(ranker, Ranker)
    assert not any(p.requires_grad for p in ranker.model.parameters())


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    load_ranker(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_loaded_under_inference_mode_it_still_works(folder):
    with torch.inference_mode():
        ranking = rank_by_text(random_image(2, 20, 30), "a cat", load_ranker(folder))
    assert ranking.order.numel() == 2


class Spy(torch.nn.Module):
    """Stands for the model and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode_image(self, images):
        self.seen = images
        return images.flatten(1)


@pytest.mark.parametrize(("height", "width"), [(48, 32), (20, 50), (32, 32)])
def test_resize_modes(height, width):
    image, model = random_image(1, height, width), Spy()
    planes = image.movedim(-1, 1)

    def seen(mode: str) -> torch.Tensor:
        OpenClipRanker(model, None, (16, 16), (0.0,) * 3, (1.0,) * 3, "bicubic", mode).embed_images(image)
        return model.seen

    def resized(h: int, w: int) -> torch.Tensor:
        return F.interpolate(planes, (h, w), mode="bicubic", antialias=True).clamp(0, 1)

    torch.testing.assert_close(seen("squash"), resized(16, 16))
    big = 16 / min(height, width)
    whole = resized(round(height * big), round(width * big))
    assert seen("shortest").shape == (1, 3, 16, 16)
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1)  # [1, 3, rows, columns, 16, 16]
    middle = windows[:, :, windows.shape[2] // 2, windows.shape[3] // 2]
    torch.testing.assert_close(seen("shortest"), middle)
    small = 16 / max(height, width)
    inner = resized(round(height * small), round(width * small))
    bars = seen("longest")
    assert bars.shape == (1, 3, 16, 16)
    assert float(bars.sum()) == pytest.approx(float(inner.sum()), rel=1e-4)


def test_normalisation_comes_after_the_resize():
    image, model = torch.full((1, 16, 16, 3), 0.25), Spy()
    OpenClipRanker(model, None, (16, 16)).embed_images(image)
    want = (0.25 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(model.seen[0, :, 3, 5], want)


def test_compact_embeddings_are_expanded(tmp_path):
    """A folder with token_ids.json holds only those rows."""
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    config = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "vocab_size": 49408}}
    torch.manual_seed(0)
    full = CustomTextCLIP(**config).eval()
    tokens = open_clip.SimpleTokenizer()
    ids = sorted({49406, 49407, 0, *tokens.encode("a red circle")})
    state = dict(full.state_dict())
    state["text.token_embedding.weight"] = state["text.token_embedding.weight"][ids]
    save_file({k: v.half().contiguous() for k, v in state.items()}, tmp_path / "open_clip_model.safetensors")
    saved = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": PREPROCESS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(saved), encoding="utf-8")
    (tmp_path / "token_ids.json").write_text(json.dumps(ids), encoding="utf-8")
    ranker = load_ranker(tmp_path)
    with torch.no_grad():
        want = full.encode_text(tokens(["a red circle"]), normalize=True)
    torch.testing.assert_close(ranker.embed_texts(["a red circle"]), want, atol=2e-3, rtol=0)
    assert all(p.dtype == torch.float32 for p in ranker.model.parameters())


def test_a_library_architecture_reads_a_local_file(folder, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: MODEL if name == "Tiny" else None)
    loaded = load_open_clip("Tiny", folder / "open_clip_model.safetensors")
    assert loaded.size == (SIZE, SIZE)
    assert loaded.mean == CLIP_MEAN
    torch.save(loaded.model.state_dict(), plain := folder / "plain.pt")
    again = load_open_clip("Tiny", plain)
    texts = ["a cat", "a dog"]
    torch.testing.assert_close(again.embed_texts(texts), loaded.embed_texts(texts))


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_could_run_code_are_refused(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: MODEL)
    torch.save({"weight": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(LoadError, match="convert it to safetensors"):
        load_open_clip("Tiny", tmp_path / "bad.pt")
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    with pytest.raises(LoadError, match=r"bad\.safetensors"):
        load_open_clip("Tiny", tmp_path / "bad.safetensors")


def test_names_and_networks_are_refused(folder, tmp_path):
    weights = folder / "open_clip_model.safetensors"
    with pytest.raises(LoadError, match=r"not a file.*downloads nothing"):
        load_open_clip("ViT-B-16", "laion2b_s34b_b88k")
    with pytest.raises(LoadError, match="network"):
        load_open_clip("hf-hub:some/model", weights)
    with pytest.raises(LoadError, match=r"knows no architecture 'ViT-Z-99'.*ViT"):
        load_open_clip("ViT-Z-99", weights)
    with pytest.raises(FamilyError, match="tokenizer"):
        load_open_clip("ViT-B-16-SigLIP", weights)
    with pytest.raises(LoadError, match="cannot be read"):
        load_ranker(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}), encoding="utf-8")
    with pytest.raises(LoadError, match="has none of"):
        load_ranker(empty)


def test_weights_of_another_model_are_refused(tmp_path):
    with pytest.raises(LoadError, match=r"do not fit.*1 names differ.*ln_final.weight"):
        load_ranker(write(tmp_path, drop="ln_final.weight"))
    wider = {**MODEL, "embed_dim": 24}
    with pytest.raises(LoadError, match="do not fit"):
        load_ranker(write(tmp_path, {"model_cfg": wider}))
    with pytest.raises(LoadError, match="no model_cfg"):
        load_ranker(write(tmp_path, {"other": 1}))
