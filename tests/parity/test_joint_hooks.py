"""Attention hooks in diffusers' SD3, SD3.5 and Flux transformers: where they sit, what they change, and that they go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from editkit.hosts.diffusers.flow_denoiser import FlowDenoiser
from editkit.hosts.diffusers.flux_denoiser import FluxDenoiser
from editkit.pipelines.attention.cross_attention_maps import attention_maps
from editkit.pipelines.attention.kv_edit import KVEdit
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_batch import pair_context, pair_rows
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.pair_loop import PairPrompts, attention_edit, pair_edit
from editkit.pipelines.attention.plug_and_play import PlugAndPlay
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.core.errors import FamilyError, ParameterError
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.inversion.flow import FlowInversionOptions, invert_flow
from editkit.pipelines.learning.optimise import learning_mode
from editkit.tests.flow_folders import flux_transformer, sd3_transformer
from editkit.tests.toy_attention import replace_edit
from editkit.tests.toys import random_latent

TABLE = torch.linspace(0.001, 1, 1000)
SIGMAS = torch.tensor([1.0, 0.6, 0.3, 0.0])
TOKENS, WIDTH, POOLED = 7, 16, 12


def _made(name: str) -> FlowDenoiser:
    sizes = {"text": WIDTH, "pooled": POOLED}
    if name == "Flux":
        return FluxDenoiser(transformer=flux_transformer(**sizes), table=TABLE, scaling_factor=1.0)
    dual = (0, 1) if name == "SD3.5-medium" else ()
    return FlowDenoiser(transformer=sd3_transformer(dual=dual, **sizes), table=TABLE, scaling_factor=1.0)


@pytest.fixture(scope="module", params=["SD3", "SD3.5-medium", "Flux"])
def denoiser(request: pytest.FixtureRequest) -> FlowDenoiser:
    model = _made(request.param)
    with torch.no_grad():  # attention that is nearly the same everywhere would hide mistakes
        for name, value in model.transformer.named_parameters():
            value.mul_(8.0 if ".attn" in name and "norm" not in name else 2.0)
    model.transformer.double()  # such attention makes a rounding error large
    return model


def prompt(seed: int) -> Context:
    return Context(random_latent(1, TOKENS, WIDTH, seed=seed) * 3, random_latent(1, POOLED, seed=seed + 100))


def latents(count: int = 2, height: int = 8, width: int = 10) -> Tensor:
    return random_latent(count, 16, height, width, seed=9)


class Spy(Passive):
    """Sees every layer; answers with `answer(q, k, v, site)`, or plain."""

    joint = True

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.sites = answer, []

    def wants(self, site: Any) -> bool:
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor | None:
        assert q.shape == k.shape == v.shape and q.shape[2] == site.text + site.tokens
        self.sites.append(site)
        return None if self.answer is None else self.answer(q, k, v, site)


class Blind(Passive):
    joint = True


def pairs(model: FlowDenoiser, control: Any, z: Tensor | None = None) -> Tensor:
    """One call on source and target with a negative, [2, 2, C, h, w]."""
    z = latents() if z is None else z
    contexts = [pair_context(prompt(1), prompt(2), len(z) // 2), prompt(3)]
    rows = pair_rows(len(z) // 2, ("cond", "uncond"))
    with torch.no_grad():
        return model.denoise(z, 0.6, contexts, None if control is None else Controlled(control, rows))


def control(*taus: float, **options: Any) -> P2PControl:
    return P2PControl(replace_edit(prompt(1), prompt(2)), SIGMAS, P2POptions(*taus, **options))


def test_looking_changes_nothing_and_leaves_nothing(denoiser: FlowDenoiser) -> None:
    before = [(name, type(part.processor)) for name, part in denoiser.transformer.named_modules() if _attends(part)]
    plain, spy = pairs(denoiser, None), Spy()
    assert torch.equal(pairs(denoiser, Blind()), plain)
    assert (pairs(denoiser, spy) - plain).abs().max() <= 1e-5
    after = [(name, type(part.processor)) for name, part in denoiser.transformer.named_modules() if _attends(part)]
    assert before == after and torch.equal(pairs(denoiser, None), plain)
    layers = len(denoiser.blocks)
    assert [site.order for site in spy.sites if site.text] == list(range(layers))
    assert {site.text for site in spy.sites} <= {0, TOKENS} and {site.grid for site in spy.sites} == {(4, 5)}


def _attends(part: Any) -> bool:
    return hasattr(part, "processor")


def test_sides_that_patches_do_not_divide_are_rounded_up(denoiser: FlowDenoiser) -> None:
    spy = Spy()
    pairs(denoiser, spy, latents(2, 7, 9))
    assert {site.grid for site in spy.sites} == {(4, 5)}


def test_layout_equals_an_attention_that_was_replaced_by_hand(
    denoiser: FlowDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain, real = pairs(denoiser, control(0.0, 1.0, 1.0)), pairs(denoiser, None), F.scaled_dot_product_attention
    image_first = not isinstance(denoiser, FluxDenoiser)

    def by_hand(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        count = query.shape[2]
        image = slice(0, 20) if image_first else slice(count - 20, count)
        query, key = query.clone(), key.clone()
        query[1::2, :, image], key[1::2, :, image] = query[::2, :, image], key[::2, :, image]
        return real(query, key, value, *rest, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    theirs = pairs(denoiser, None)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (ours[:, 0] - plain[:, 0]).abs().max() <= 1e-5 and (ours[:, 1] - plain[:, 1]).abs().max() > 1e-3


def test_an_edit_of_nothing_and_of_equal_words(denoiser: FlowDenoiser) -> None:
    assert torch.equal(pairs(denoiser, control(0.0, 0.0, 0.0)), pairs(denoiser, None))
    edit, z = replace_edit(prompt(1), prompt(1)), latents(1)
    prompts = PairPrompts(edit.source, edit.target, prompt(3), 4.0)
    plain = pair_edit(denoiser, prompts, PairControl(SIGMAS), z)
    for made in (P2PControl(edit, SIGMAS, P2POptions(1.0, 1.0, 1.0)), MasaCtrl(SIGMAS, MasaCtrlOptions(0, 0.0))):
        out = pair_edit(denoiser, prompts, made, z)
        assert (out.edited - plain.source).abs().max() <= 1e-4 and (out.source - plain.source).abs().max() <= 1e-4


def test_kv_edit_keeps_the_background_and_edits_the_rest(denoiser: FlowDenoiser) -> None:
    """Of a real image, too; with a full mask it is plain sampling."""
    mask = torch.zeros(1, 8, 10)
    mask[:, :4, :6] = 1
    prompts, z = PairPrompts(prompt(1), prompt(2), prompt(3), 3.0), latents(2)
    plain = pair_edit(denoiser, prompts, PairControl(SIGMAS), z)
    real = invert_flow(denoiser, latents(2), prompt(1), SIGMAS, options=FlowInversionOptions("Euler"))
    inside = mask[:, None].expand_as(z) == 1
    for start in (z, real):
        out = pair_edit(denoiser, prompts, KVEdit(SIGMAS, constant_schedule(mask)), start)
        assert torch.equal(out.edited[~inside], out.source[~inside])
        assert (out.edited[inside] - out.source[inside]).abs().max() > 1e-3
    assert torch.equal(out.source, real.latents[-1])
    full = pair_edit(denoiser, prompts, KVEdit(SIGMAS, constant_schedule(torch.ones_like(mask))), z)
    assert (full.edited - plain.edited).abs().max() <= 1e-4
    assert (plain.edited - plain.source)[~inside].abs().max() > 1e-3, "without it the background drifts"


def test_tau_u_without_an_unconditional_branch_says_so(
    denoiser: FlowDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    edit, options = replace_edit(prompt(1), prompt(2)), P2POptions(0.5, 0.5, 0.5)
    for scale, said in ((4.0, 0), (1.0, 1)):
        caplog.clear()
        attention_edit(denoiser, edit, prompt(3), latents(1), sigmas=SIGMAS[1:], guidance_scale=scale, options=options)
        assert sum("tau_u has nothing to act on" in record.message for record in caplog.records) == said


def test_batches_order_and_parts_do_not_matter(denoiser: FlowDenoiser) -> None:
    z = latents(4)
    whole = pairs(denoiser, control(1.0, 1.0, 1.0), z)
    apart = torch.cat([pairs(denoiser, control(1.0, 1.0, 1.0), part) for part in (z[:2], z[2:])], dim=1)
    assert (whole - apart).abs().max() <= 1e-5
    turned = pairs(denoiser, control(1.0, 1.0, 1.0), z[[2, 3, 0, 1]])
    assert (whole[:, [2, 3, 0, 1]] - turned).abs().max() <= 1e-5


def test_maps_are_a_share_of_the_attention(denoiser: FlowDenoiser) -> None:
    maps = attention_maps(denoiser, [(0.6, latents(2))], prompt(1), [(2,), (3, 4)])
    assert maps.shape == (2, 2, 8, 10) and maps.min() >= 0 and maps.sum(1).max() <= 1
    everything = attention_maps(denoiser, [(0.6, latents(2))], prompt(1), [tuple(range(TOKENS))])
    spied: list[Tensor] = []

    def share(q: Tensor, k: Tensor, v: Tensor, site: Any) -> None:
        if site.text:
            a = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            spied.append(a[:, :, site.text :, : site.text].sum(-1).mean(1).unflatten(1, site.grid))

    with torch.no_grad():
        rows = pair_rows(1, ("cond",))
        denoiser.denoise(latents(2), 0.6, [prompt(1)], Controlled(Spy(share), rows))
    wanted = F.interpolate(torch.stack(spied).mean(0)[:, None], size=(8, 10), mode="bilinear")
    assert (everything - wanted).abs().max() <= 1e-5


def test_what_cannot_be_done_is_refused_by_name(denoiser: FlowDenoiser) -> None:
    with pytest.raises(FamilyError, match="PlugAndPlay needs"):
        pairs(denoiser, PlugAndPlay(SIGMAS))
    denoiser.transformer.enable_gradient_checkpointing()
    try:
        with pytest.raises(ParameterError, match="gradient checkpointing"), learning_mode():
            denoiser.denoise(latents(), 0.6, [prompt(1)], Controlled(Blind(), pair_rows(1, ("cond",))))
    finally:
        denoiser.transformer.disable_gradient_checkpointing()
