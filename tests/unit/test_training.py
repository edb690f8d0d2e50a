"""The workshop's own laws: what is true of an image, the contrastive loss, resuming, and when files are replaced."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from editkit.hosts.bundled import oracle
from editkit.hosts.bundled.scenes import Scene, SceneObject, object_coverage, render
from editkit.training import export as exporting
from editkit.training import ranker
from editkit.training.evaluate import good, line
from editkit.training.export import ExportError, better
from editkit.training.loop import Trainer, run_steps
from editkit.training.measures import Row, held_out, images_of, there_and_back
from editkit.training.pairs import Caption, View, full_caption, one_word_changes, relation, spoil, view_of, window
from editkit.training.text import BOS, EOS, encode_ids, grammar_ids, pad_ids

RED, BLUE = SceneObject("circle", "red", 0.25, 0.5, 0.2), SceneObject("star", "blue", 0.75, 0.5, 0.2)
PAIR, SINGLE = Scene("pink", "plain", (RED, BLUE)), Scene("pink", "striped", (RED,))
PINK = "a pink background"


def view(scene: Scene, *visible: str, masked: bool = False, broken: bool = False) -> View:
    words = visible or tuple(item.words for item in scene.objects)
    return View(scene, np.zeros((2, 2, 3), np.float32), words, masked, broken)


@pytest.mark.parametrize(
    ("seen", "caption", "expected"),
    [
        (view(PAIR), full_caption(PAIR), 1),
        (view(PAIR), Caption(("blue star", "red circle"), PINK), -1),
        (view(PAIR), Caption(("red circle",), None), 1),
        (view(PAIR), Caption(("red circle",), PINK), 0),
        (view(PAIR), Caption(("red star",), None), -1),
        (view(PAIR), Caption((), PINK), 1),
        (view(PAIR), Caption((), "a sky background"), -1),
        (view(PAIR, "red circle", masked=True), Caption(("red circle",), PINK), 1),
        (view(PAIR, "red circle", masked=True), Caption(("red circle", "green ring"), PINK), 0),
        (view(PAIR, "red circle", masked=True), Caption(("blue star",), None), -1),
        (view(PAIR, "red circle", masked=True), Caption((), PINK), 0),
        (view(SINGLE), Caption(("red circle",), PINK), -1),
        (view(SINGLE, broken=True), full_caption(SINGLE), -1),
        (view(SINGLE, broken=True), Caption((), SINGLE.background_words), 0),
    ],
)
def test_what_is_true_of_a_view(seen: View, caption: Caption, expected: int) -> None:
    assert relation(seen, caption) == expected


def test_captions_of_pairs_are_the_renderers() -> None:
    for scene in (PAIR, SINGLE, Scene("sky", "striped", ())):
        assert full_caption(scene).text == scene.caption


def test_a_window_shows_one_thing_whole_and_no_other() -> None:
    for i in range(40):
        inside = window(PAIR, i % 2, 96, np.random.default_rng(i))
        assert inside[object_coverage(PAIR.objects[i % 2], 96) > 0].all()
        assert not inside[object_coverage(PAIR.objects[1 - i % 2], 96) > 0].any()


def test_masked_views_are_black_outside_after_augmentation() -> None:
    rng = np.random.default_rng(3)
    views = [v for v in (view_of(SINGLE, 96, rng) for _ in range(40)) if v.masked][:4]
    images = ranker.augment(views, torch.Generator().manual_seed(0))
    for image, seen in zip(images, views, strict=True):
        outside = torch.from_numpy((seen.image < 0).all(-1))
        assert outside.any()
        assert (image[:, outside] == 0).all()
        assert (image[:, ~outside] > 0).any()


def test_spoilt_pictures_do_not_pass_for_the_scene() -> None:
    """Blobs, faded, halved and missing objects; a few blobs may stay readable."""
    images = [spoil(SINGLE, 96, np.random.default_rng(i)) for i in range(40)]
    assert np.mean([oracle.read(image).agrees(SINGLE) for image in images]) <= 0.1
    assert oracle.read(render(SINGLE, 96)).agrees(SINGLE)


def test_contrast_has_its_closed_form() -> None:
    """One true pair of logit a against one false of logit b in its row and none in its column."""
    a, b = 1.7, 0.4
    logits = torch.tensor([[a, b]])
    truth = torch.tensor([[1, -1]])
    expected = 0.5 * (math.log(1 + math.exp(b - a)) + 0.0)
    assert float(ranker.contrast(logits, truth)) == pytest.approx(expected, rel=1e-5)


def test_undecided_pairs_do_not_count() -> None:
    truth = torch.tensor([[1, 0, -1], [-1, 1, 0]])
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[truth == 0] += 100
    assert torch.equal(ranker.contrast(logits, truth), ranker.contrast(other, truth))
    other[truth == -1] += 1
    assert ranker.contrast(other, truth) > ranker.contrast(logits, truth)


def test_text_rows_cover_the_grammar_and_keep_order() -> None:
    ids = grammar_ids()
    assert ids == sorted(set(ids))
    assert ids[-2:] == [BOS, EOS]
    for scene in held_out(50, None, 95):
        assert set(encode_ids(scene.caption)) <= set(ids)
    rows, padded = ranker.compact_ids([PAIR.caption]), pad_ids([PAIR.caption])
    kept = padded[0, : int((padded[0] == EOS).int().argmax()) + 1]
    assert [ids[row] for row in rows[0, : len(kept)]] == kept.tolist()
    assert int(rows[0].argmax()) == len(kept) - 1


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    def run(folder: Path, stops: list[int]) -> torch.Tensor:
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(1)
            model = torch.nn.Linear(3, 1)
            trainer = Trainer(dict(model.named_parameters()), 0.1, ema=0.9)
            trainer.resume(folder / "c.safetensors")

            def loss(step: int, model: torch.nn.Module = model) -> torch.Tensor:
                data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
                return (model(data) - data.sum(1, keepdim=True)).square().mean()

            for _ in run_steps(trainer, stop, loss, checkpoint=folder / "c.safetensors", lr=lambda s: 1.0):
                pass
        return torch.cat([value.flatten() for value in trainer.ema.values()])

    assert torch.equal(run(tmp_path / "once", [12]), run(tmp_path / "twice", [5, 12]))


class _Toy:
    """A linear model in sigma space: D(z, sigma) = z / (1 + sigma^2), whose flow only scales z."""

    table = torch.linspace(0.03, 14.0, 1000)

    def schedule(self, steps: int) -> torch.Tensor:
        return torch.cat([self.table[torch.arange(steps - 1, -1, -1) * (1000 // steps) + 1], torch.zeros(1)])

    def denoise(self, z: torch.Tensor, sigma: float, contexts: list[Any]) -> torch.Tensor:
        return (z / (1 + sigma * sigma))[None]


def test_there_and_back_converges_on_a_known_flow() -> None:
    z0 = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = [float((there_and_back(_Toy(), z0, None, steps) / z0 - 1).abs().max()) for steps in (50, 100, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.35 * errors[0]


# ----------------------------------------------------------------------------------------------- table and export
def row(name: str, value: float, floor: float | None, n: int = 64) -> Row:
    return Row(name, value, "share", n, value - 0.1, value + 0.1, floor, 1.0)


def metrics(*values: float) -> dict[str, Any]:
    rows = [row(f"m{i}", value, 0.9) for i, value in enumerate(values)] + [row("free", 0.1, None)]
    return {"command": "c", "rows": [r.as_dict() for r in rows]}


def test_only_better_files_replace_others() -> None:
    assert better(metrics(0.95, 0.95), metrics(0.94, 0.95))
    assert not better(metrics(0.95, 0.95), metrics(0.95, 0.95)), "equal is not better"
    assert not better(metrics(0.99, 0.89), metrics(0.90, 0.91)), "a limit that was kept is missed"
    assert better(metrics(0.99, 0.80), metrics(0.90, 0.70))
    other = metrics(0.99, 0.99)
    assert not better({**other, "command": "quick"}, metrics(0.1, 0.1)), "figures of another command do not compare"


def test_verdicts_and_lines() -> None:
    near = row("near", 0.85, 0.9)
    assert not good(near)
    assert good(near, quick=True)
    assert good(row("free", 0.0, None))
    assert "FAIL" in line(near)
    assert "85.0 %" in line(near)
    assert "64" in line(near)


def test_half_precision_must_hold_the_weights() -> None:
    with pytest.raises(ExportError, match="float16"):
        exporting._half("big", torch.tensor([1e6]))


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unet"):
        exporting.lay_out(tmp_path, tmp_path / "export")


def _work_folder(folder: Path) -> Path:
    """A work folder with networks that never learned anything."""
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from editkit.training import unet, vae

    torch.manual_seed(0)
    small = {**vae.CONFIG, "block_out_channels": (32, 32, 32, 32)}
    AutoencoderKL(**small).save_pretrained(folder / "vae")
    network, words = unet.build()
    network.save_pretrained(folder / "unet")
    state = {name: value.contiguous() for name, value in words.model.state_dict().items()}
    save_file(state, folder / "text_encoder.safetensors")
    ranker.save(ranker.build(), folder / "ranker")
    return folder


def test_export_lays_out_loads_refuses_and_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from editkit.hosts.diffusers.loading import load_folder

    work, target = _work_folder(tmp_path / "work"), tmp_path / "bundled"
    target.mkdir()
    figures = {"size": 96, **metrics(0.95)}
    monkeypatch.setattr(exporting, "evaluate", lambda *a, **k: copy.deepcopy(figures))
    exporting.export(work, target)
    model = load_folder(target / "tiny")
    assert model.denoiser.family == "bundled"
    assert model.codec.factor == 8
    assert model.text.encode("a red circle").tokens.shape == (1, 77, 128)
    assert "m0" in (target / "MODEL_CARD.md").read_text(encoding="utf-8")
    with pytest.raises(ExportError, match="not better"):
        exporting.export(work, target)
    exporting.export(work, target, force=True)
    monkeypatch.setattr(exporting, "LIMIT", 1000)
    with pytest.raises(ExportError, match="MB"):
        exporting.export(work, target, force=True)
    assert (target / "tiny" / "unet" / "config.json").exists(), "a refused export leaves the installed files"


def test_pictures_and_words_of_a_changed_scene_differ() -> None:
    for changed in one_word_changes(SINGLE):
        assert changed.caption != SINGLE.caption
        assert (images_of([changed], 48) - images_of([SINGLE], 48)).abs().max() > 0.05
