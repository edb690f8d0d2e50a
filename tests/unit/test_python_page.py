"""Every example of docs/python.md runs on the bundled model and gives what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from editkit.pipelines import psnr, reconstruct
from editkit.tests.hygiene.sources import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^## (?P<title>.*)\n(?P<body>(?:(?!^## ).*\n?)*)", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
Check = Callable[[SimpleNamespace], None]
CHECKS: dict[str, Check] = {}


def examples() -> dict[str, list[str]]:
    """The Python blocks below each heading."""
    return {found["title"]: BLOCK.findall(found["body"]) for found in EXAMPLE.finditer(PAGE)}


SET_UP, *TITLES = examples()


def result_of(title: str) -> Callable[[Check], Check]:
    """What the names `x` of an example must hold after its last block."""
    return lambda check: CHECKS.setdefault(title, check)


def equal_outside(image, example) -> bool:
    outside = (example.mask < 0.5)[..., None].expand_as(image)
    return bool(outside.any()) and torch.equal(image[outside], example.image[outside])


def check_tensors(namespace: dict[str, object]) -> None:
    """Nothing is NaN, and every image lies in [0, 1]."""
    for name, value in namespace.items():
        if isinstance(value, torch.Tensor):
            assert torch.isfinite(value).all(), name
            if value.ndim == 4 and value.shape[-1] == 3:
                assert value.shape[1:] == (96, 96, 3) and value.min() >= 0 and value.max() <= 1, name


@result_of("Blended Latent Diffusion")
def blended(x):
    assert len(x.result.candidates) == 2 and len(x.result.image) == 1
    assert x.result.change_outside == 0 and equal_outside(x.result.image, x.side)
    assert x.result.psnr_tuned > x.result.psnr_plain
    assert x.change == 0 and equal_outside(x.image, x.stroke)
    assert not torch.equal(x.image, x.stroke.image)


@result_of("Backgrounds")
def backgrounds(x):
    assert (x.tuned.psnr_after > x.tuned.psnr_before) and x.tuned.steps == x.learned.steps == 3
    assert x.learned.psnr_after > x.learned.psnr_before
    assert x.tuned.image.shape == x.learned.image.shape == x.example.image.shape
    assert equal_outside(x.poisson, x.example) and equal_outside(x.pasted, x.example)


@result_of("CLIP ranking and measures")
def ranking(x):
    assert x.ranking.order.tolist() == [0, 1], "the image of the caption comes first"
    assert x.ranking.scores[0] > x.ranking.scores[1]
    assert x.measures.value("PSNR outside") > 40 and x.measures.value("text: cosine") > 0.5


@result_of("DDIM inversion")
def ddim(x):
    source = x.codec.decode(x.latent)
    assert psnr(x.rebuilt, source) > 45 and psnr(x.swapped, source) < 20
    assert len(x.trajectory.latents) == x.STEPS + 1


@result_of("DiffEdit")
def diffedit(x):
    assert x.found.mask.mask.shape == (1, *x.latent.shape[-2:])
    assert set(x.found.mask.mask.unique().tolist()) == {0, 1}
    outside = (x.found.mask.mask == 0)[:, None].expand_as(x.latent)
    assert torch.equal(x.found.latent[outside], x.latent[outside])


@result_of("Null-text and negative-prompt inversion")
def null_text(x):
    def rebuilt(negative):
        return x.decode(reconstruct(x.denoiser, x.trajectory, x.source, negative=negative, guidance_scale=7.5))

    source = x.codec.decode(x.latent)
    plain = psnr(rebuilt(x.empty), source)
    assert psnr(x.rebuilt, source) > plain + 1
    assert psnr(rebuilt(x.npi), source) > plain + 10
    assert not torch.equal(x.edited, rebuilt(x.npi))


@result_of("Prompt-to-Prompt and P2Plus")
def prompt_to_prompt(x):
    source = x.codec.decode(x.latent)
    assert x.pair.source.shape == x.pair.edited.shape == x.latent.shape
    assert psnr(x.image, source) < 30 and psnr(x.after, x.before) < 30


@result_of("MasaCtrl and Plug-and-Play")
def masactrl(x):
    source = x.codec.decode(x.latent)
    assert psnr(x.posed, source) < 30 and psnr(x.structured, source) < 30
    assert not torch.equal(x.posed, x.structured)


@result_of("Cross-attention maps")
def cross_attention_maps(x):
    assert x.maps.shape == (1, len(x.edit.source_words), *x.latent.shape[-2:])
    assert x.maps.min() >= 0 and x.maps.sum(1).max() <= 1


@result_of("StyleDiffusion")
def stylediffusion(x):
    assert torch.equal(x.pair.source, x.trajectory.source)
    assert len(x.learned.losses) == x.STEPS
    assert psnr(x.image, x.codec.decode(x.latent)) < 30


@result_of("LayerDiffusion and Imagic")
def layered(x):
    assert len(x.found.losses) == len(x.tuning.losses) == 3
    assert len(x.fitted.embeddings.losses) == len(x.fitted.tuning.losses) == 3
    assert all(torch.isfinite(change).all() for change in x.tuning.changes.values())
    assert not torch.equal(x.found.object.tokens, x.first.tokens)


@result_of("FlowEdit")
def flow_edit(x):
    source = x.codec.decode(x.latent)
    assert torch.isfinite(x.edited).all()
    assert psnr(x.image, source) < 30


@result_of("SDEdit and Differential Diffusion")
def sdedit(x):
    source = x.codec.decode(x.latent)
    assert psnr(x.image, source) < 30
    half = x.latent.shape[-1] // 2
    assert torch.equal(x.z[..., :half], x.clean[..., :half]), "latent pixels that may not change"
    assert not torch.equal(x.z[..., half:], x.clean[..., half:])


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What the first example defines and every other one uses."""
    namespace: dict[str, object] = {}
    code = "".join(examples()[SET_UP]).replace("STEPS = 8", "STEPS = 5")
    exec(compile(code, "docs/python.md: Set up", "exec"), namespace)
    return namespace


def test_there_are_examples():
    assert SET_UP == "Set up" and len(TITLES) >= 10
    assert all(examples().values())


def test_every_example_has_a_check():
    assert list(CHECKS) == TITLES


def test_set_up(names):
    x = SimpleNamespace(**names)
    assert x.latent.shape == (1, x.denoiser.channels, 96 // x.codec.factor, 96 // x.codec.factor)
    assert len(x.sigmas) == x.STEPS + 1 and x.sigmas[-1] == 0
    assert psnr(x.decode(x.denoiser.scale_in(x.latent)), x.example.image) > 30


@pytest.mark.parametrize("title", TITLES)
def test_example(title, names):
    namespace = dict(names)
    for number, block in enumerate(examples()[title], 1):
        exec(compile(block, f"docs/python.md: {title}, {number}", "exec"), namespace)
        check_tensors(namespace)
    CHECKS[title](SimpleNamespace(**namespace))
