"""The files that ship: complete, small, safe, and the ones that the figures beside them were measured on."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editkit.hosts.bundled import FOLDER, VOCABULARY, expand_embedding, ranker_folder, tiny_folder
from editkit.pipelines.core.errors import LoadError

LIMIT = 16 * 10**6


def _present() -> bool:
    try:
        tiny_folder(), ranker_folder()
    except LoadError:
        return False
    return True


REASON = "pipelines/bundled holds no weights: python -m editkit.training export"
needs_weights = pytest.mark.skipif(not _present(), reason=REASON)


# ------------------------------------------------------------------------------------------------ without weights
def test_stored_rows_go_to_their_tokens_and_all_others_are_the_mean() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    table = expand_embedding(rows, [4, 1], 6)
    assert table.shape == (6, 2)
    assert table[4].tolist() == [1, 2]
    assert table[1].tolist() == [3, 6]
    assert (table[[0, 2, 3, 5]] == torch.tensor([2.0, 4.0])).all()


def test_expansion_keeps_dtype_and_does_not_round_the_mean_twice() -> None:
    rows = torch.full((4096, 1), 0.1, dtype=torch.float16)
    table = expand_embedding(rows, range(4096), 4097)
    assert table.dtype == torch.float16
    assert table[4096] == rows[0]


@pytest.mark.parametrize("ids", [[0], [0, 0], [0, 6], [-1, 2], []])
def test_ids_that_do_not_fit_are_refused(ids: list[int]) -> None:
    with pytest.raises(LoadError):
        expand_embedding(torch.zeros(len(ids) if len(ids) != 1 else 2, 3), ids, 6)


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editkit.hosts.bundled.FOLDER", tmp_path)
    with pytest.raises(LoadError, match=r"unet/config\.json"):
        tiny_folder()
    with pytest.raises(LoadError, match=r"open_clip_model\.safetensors"):
        ranker_folder()


# --------------------------------------------------------------------------------------------------- with weights
@needs_weights
def test_everything_fits_the_size_limit() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc") <= LIMIT


@needs_weights
def test_weights_are_finite_float16_safetensors_and_nothing_else() -> None:
    kinds = {path.suffix for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert kinds <= {".safetensors", ".json", ".md", ".py", ".png"}
    for path in FOLDER.rglob("*.safetensors"):
        for name, value in load_file(path).items():
            assert value.dtype == torch.float16, f"{path.name}: {name}"
            assert torch.isfinite(value).all(), f"{path.name}: {name}"


@needs_weights
def test_configs_name_no_folder_of_any_machine() -> None:
    for path in FOLDER.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text, path
        assert '"/' not in text, path


@needs_weights
def test_figures_belong_to_these_weights_and_pass() -> None:
    from editkit.training.evaluate import digests

    metrics = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["weights"] == digests(FOLDER)
    missed = [row["name"] for row in metrics["rows"] if row["floor"] is not None and row["value"] < row["floor"]]
    assert metrics["passed"] == (not missed)
    assert not missed
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for row in metrics["rows"]:
        assert row["name"] in card


@needs_weights
def test_layout_fits_both_hosts() -> None:
    """Factor 8, channels in multiples of 32, cross-attention at two or more resolutions, CLIP's vocabulary."""
    from editkit.training.text import grammar_ids

    vae = json.loads((tiny_folder() / "vae" / "config.json").read_text())
    unet = json.loads((tiny_folder() / "unet" / "config.json").read_text())
    text = json.loads((tiny_folder() / "text_encoder" / "config.json").read_text())
    assert len(vae["block_out_channels"]) == 4
    assert all(channels % 32 == 0 for channels in (*vae["block_out_channels"], *unet["block_out_channels"]))
    assert sum("CrossAttn" in name for name in unet["down_block_types"]) >= 2
    assert (text["vocab_size"], text["max_position_embeddings"]) == (VOCABULARY, 77)
    assert text["hidden_size"] == unet["cross_attention_dim"]
    for folder in (tiny_folder() / "text_encoder", ranker_folder()):
        assert json.loads((folder / "token_ids.json").read_text()) == grammar_ids()


@needs_weights
def test_the_autoencoder_and_the_text_encoder_load() -> None:
    from editkit.hosts.diffusers.loading import load_bundled
    from editkit.training.measures import held_out, images_of, psnr

    model = load_bundled()
    images = images_of(held_out(4, None, 90), 96)
    assert psnr(model.codec.decode(model.codec.encode(images)), images).min() > 28
    one, other = (model.text.encode(f"a {colour} circle on a pink background").tokens for colour in ("red", "blue"))
    assert one.shape == (1, 77, 128)
    assert not torch.allclose(one[:, 2], other[:, 2], atol=1e-2)
    assert torch.allclose(one[:, :2], other[:, :2], atol=1e-5), "attention is causal: words before the change agree"


@needs_weights
def test_open_clip_loads_the_ranker_from_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own factory and tokenizer, no network; only the embedding rows are put back first."""
    open_clip = pytest.importorskip("open_clip")

    def no_network(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    source = ranker_folder()
    state = {name: value.float() for name, value in load_file(source / "open_clip_model.safetensors").items()}
    name = "text.token_embedding.weight"
    state[name] = expand_embedding(state[name], json.loads((source / "token_ids.json").read_text()))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    shutil.copy(source / "open_clip_config.json", tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert _first_of_eight(model, tokenizer) >= 0.9


def _first_of_eight(model: Any, tokenizer: Any) -> float:
    from editkit.training.measures import held_out, images_of
    from editkit.training.ranker import eight_captions, normalise

    scenes = held_out(32, None, 91)
    images = normalise(images_of(scenes, 96).movedim(-1, 1))
    with torch.no_grad():
        vectors = model.encode_image(images, normalize=True)
        hits = []
        for i, scene in enumerate(scenes):
            captions = eight_captions(scene, np.random.default_rng([21, i]), hard=False)
            words = model.encode_text(tokenizer(captions), normalize=True)
            hits.append(int((words @ vectors[i]).argmax()) == 0)
    return float(np.mean(hits))


@needs_weights
def test_weight_files_carry_no_foreign_metadata() -> None:
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert set(file.metadata() or {}) <= {"format"}, path
