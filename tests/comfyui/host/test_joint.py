"""Attention control in native transformers with joint attention: SD3, SD3.5-medium's second attention, Flux, bundled flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.ldm.flux.math as flux_math
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.supported_models as supported
import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor

from editkit.hosts.comfyui.attention.joint import OVERRIDE
from editkit.hosts.comfyui.bundled import flow
from editkit.hosts.diffusers.flow_denoiser import FlowDenoiser
from editkit.hosts.diffusers.loading import load_bundled as load_headless
from editkit.hosts.host import open_denoiser, text_encoder_of
from editkit.hosts.loading import load_bundled
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.attention.cross_attention_maps import attention_maps
from editkit.pipelines.attention.kv_edit import KVEdit
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_batch import pair_context, pair_rows
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.pair_loop import PairPrompts, pair_edit
from editkit.pipelines.attention.plug_and_play import PlugAndPlay
from editkit.pipelines.attention.prompts.align import align_prompts
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.core.errors import FamilyError, LoadError, MismatchError
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.core.protocols import Context
from editkit.tests.comfyui.host import families
from editkit.tests.parity import tiny
from editkit.tests.toy_attention import replace_edit

TOKENS, SIGMA = 7, 0.6
SIGMAS = torch.tensor([1.0, SIGMA, 0.3, 0.0])


def sd35_medium() -> Any:
    """SD3 with a second, image-only attention in its first block."""
    text = {"target": "torch.nn.Linear", "params": {"in_features": families.WIDTH, "out_features": 128}}
    config = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "qk_norm": "rms"}
    sizes = {"adm_in_channels": families.WIDTH, "num_patches": 4096, "pos_embed_max_size": 64}
    more = {"pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0]}
    return families.patcher(supported.SD3({**config, **sizes, **more, "context_embedder_config": text}), {})


MODELS = {"SD3": families.sd3, "SD3.5-medium": sd35_medium, "Flux": families.flux}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def prompt(seed: int) -> Context:
    generator = torch.Generator().manual_seed(seed)
    tokens, pooled = (torch.randn(1, *size, families.WIDTH, generator=generator) for size in ((TOKENS,), ()))
    return context_of(conditioning_of(Context(tokens, pooled)), "positive")


def latents(count: int = 2, height: int = 8, width: int = 10) -> Tensor:
    return torch.randn(count, 16, height, width, generator=torch.Generator().manual_seed(1))


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


def pairs(model: Any, control: Any, z: Tensor | None = None) -> Tensor:
    """One call on a source and a target, with a negative, [2, 2, C, h, w]."""
    z = latents() if z is None else z
    pair, negative = pair_context(prompt(1), prompt(2), len(z) // 2), prompt(3)
    with open_denoiser(model, tuple(z.shape), [pair, negative]) as denoiser:
        rows = pair_rows(len(z) // 2, ("cond", "uncond"))
        return denoiser.denoise(z, SIGMA, [pair, negative], None if control is None else Controlled(control, rows))


def control(**options: Any) -> P2PControl:
    return P2PControl(replace_edit(prompt(1), prompt(2)), SIGMAS, P2POptions(**options))


def test_looking_changes_no_bit_and_leaves_nothing(model: Any) -> None:
    plain, options = pairs(model, None), repr(model.model_options)
    spy = Spy()
    assert torch.equal(pairs(model, spy), plain) and torch.equal(pairs(model, Passive_()), plain)
    assert repr(model.model_options) == options and torch.equal(pairs(model, None), plain)
    orders = [site.order for site in spy.sites if site.text]
    layers = spy.sites[0].layers
    assert orders == list(range(layers)) * (len(orders) // layers)
    assert {site.text for site in spy.sites} <= {0, TOKENS} and {site.grid for site in spy.sites} == {(4, 5)}


class Passive_(Passive):
    joint = True


def test_sides_that_patches_do_not_divide_are_rounded_up(model: Any) -> None:
    spy = Spy()
    pairs(model, spy, latents(2, 7, 9))
    assert {site.grid for site in spy.sites} == {(4, 5)}


def test_layout_equals_an_attention_that_was_replaced_by_hand(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = pairs(model, control(cross_until=0.0, self_until=1.0, uncond_self_until=1.0))

    def by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any) -> Tensor:
        if not named.get("skip_reshape"):
            q, k, v = (x.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        text = 0 if q.shape[2] == 20 else TOKENS
        q, k = q.clone(), k.clone()
        q[1::2, :, text:], k[1::2, :, text:] = q[::2, :, text:], k[::2, :, text:]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    plain = pairs(model, None)
    for module in (flux_math, mmdit):
        monkeypatch.setattr(module, "optimized_attention", by_hand)
    theirs = pairs(model, None)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours[:, 0] - plain[:, 0]).abs().max() <= 1e-5 and (ours[:, 1] - plain[:, 1]).abs().max() > 1e-3


def test_taus_of_zero_change_nothing(model: Any) -> None:
    assert torch.equal(pairs(model, control(cross_until=0.0, self_until=0.0)), pairs(model, None))


def test_injection_with_equal_words_and_latents_returns_the_source(model: Any) -> None:
    z = latents(1).repeat(2, 1, 1, 1)
    pair, edit = pair_context(prompt(1), prompt(1), 1), replace_edit(prompt(1), prompt(1))
    whole = P2PControl(edit, SIGMAS, P2POptions(1.0, 1.0, 1.0))
    with open_denoiser(model, tuple(z.shape), [pair]) as denoiser:
        out = denoiser.denoise(z, SIGMA, [pair], Controlled(whole, pair_rows(1, ("cond",))))[0]
        plain = denoiser.denoise(z, SIGMA, [pair])[0]
    assert (out[1] - out[0]).abs().max() <= 1e-5 and (out - plain).abs().max() <= 1e-5


def test_a_batch_of_pairs_equals_pairs_one_by_one(model: Any) -> None:
    z, settings = latents(4), {"cross_until": 1.0, "self_until": 1.0, "uncond_self_until": 1.0}
    whole = pairs(model, control(**settings), z)
    apart = [pairs(model, control(**settings), part) for part in (z[:2], z[2:])]
    assert (whole - torch.cat(apart, dim=1)).abs().max() <= 1e-5
    turned = pairs(model, control(**settings), z[[2, 3, 0, 1]])
    assert (whole[:, [2, 3, 0, 1]] - turned).abs().max() <= 1e-5


def test_an_override_and_a_block_replacement_stay_in_force(model: Any) -> None:
    seen: dict[str, int] = {"override": 0, "block": 0}

    def override(func: Any, *args: Any, **named: Any) -> Tensor:
        seen["override"] += 1
        return func(*args, **named) * 0.5

    def block(args: dict, extra: dict) -> Any:
        seen["block"] += 1
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(block, "dit", "double_block", 0)
    patched.model_options["transformer_options"][OVERRIDE] = override
    plain = pairs(patched, None)
    calls = dict(seen)
    spied = pairs(patched, Spy(lambda q, k, v, site: site.attention(q, k, v)))
    assert (plain - spied).abs().max() <= 1e-5 and seen == {name: 2 * count for name, count in calls.items()}
    assert (plain - pairs(model, None)).abs().max() > 1e-3
    edited = pairs(patched, control(cross_until=1.0, self_until=1.0))
    assert (edited[:, 0] - plain[:, 0]).abs().max() <= 1e-5


def test_what_is_not_defined_is_refused_by_name(model: Any) -> None:
    with pytest.raises(FamilyError, match="PlugAndPlay needs"):
        pairs(model, PlugAndPlay(SIGMAS))
    short = replace_edit(*(Context(prompt(seed).tokens[:, :6]) for seed in (1, 2)))
    with pytest.raises(MismatchError, match="attends to 7 text tokens"):
        pairs(model, P2PControl(short, SIGMAS, P2POptions(1.0)))


# ------------------------------------------------------------------------------------------------------------- both hosts
SD3 = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": families.WIDTH, "caption_projection_dim": 128,
    "pooled_projection_dim": families.WIDTH, "pos_embed_max_size": 24,
}  # fmt: skip


def test_both_hosts_edit_alike_in_the_layout_of_sd3(tmp_path: Path) -> None:
    with torch.inference_mode(False):
        transformer = tiny.randomise(SD3Transformer2DModel(**SD3), std=0.04)
        for name, value in transformer.named_parameters():
            value.data.mul_(3.0 if ".attn" in name else 1.5)
    transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 2.0}))
    native = flow._model(tmp_path, {"scaling_factor": 1.0})
    headless = FlowDenoiser(transformer=transformer, table=torch.linspace(0.001, 1, 1000), scaling_factor=1.0)
    edit = replace_edit(prompt(1), prompt(2), blend_source=(2,), blend_target=(2,))
    controls: dict[str, PairControl] = {
        "plain": PairControl(SIGMAS),
        "P2Plus": P2PControl(edit, SIGMAS, P2POptions(0.8, 0.5, 0.5)),
        "MasaCtrl of an object": MasaCtrl(SIGMAS, MasaCtrlOptions(1, 0.25), edit),
        "KV-Edit": KVEdit(SIGMAS, constant_schedule(corner())),
    }
    theirs = on_sd3(headless, edit, controls)
    with open_denoiser(native, (4, 4, 8, 10), [edit.source, edit.target, prompt(3)]) as denoiser:
        ours = on_sd3(denoiser, edit, controls)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
        assert name in ("plain", "maps") or (value - theirs["plain"]).abs().max() > 1e-3, name


def corner() -> Tensor:
    """A latent mask whose upper left corner is edited."""
    mask = torch.zeros(1, 8, 10)
    mask[:, :4, :6] = 1
    return mask


def on_sd3(denoiser: Any, edit: Any, controls: dict[str, PairControl]) -> dict[str, Tensor]:
    out = {}
    for name, made in controls.items():
        result = pair_edit(denoiser, PairPrompts(edit.source, edit.target, prompt(3), 2.0), made, latents()[:, :4])
        out[name] = torch.cat([result.source, result.edited]).cpu()
    return {**out, "maps": attention_maps(denoiser, [(SIGMA, latents()[:, :4])], edit.source, [(2,), (3, 4)]).cpu()}


# ------------------------------------------------------------------------------------------------------ the bundled model
def everything(denoiser: Any, text: Any) -> dict[str, Tensor]:
    """Every edit and the maps, on the bundled flow model."""
    words = [f"a {colour} circle on a gray background" for colour in ("red", "blue")]
    edit, negative = align_prompts(text, *words, blend_words=["red", "blue"]), text.encode("")
    z = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    sigmas = denoiser.schedule(3)
    controls: dict[str, PairControl] = {
        "plain": PairControl(sigmas),
        "P2Plus": P2PControl(edit, sigmas, P2POptions(0.8, 0.5, 0.5)),
        "middle layers": P2PControl(edit, sigmas, P2POptions(1.0, 0.0, from_layer=0.25, until_layer=0.75)),
        "MasaCtrl": MasaCtrl(sigmas, MasaCtrlOptions(1, 0.25)),
        "MasaCtrl of an object": MasaCtrl(sigmas, MasaCtrlOptions(1, 0.25), edit),
    }
    out = {}
    for name, made in controls.items():
        result = pair_edit(denoiser, PairPrompts(edit.source, edit.target, negative, 4.0), made, z)
        out[name] = torch.cat([result.source, result.edited]).cpu()
    out["maps"] = attention_maps(denoiser, [(0.5, z)], edit.source, [(2,), (3,)]).cpu()
    return out


def test_both_hosts_edit_alike_on_the_bundled_flow_model() -> None:
    try:
        native, headless = load_bundled("bundled flow"), load_headless(model="bundled flow")
    except LoadError as error:
        pytest.skip(f"the bundled model is not there: {error}")
    theirs, encoder = everything(headless.denoiser, headless.text), text_encoder_of(native[1])
    prompts = [encoder.encode(text) for text in ("a red circle on a gray background", "a blue circle", "")]
    with open_denoiser(native[0], (4, 4, 12, 12), prompts) as denoiser:
        ours = everything(denoiser, encoder)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
        assert name in ("plain", "maps") or (value - theirs["plain"]).abs().max() > 1e-2, name
