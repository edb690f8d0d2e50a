"""Every U-Net family: one attention edit through diffusers and through ComfyUI, from the same weights, gives the same latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider
from diffusers import UNet2DConditionModel

from editkit.hosts.comfyui.bundled import unet as _host_native
from editkit.hosts.diffusers.denoiser import DiffusersDenoiser
from editkit.hosts.diffusers.schedules import sigma_table
from editkit.hosts.host import open_denoiser, paired_model
from editkit.hosts.sockets import conditioning_of, context_of
from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_batch import interleave, pair_context, pair_rows
from editkit.pipelines.attention.pair_loop import PairPrompts, pair_edit
from editkit.pipelines.attention.pair_sampling import PairPlan, paired_context
from editkit.pipelines.attention.plug_and_play import PlugAndPlay
from editkit.pipelines.attention.step_ranges import step_table
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.inversion.ddim import invert
from editkit.tests.parity.attention_nets import FAMILIES, SHARPER
from editkit.tests.parity.tiny import SCHEDULER, randomise
from editkit.tests.toy_attention import ExplicitEdit, refine_edit, replace_edit
from editkit.tests.toys import random_latent

TOKENS, WIDTH, POOLED, LATENT_PIXELS = 7, 16, 12, (8, 12)
WORDS = {"blend_source": (2, 3), "blend_target": (2,)}


def network(family: str) -> UNet2DConditionModel:
    """As `attention_nets.network`, 32 channels wide: the host's GroupNorms want that at first."""
    config = FAMILIES[family]
    with torch.inference_mode(False):
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32,) * len(config["down_block_types"]),
            cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8, **config,
        )  # fmt: skip
        randomise(unet, 3, std=0.08)
        for name, value in unet.named_parameters():
            part = name.split(".")
            value.data.mul_(SHARPER.get(".".join(part[-3:-1]) if "to_out" in name else part[-2], 1.0))
    return unet


def native_config(config: Any) -> dict[str, Any]:
    """diffusers' config of any of these families as the host's `UNetModel` wants it."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    depth = config["transformer_layers_per_block"]
    depths = list(depth) if isinstance(depth, (tuple, list)) else [depth] * levels
    down = [d if "CrossAttn" in kind else 0 for d, kind in zip(depths, config["down_block_types"], strict=True)]
    up = [d if "CrossAttn" in kind else 0 for d, kind in zip(depths, config["up_block_types"][::-1], strict=True)]
    sizes = config["projection_class_embeddings_input_dim"]
    return {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1] * levels,
        "num_res_blocks": [layers] * levels, "use_spatial_transformer": True,
        "transformer_depth": [d for d in down for _ in range(layers)], "transformer_depth_middle": depths[-1],
        "transformer_depth_output": [d for d in up for _ in range(layers + 1)], "context_dim": WIDTH,
        "use_linear_in_transformer": bool(config["use_linear_projection"]), "num_heads": 2, "num_head_channels": -1,
        "adm_in_channels": sizes, "num_classes": None if sizes is None else "sequential", "legacy": False,
        "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False,
    }  # fmt: skip


def native(unet: UNet2DConditionModel, family: str) -> Any:
    """The same network as a MODEL."""
    kind = comfy.model_base.ModelType.V_PREDICTION if family == "sd2" else comfy.model_base.ModelType.EPS
    shape = native_config(unet.config)

    class Config(_host_native.BundledConfig):
        editkit_family = family

    class Model(comfy.model_base.BaseModel):
        def encode_adm(self, noise, pooled_output=None, **kwargs):
            if shape["adm_in_channels"] is None:
                return None
            height, width = (side * 8 for side in noise.shape[-2:])
            ids = unet.add_time_proj(torch.tensor([height, width, 0, 0, height, width]).float()).flatten()[None]
            return torch.cat([pooled_output, ids.expand(len(pooled_output), -1)], dim=1)

    config = Config(shape)
    config.latent_format = comfy.latent_formats.SD15(0.18215)
    config.set_inference_dtype(torch.float32, None)
    model = Model(config, model_type=kind)
    _host_native.set_groups(model.diffusion_model, 8)
    names = comfy.utils.unet_to_diffusers(shape)
    weights = {names[key]: value.clone() for key, value in unet.state_dict().items()}
    _host_native.load(model.diffusion_model, weights, "unet")
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


@pytest.fixture(scope="module", params=list(FAMILIES))
def hosts(request) -> tuple[DiffusersDenoiser, Any]:
    """One network in both hosts."""
    unet = network(request.param)
    denoiser = DiffusersDenoiser(
        unet=unet, table=sigma_table(SCHEDULER), prediction="v_prediction" if request.param == "sd2" else "epsilon",
        family=request.param, scaling_factor=0.18215, factor=8,
    )  # fmt: skip
    return denoiser, native(unet, request.param)


def prompt(seed: int, hosted: bool = False) -> Context:
    tokens, pooled = random_latent(1, TOKENS, WIDTH, seed=seed), random_latent(1, POOLED, seed=seed + 50)
    if hosted:
        return context_of([[tokens, {"pooled_output": pooled}]], "positive")
    return Context(tokens, pooled)


class Spy(Passive):
    """Notes every site and every block, without its rows."""

    def __init__(self) -> None:
        self.sites, self.blocks = [], []

    def wants(self, site):
        self.sites.append(replace(site, rows=()))
        return False

    def wants_features(self, place, block, blocks):
        return True

    def features(self, x, site):
        self.blocks.append((replace(site, rows=()), tuple(x.shape[1:])))
        return x


def test_both_hosts_name_the_same_places(hosts):
    headless, model = hosts
    z, seen = random_latent(2, 4, *LATENT_PIXELS), []
    for hosted in (False, True):
        spy, pair = Spy(), pair_context(prompt(1, hosted), prompt(2, hosted), 1)
        controlled = Controlled(spy, pair_rows(1, ("cond",)))
        if hosted:
            with open_denoiser(model, z.shape, [pair]) as denoiser:
                out = denoiser.denoise(z, 2.0, [pair], controlled)
        else:
            out = headless.denoise(z, 2.0, [pair], controlled)
        seen.append((list(dict.fromkeys(spy.sites)), spy.blocks, out))
    assert seen[0][0] == seen[1][0] and len(seen[0][0]) == 2 * seen[0][0][0].layers > 10
    assert seen[0][1] == seen[1][1]
    assert (seen[0][2] - seen[1][2]).abs().max() <= 1e-4 * seen[0][2].abs().max()


def controls(edit, sigmas) -> dict[str, Any]:
    blend = LocalBlendOptions(start=0.3, threshold=0.6, divisor=2)
    return {
        "p2plus": P2PControl(edit, sigmas, P2POptions(0.8, 0.6, 0.4)),
        "local blend": P2PControl(replace(edit, **WORDS), sigmas, P2POptions(0.8, 0.6, 0.4, local_blend=blend)),
        "masactrl": MasaCtrl(sigmas, MasaCtrlOptions(from_step=1)),
        "masactrl of an object": MasaCtrl(sigmas, MasaCtrlOptions(1), replace(edit, **WORDS)),
        "injection": PlugAndPlay(sigmas),
    }


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("p2plus", "noise"),
        ("local blend", "noise"),
        ("local blend", "image"),
        ("masactrl", "noise"),
        ("masactrl of an object", "image"),
        ("injection", "image"),
    ],
)
def test_the_same_edit_in_both_hosts(hosts, kind, start):
    headless, model = hosts
    results = []
    for hosted in (False, True):
        contexts = [prompt(seed, hosted) for seed in (1, 2, 3)]
        edit = refine_edit(*contexts[:2])

        def edited(denoiser, contexts=contexts, edit=edit):
            sigmas = headless.schedule(4)
            noise = random_latent(2, 4, *LATENT_PIXELS, seed=5) * float(sigmas[0])
            path = (
                invert(denoiser, random_latent(2, 4, *LATENT_PIXELS, seed=6), contexts[0], sigmas)
                if start == "image"
                else noise
            )
            result = pair_edit(denoiser, PairPrompts(*contexts, 4.0), controls(edit, sigmas)[kind], path)
            return result.source, result.edited

        if hosted:
            with open_denoiser(model, (4, 4, *LATENT_PIXELS), contexts) as denoiser:
                results.append(edited(denoiser))
        else:
            results.append(edited(headless))
    (source, target), (same_source, same_target) = results
    assert (same_source - source).norm() <= 1e-3 * source.norm()
    assert (same_target - target).norm() <= 1e-3 * target.norm()
    assert (target - source).norm() > 0.01 * source.norm()


def test_a_native_sampler_on_every_family(hosts):
    """Two entries of everything a family needs: KSampler's pair is our loop's."""
    headless, model = hosts
    sigmas, noise = headless.schedule(4), random_latent(1, 4, *LATENT_PIXELS, seed=5)

    def control(contexts, grid):
        return controls(refine_edit(*contexts[:2]), grid)["local blend"]

    ours = [prompt(seed) for seed in (1, 2, 3)]
    prompts = PairPrompts(*ours, 4.0)
    wanted = pair_edit(headless, prompts, control(ours, sigmas), noise * float(sigmas[0]))
    theirs = [prompt(seed, True) for seed in (1, 2, 3)]
    patched = paired_model(model, PairPlan(lambda grid: control(theirs, grid), tokens=TOKENS))
    positive = conditioning_of(paired_context(theirs[0], theirs[1]))
    guider = CFGGuider().get_guider(patched, positive, theirs[2].host, 4.0)[0]
    start, sampler = torch.zeros(2, 4, *LATENT_PIXELS), comfy.samplers.sampler_object("euler")
    got = guider.sample(noise.repeat(2, 1, 1, 1), start, sampler, sigmas, disable_pbar=True, seed=1) * 0.18215
    assert (got[:1] - wanted.source).norm() <= 1e-3 * wanted.source.norm()
    assert (got[1:] - wanted.edited).norm() <= 1e-3 * wanted.edited.norm()


@pytest.mark.parametrize("make", [replace_edit, refine_edit])
def test_two_attentions_equal_the_explicit_maps(hosts, make):
    """The published order of operations on whole maps, at every layer of the native network and every step."""
    _, model = hosts
    contexts = [prompt(seed, True) for seed in (1, 2, 3)]
    edit = make(*contexts[:2], equalizer=torch.linspace(0.5, 3, TOKENS), step_ranges={2: (0.0, 0.3), 4: (0.4, 1.0)})
    z, prompts = random_latent(2, 4, *LATENT_PIXELS, seed=8), [pair_context(*contexts[:2], 1), contexts[2]]
    with open_denoiser(model, z.shape, prompts) as denoiser:
        sigmas = denoiser.schedule(4)
        ours = P2PControl(edit, sigmas, P2POptions(0.8, 0.6, 0.3))
        explicit = ExplicitEdit(edit, ours.step, step_table(edit, 0.8, 4), ours.self_branches)
        rows = pair_rows(1, ("cond", "uncond"))
        for sigma in sigmas[:-1].tolist():
            state = interleave(z[:1], z[1:]) * sigma
            a, b = (denoiser.denoise(state, sigma, prompts, Controlled(control, rows)) for control in (ours, explicit))
            plain = denoiser.denoise(state, sigma, prompts)
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
            assert (a - plain)[:, 0].abs().max() <= 1e-5 * plain.abs().max()
            assert (a - plain)[0, 1].abs().max() >= 1e-3 * plain.abs().max()
