"""Attention edits as a MODEL patch under the host's own samplers: pairs of latents, whatever the sampler does."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import comfy_extras.nodes_pag
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    CFGGuider,
    DualCFGGuider,
    Noise_EmptyNoise,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_perpneg import PerpNegGuider
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.host import blended_model, open_denoiser, paired_model, sampling_of
from editkit.hosts.sockets import context_of
from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.masactrl import MasaCtrl
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_batch import interleave
from editkit.pipelines.attention.pair_loop import PairPrompts, pair_edit
from editkit.pipelines.attention.pair_sampling import PairPlan
from editkit.pipelines.attention.plug_and_play import PlugAndPlay
from editkit.pipelines.attention.prompts.prompt_edit import PromptEdit
from editkit.pipelines.core.errors import MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.masks import constant_schedule
from editkit.pipelines.inversion.ddim import invert
from editkit.tests.comfyui.host.test_attention import hooks_of
from editkit.tests.comfyui.host.test_model import Stop
from editkit.tests.comfyui.host.tiny import cond, digest, latent, same_weights, tokens

HEIGHT, WIDTH, COUNT = 12, 8, 77
EVERYWHERE = LocalBlendOptions(start=0.0, threshold=-1.0)
SAMPLERS = (
    "euler",
    "dpmpp_2m",
    "heun",
    "uni_pc",
    "euler_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "lcm",
    "er_sde",
    "ddim",
)


def prompt_edit(source: int = 1, target: int = 2, *, blends: bool = False) -> PromptEdit:
    """An edit with a mapper that moves tokens, alphas that are 1 for most, and weights."""
    generator = torch.Generator().manual_seed(5)
    mapper = torch.eye(COUNT)[torch.randperm(COUNT, generator=generator)]
    alphas = (torch.rand(COUNT, generator=generator) > 0.3).float()
    words = {"blend_source": (3,), "blend_target": (4, 5)} if blends else {}
    first, second = (context_of(cond(seed), "prompt") for seed in (source, target))
    return PromptEdit(first, second, mapper, alphas, torch.ones(COUNT) * 1.5, {7: (0.2, 0.6)}, **words)


def same_prompt() -> PromptEdit:
    """The edit of a prompt into itself."""
    edit = prompt_edit(1, 1)
    return replace(edit, mapper=torch.eye(COUNT), alphas=torch.ones(COUNT), equalizer=torch.ones(COUNT), step_ranges={})


def p2p_plan(edit: PromptEdit, **options) -> PairPlan:
    more = {name: options.pop(name) for name in ("sigmas", "share_noise", "trajectory") if name in options}
    settings = P2POptions(self_divisor=1, **{"self_until": 0.5, "uncond_self_until": 0.5, **options})
    return PairPlan(lambda sigmas: P2PControl(edit, sigmas, settings), tokens=edit.token_count, **more)


def both(edit: PromptEdit) -> list:
    """The CONDITIONING with a row for source and target."""
    return [[torch.cat([edit.source.tokens, edit.target.tokens]), {}]]


def run(model, positive, source: Tensor, *, name: str = "euler", cfg: float = 3.0, seed: int = 5, **more) -> Tensor:
    arguments = {"steps": 5, "denoise": 0.9, "scheduler": "normal", **more}
    return stock_nodes.common_ksampler(
        model, seed, arguments.pop("steps"), cfg, name, arguments.pop("scheduler"), positive, cond(9), {"samples": source},
        **arguments,
    )[0]["samples"]  # fmt: skip


def start(pairs: int = 1) -> Tensor:
    return latent(3, pairs, HEIGHT, WIDTH).repeat_interleave(2, dim=0)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    return float((a - b).norm() / b.norm()) <= tolerance


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_source_is_what_it_is_alone_and_the_target_is_edited(model, name: str) -> None:
    edit = prompt_edit()
    patched = paired_model(model, p2p_plan(edit))
    result = run(patched, both(edit), start(), name=name)
    alone = run(model, cond(1), start()[:1], name=name)
    assert close(result[:1], alone)
    assert not close(result[1:], alone, 0.05)
    plain = run(model, cond(2), start()[:1], name=name)
    assert not close(result[1:], plain, 0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_closed_gates_are_plain_sampling_of_the_target(model, name: str) -> None:
    edit = replace(prompt_edit(), step_ranges={})
    plan = p2p_plan(edit, cross_until=0.0, self_until=0.0, uncond_self_until=0.0)
    result = run(paired_model(model, plan), both(edit), start(), name=name)
    assert close(result[1:], run(model, cond(2), start()[:1], name=name))


def plans(edit: PromptEdit) -> dict[str, PairPlan]:
    return {
        "p2p": p2p_plan(edit),
        "local blend": p2p_plan(replace(edit, blend_source=(3,), blend_target=(4, 5))),
        "masactrl": PairPlan(lambda sigmas: MasaCtrl(sigmas)),
        "features": PairPlan(lambda sigmas: PlugAndPlay(sigmas)),
    }


@pytest.mark.parametrize("kind", list(plans(same_prompt())))
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_identical_prompts_give_the_identical_image(model, kind: str, name: str) -> None:
    edit = same_prompt()
    result = run(paired_model(model, plans(edit)[kind]), both(edit), start(), name=name)
    assert close(result[:1], run(model, cond(1), start()[:1], name=name))
    assert close(result[1:], result[:1], 1e-4)


@pytest.mark.parametrize("kind", list(plans(same_prompt())))
def test_our_own_loop_gives_the_same_latents(model, kind: str) -> None:
    edit, sigmas = prompt_edit(), sampling_of(model).schedule(6)
    plan = plans(edit)[kind]
    noise = torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))
    guider = CFGGuider().get_guider(paired_model(model, plan), both(edit), cond(9), 3.0)[0]
    sampler = comfy.samplers.sampler_object("euler")
    zeros = torch.zeros(2, 4, HEIGHT, WIDTH)
    theirs = guider.sample(
        interleave(noise, torch.randn_like(noise)), zeros, sampler, sigmas, disable_pbar=True, seed=1
    )

    contexts = [edit.source, edit.target, context_of(cond(9), "negative")]
    with open_denoiser(model, (2, 4, HEIGHT, WIDTH), contexts, sigmas=sigmas) as denoiser:
        first = noise * float(sigmas[0])
        prompts = PairPrompts(*contexts, 3.0)
        ours = pair_edit(denoiser, prompts, plan.make(sigmas), first)
        source, edited = denoiser.scale_out(ours.source), denoiser.scale_out(ours.edited)
    assert close(source, theirs[:1], 1e-4) and close(edited, theirs[1:], 1e-4)
    assert not close(edited, source, 0.05)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_sde"])
def test_any_number_of_pairs_side_by_side(model, name: str) -> None:
    """Pairs do not see each other: the first of two is what it is alone."""
    edit = prompt_edit(blends=True)
    patched = paired_model(model, p2p_plan(edit))
    one, two = (run(patched, both(edit), start(pairs), name=name, denoise=0.6) for pairs in (1, 2))
    if name == "euler":  # the noise of other samplers is drawn for a batch as a whole
        assert close(two[:2], one)
    assert not close(two[2:], two[:2], 0.05)
    assert torch.isfinite(two).all()


def test_a_target_with_its_own_noise(model) -> None:
    edit = same_prompt()
    patched = paired_model(model, p2p_plan(edit, share_noise=False, self_until=0.0, uncond_self_until=0.0))
    result = run(patched, both(edit), start())
    assert not close(result[1:], result[:1], 0.05)


def test_local_blend_keeps_what_the_words_do_not_touch(model) -> None:
    edit = prompt_edit(blends=True)
    for name in ("euler", "dpmpp_2m", "euler_ancestral"):
        nowhere = run(
            paired_model(model, p2p_plan(edit, local_blend=LocalBlendOptions(0.0, 1.0))),
            both(edit),
            start(),
            name=name,
        )
        assert close(nowhere[1:], nowhere[:1], 1e-4)
        everywhere = run(paired_model(model, p2p_plan(edit, local_blend=EVERYWHERE)), both(edit), start(), name=name)
        without = run(paired_model(model, p2p_plan(prompt_edit())), both(edit), start(), name=name)
        assert close(everywhere, without, 1e-4)
        part = run(
            paired_model(model, p2p_plan(edit, local_blend=LocalBlendOptions(0.0, 0.97, pool=1))),
            both(edit),
            start(),
            name=name,
        )
        differs = (part[1] - part[0]).abs().amax(0) > 1e-3
        assert 0 < differs.float().mean() < 1


def guiders(model, edit: PromptEdit) -> dict[str, object]:
    """Guiders hand their prompts over in orders of their own."""
    positive, negative = both(edit), cond(9)
    return {
        "cfg": CFGGuider().get_guider(model, positive, negative, 3.0)[0],
        "dual": DualCFGGuider().get_guider(model, positive, cond(8), negative, 3.0, 1.5, "regular")[0],
        "perpneg": PerpNegGuider.execute(model, positive, negative, cond(7), 3.0, 1.0)[0],
        "basic": BasicGuider().get_guider(model, positive)[0],
    }


@pytest.mark.parametrize("kind", ["cfg", "dual", "perpneg", "basic"])
def test_guiders_of_all_kinds(model, kind: str) -> None:
    """The unconditional branches are plain sampling for tau_u = 0, so an edit that does nothing to the rest is the target."""
    edit, sigmas = replace(prompt_edit(), step_ranges={}), sampling_of(model).schedule(5, 0.9)
    sampler, source = comfy.samplers.sampler_object("euler"), {"samples": start()}

    def sampled(plan) -> Tensor:
        patched = model if plan is None else paired_model(model, plan)
        return SamplerCustomAdvanced().sample(
            Noise_RandomNoise(3), guiders(patched, edit)[kind], sampler, sigmas, source
        )[0]["samples"]

    closed = sampled(p2p_plan(edit, cross_until=0.0, self_until=0.0, uncond_self_until=0.0))
    alike = close if kind != "perpneg" else (lambda *_: True)  # its projection sums over the whole batch
    assert alike(sampled(None)[:1], closed[:1])
    uncond_only = sampled(p2p_plan(edit, cross_until=0.0, self_until=0.0, uncond_self_until=1.0))
    assert close(uncond_only, closed) == (kind == "basic"), "tau_u acts where there is an unconditional branch"
    edited = sampled(p2p_plan(edit, uncond_self_until=0.0))
    assert alike(edited[:1], closed[:1]) and not close(edited[1:], closed[1:], 0.01)


def test_areas_put_the_parts_in_another_order(model) -> None:
    """The host adds parts to the negative for the positive's areas; each keeps its branch."""
    edit = replace(prompt_edit(), step_ranges={})
    positive = [[both(edit)[0][0], {"area": (8, 8, 2, 0), "strength": 1.0}], *both(edit)]
    plan = p2p_plan(edit, cross_until=0.0, self_until=0.0, uncond_self_until=1.0)
    patched = paired_model(model, plan)
    assert close(run(patched, positive, start(), cfg=1.0), run(patched, positive, start(), cfg=1.0))
    seen = run(patched, positive, start())
    closed = run(
        paired_model(model, p2p_plan(edit, cross_until=0.0, self_until=0.0, uncond_self_until=0.0)),
        positive,
        start(),
    )
    assert close(seen[:1], closed[:1]) and not close(seen[1:], closed[1:])


def test_guidance_of_other_nodes_is_controlled_too(model) -> None:
    """PAG evaluates the positive prompt once more: its rows are pairs as well, and where both replace a layer we refuse."""
    edit = replace(prompt_edit(), step_ranges={})
    cross = p2p_plan(edit, self_until=0.0, uncond_self_until=0.0)
    pag = comfy_extras.nodes_pag.PerturbedAttentionGuidance

    def with_pag(plan) -> Tensor:
        patched = paired_model(model, plan)
        both_nodes = pag.execute(patched, 2.0) if hasattr(pag, "execute") else pag().patch(patched, 2.0)
        return run(both_nodes[0], both(edit), start())

    assert not close(with_pag(cross), run(paired_model(model, cross), both(edit), start()), 0.01)
    with pytest.raises(ParameterError, match="self-attention of the model's mid block 0"):
        with_pag(p2p_plan(edit))


def test_a_real_image_follows_its_trajectory(model) -> None:
    sigmas, image = sampling_of(model).schedule(6), latent(4, 1, HEIGHT, WIDTH)
    edit = prompt_edit(blends=True)
    with open_denoiser(model, image.shape, [edit.source], sigmas=sigmas) as denoiser:
        trajectory = invert(denoiser, image, edit.source, sigmas)
        noised = denoiser.scale_out(trajectory.latents[0])
        contexts = [edit.source, edit.target, context_of(cond(9), "negative")]
        ours = pair_edit(denoiser, PairPrompts(*contexts, 3.0), p2p_plan(edit).make(sigmas), trajectory)
        ours = denoiser.scale_out(ours.edited)
    patched = paired_model(model, p2p_plan(edit, trajectory=lambda: trajectory))
    for name in ("euler", "dpmpp_2m"):
        guider = CFGGuider().get_guider(patched, both(edit), cond(9), 3.0)[0]
        sampler = comfy.samplers.sampler_object(name)
        out = SamplerCustomAdvanced().sample(
            Noise_EmptyNoise(), guider, sampler, sigmas, {"samples": noised.repeat(2, 1, 1, 1)}
        )[0]
        assert torch.equal(out["samples"][:1], image)
        assert close(out["samples"][1:], ours, 1e-4) == (name == "euler")
        assert not close(out["samples"][1:], image, 0.05)
    with pytest.raises(MismatchError, match="trajectory"):
        run(patched, both(edit), start(), steps=3)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_sde"])
@pytest.mark.parametrize("first", ["pairs", "blend"])
def test_with_a_blended_model(model, first: str, name: str) -> None:
    """Both patches on one MODEL, in either order: pairs inside the mask, the image outside."""
    edit, mask = prompt_edit(blends=True), torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 3:9, 2:6] = 1
    patches = {
        "pairs": lambda m: paired_model(m, p2p_plan(edit)),
        "blend": lambda m: blended_model(m, constant_schedule(mask), None, None),
    }
    order = [first, *(kind for kind in patches if kind != first)]
    patched = patches[order[1]](patches[order[0]](model))
    result = run(patched, both(edit), start(), name=name)
    outside = (mask == 0).expand(4, -1, -1)
    assert (result - start())[:, outside].abs().max() <= 1e-4
    inside = (mask == 1).expand(4, -1, -1)
    assert not close(result[0][inside], start()[0][inside], 0.05) and not close(
        result[1][inside], result[0][inside], 0.01
    )


def test_misfits_are_refused(model) -> None:
    edit = prompt_edit()
    patched = paired_model(model, p2p_plan(edit))
    with pytest.raises(ShapeError, match="3 rows"):
        run(patched, both(edit), latent(1, 3, HEIGHT, WIDTH))
    with pytest.raises(MismatchError, match="positive has 1 rows"):
        run(patched, cond(1), start())
    with pytest.raises(MismatchError, match="positive has 50 tokens"):
        run(patched, [[tokens(1, 2, 50), {}]], start())
    with pytest.raises(ParameterError, match="already"):
        paired_model(patched.clone(), p2p_plan(edit))
    with pytest.raises(ParameterError, match="attention edit"), open_denoiser(patched, start().shape, []):
        pass
    own_way = patched.clone()
    own_way.set_model_sampler_calc_cond_batch_function(lambda args: [args["input"]] * 2)
    with pytest.raises(MismatchError, match="another node calls the model without the attention edit"):
        run(own_way, both(edit), start())


def test_nothing_of_the_model_changes(model) -> None:
    before, options, wrappers = digest(model.model), repr(model.model_options), repr(model.wrappers)
    plain = run(model, cond(1), start())
    calls: list[int] = []

    def fail(args):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise Stop
        return args["denoised"]

    for kind, plan in plans(prompt_edit()).items():
        patched = paired_model(model, plan)
        patched_options = repr(patched.model_options)
        run(patched, both(prompt_edit()), start())
        failing = patched.clone()
        failing.set_model_sampler_post_cfg_function(fail)
        with pytest.raises(Stop):
            run(failing, both(prompt_edit()), start())
        assert hooks_of(model) == 0, kind
        assert repr(patched.model_options) == patched_options
    assert torch.equal(run(model, cond(1), start()), plain)
    assert same_weights(model.model, before)
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)


def test_runs_are_independent(model) -> None:
    """What LocalBlend collected in one run is gone in the next, after an error too."""
    edit = prompt_edit(blends=True)
    patched = paired_model(model, p2p_plan(edit, local_blend=LocalBlendOptions(0.0, 0.4)))
    once = run(patched, both(edit), start())
    run(patched, both(edit), start(), seed=8)
    assert torch.equal(run(patched, both(edit), start()), once)
