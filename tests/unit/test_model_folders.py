"""Folders in diffusers layout as strangers make them: nothing in them runs, and nothing that is missing is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from editkit.hosts.diffusers.loading import load_bundled, load_folder
from editkit.pipelines.core.errors import EditError, FamilyError, LoadError
from editkit.tests.model_folder import write_model_folder, write_tokenizer
from editkit.tests.toys import random_latent

MARKER = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass Evil:\n    pass\n"


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def predicted(model) -> torch.Tensor:
    return model.denoiser.denoise(random_latent(1, 4, 8, 8), 2.0, [model.text.encode("a cat")])


def test_a_folder_loads_and_predicts(tmp_path):
    model = load_folder(write_model_folder(tmp_path))
    assert [token.id for token in model.text.tokens("ab c")][:5] == [52, 0, 27, 28, 53]
    assert torch.isfinite(predicted(model)).all()


# --------------------------------------------------------------------------------------------------------------- code
def test_the_code_of_a_folder_never_runs_and_nobody_is_asked(tmp_path, monkeypatch):
    """Every part names code of its folder; whoever sits at the terminal would answer yes to any question."""
    folder, marker = write_model_folder(tmp_path / "model"), tmp_path / "marker"
    names = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "CLIPTextModel": "evil.Evil",
    }
    write_tokenizer(folder / "tokenizer", auto_map=names, tokenizer_class="Evil")
    for part in ("unet", "vae", "text_encoder"):
        change_json(folder / part / "config.json", auto_map=names)
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / part / "evil.py").write_text(MARKER.format(marker=str(marker)))
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    assert torch.isfinite(predicted(load_folder(folder))).all()
    assert not marker.exists() and not asked


# --------------------------------------------------------------------------------------------------------- completeness
@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_incomplete_weights_are_refused_by_name(tmp_path, part, file):
    path = write_model_folder(tmp_path) / part / file
    state = load_file(path)
    lost = sorted(state)[len(state) // 2]
    del state[lost]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 1 of its weights") as refusal:
        load_folder(tmp_path)
    assert lost.rpartition("text_model.")[2] in str(refusal.value) and str(tmp_path / part) in str(refusal.value)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    path = write_model_folder(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.weight"] = torch.zeros(3, 3)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="unet"):
        load_folder(tmp_path)


# --------------------------------------------------------------------------------------------------------------- widths
@pytest.mark.parametrize("width", [16, 24])
def test_any_text_width_is_accepted_where_the_weights_agree(tmp_path, width):
    assert torch.isfinite(predicted(load_folder(write_model_folder(tmp_path, width)))).all()


def test_a_text_encoder_of_another_width_is_refused_by_name(tmp_path):
    write_model_folder(tmp_path / "model")
    write_model_folder(tmp_path / "other", 24)
    (tmp_path / "other" / "text_encoder").rename(tmp_path / "wide")
    for file in (tmp_path / "wide").iterdir():
        file.replace(tmp_path / "model" / "text_encoder" / file.name)
    with pytest.raises(FamilyError, match=r"24.*16"):
        load_folder(tmp_path / "model")


def test_a_list_of_equal_widths_is_one_width(tmp_path):
    write_model_folder(tmp_path)
    change_json(tmp_path / "unet" / "config.json", cross_attention_dim=[16, 16])
    assert torch.isfinite(predicted(load_folder(tmp_path))).all()
    change_json(tmp_path / "unet" / "config.json", cross_attention_dim=[16, 24])
    with pytest.raises(EditError, match=r"16|24"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("unet/config.json", "null"),
        ("vae/config.json", "[]"),
        ("vae/config.json", "\udcff"),
        ("text_encoder/config.json", '{"hidden_size": "wide"}'),
        ("scheduler/scheduler_config.json", '{"beta_start": "small"}'),
        ("tokenizer/vocab.json", "[]"),
    ],
)
def test_broken_configurations_are_one_clear_error(tmp_path, part, content):
    (write_model_folder(tmp_path) / part).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(EditError, match=part.partition("/")[0]):
        predicted(load_folder(tmp_path))


# ------------------------------------------------------------------------------------------------------------ randomness
def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    write_model_folder(tmp_path)
    before = torch.random.get_rng_state()
    load_bundled()
    load_folder(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
