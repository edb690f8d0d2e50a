"""Attention edits as whole runs on real U-Nets: the invariants of methods.md, sections 7, 8, 11.6 and 11.7, and T18."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.masactrl import MasaCtrl, MasaCtrlOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_batch import interleave, pair_context, pair_rows, separate
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.pair_loop import PairPrompts, attention_edit, pair_edit
from editkit.pipelines.attention.plug_and_play import PlugAndPlay, PlugAndPlayOptions
from editkit.pipelines.attention.step_ranges import step_table
from editkit.pipelines.core.attention_sites import Controlled
from editkit.pipelines.core.errors import MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.samplers import predictor, sample
from editkit.pipelines.inversion.ddim import invert, reconstruct
from editkit.pipelines.inversion.negative_embeddings import Embeddings
from editkit.pipelines.inversion.proximal import Proximal
from editkit.tests.parity import attention_nets as nets
from editkit.tests.toy_attention import ExplicitEdit, refine_edit, replace_edit
from editkit.tests.toys import random_latent

STEPS, SCALE = 6, 4.0
BLEND = LocalBlendOptions(start=0.3, divisor=2)
ALL = P2POptions(0.8, 0.6, 0.4, local_blend=BLEND)
LINES = {"blend_source": (2, 3), "blend_target": (2,)}


def model_of(family="bundled"):
    model = nets.denoiser(family)
    return model, nets.prompt(1, family), nets.prompt(2, family), nets.prompt(3, family)


def start_of(model, images=2, steps=STEPS):
    sigmas = model.schedule(steps)
    return sigmas, random_latent(images, 4, 8, 8, seed=7) * (1 + float(sigmas[0]) ** 2) ** 0.5


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def edits(source, target):
    return {
        "replace": replace_edit(source, target),
        "refine": refine_edit(source, target),
        "reweight": replace_edit(source, target, equalizer=torch.linspace(0.5, 3, 7)),
        "windows": replace_edit(source, target, step_ranges={2: (0.0, 0.3), 4: (0.5, 1.0)}),
    }


def controls(model, sigmas, edit):
    return {
        "p2p": P2PControl(edit, sigmas, P2POptions(0.8, 0.4)),
        "p2plus": P2PControl(edit, sigmas, P2POptions(0.8, 0.4, 0.5)),
        "masactrl": MasaCtrl(sigmas, MasaCtrlOptions(from_step=1)),
        "injection": PlugAndPlay(sigmas),
    }


# ------------------------------------------------------------------------------------------------------------ identities
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *[("bundled", kind) for kind in ("replace", "windows", "p2plus", "blend", "masactrl", "injection")],
        ("sd1", "blend"), ("sd2", "p2plus"), ("sdxl", "blend"), ("sdxl", "injection"),
    ],
)  # fmt: skip
def test_identical_prompts_give_the_identical_latent(family, kind):
    model, source, _, negative = model_of(family)
    sigmas, z = start_of(model, steps=3)
    edit = replace_edit(source, source, **(LINES if kind == "blend" else {}))
    if kind == "windows":
        edit = edits(source, source)["windows"]
    control = controls(model, sigmas, edit).get(kind) or P2PControl(edit, sigmas, ALL)
    result = pair_edit(model, PairPrompts(source, source, negative, SCALE), control, z)
    assert close(result.edited, result.source, 2e-6) and not torch.equal(result.source, z)


@pytest.mark.parametrize("from_path", [False, True])
def test_empty_step_ranges_are_plain_sampling_of_the_target(from_path):
    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    start = invert(model, random_latent(2, 4, 8, 8), source, sigmas) if from_path else z
    begin = start.latents[0] if from_path else z
    plain = sample("euler", predictor(model, EditPrompts(target, negative, SCALE)), begin, sigmas)
    closed = {
        "p2p": P2PControl(edits(source, target)["refine"], sigmas, P2POptions(0, 0, 0)),
        "masactrl": MasaCtrl(sigmas, MasaCtrlOptions(from_step=STEPS)),
        "injection": PlugAndPlay(sigmas, PlugAndPlayOptions(features_until=0, attention_until=0)),
        "everywhere": P2PControl(
            replace_edit(source, target, **LINES), sigmas,
            P2POptions(0, 0, 0, local_blend=LocalBlendOptions(start=0, threshold=-1, divisor=2)),
        ),
    }  # fmt: skip
    for name, control in closed.items():
        result = pair_edit(model, PairPrompts(source, target, negative, SCALE), control, start)
        assert close(result.edited, plain), name


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd1", "p2p"), ("sdxl", "p2plus"), ("sd1", "masactrl"), ("sdxl", "masactrl"), ("sd2", "injection")],
)
def test_the_source_is_its_own_run(family, kind):
    model, source, target, negative = model_of(family)
    sigmas, z = start_of(model, steps=3)
    alone = sample("euler", predictor(model, EditPrompts(source, negative, SCALE)), z, sigmas)
    control = controls(model, sigmas, edits(source, target)["refine"])[kind]
    result = pair_edit(model, PairPrompts(source, target, negative, SCALE), control, z)
    assert close(result.source, alone, 2e-6)
    plain = sample("euler", predictor(model, EditPrompts(target, negative, SCALE)), z, sigmas)
    assert not close(result.edited, plain, 2e-4)  # the edit did something


def test_without_guidance_the_unconditional_part_is_irrelevant():
    model, source, target, _ = model_of()
    sigmas, z = start_of(model)
    with_u, without = (
        attention_edit(
            model, edits(source, target)["refine"], None, z, sigmas=sigmas, guidance_scale=1,
            options=P2POptions(0.8, 0.4, u),
        )
        for u in (1.0, 0.0)
    )  # fmt: skip
    assert torch.equal(with_u.edited, without.edited)
    guided = [
        attention_edit(
            model, edits(source, target)["refine"], nets.prompt(3), z, sigmas=sigmas, guidance_scale=3,
            options=P2POptions(0.8, 0.4, u),
        ).edited
        for u in (1.0, 0.0)
    ]  # fmt: skip
    assert not close(*guided, 1e-4)


def test_the_first_step_from_one_noise_has_nothing_to_replace_in_the_unconditional_branch():
    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    first = sigmas[:2]
    plus, plain = (
        attention_edit(
            model, edits(source, target)["replace"], negative, z, sigmas=first, options=P2POptions(1, 1, u)
        ).edited
        for u in (1.0, 0.0)
    )
    assert close(plus, plain, 2e-6)


def test_reweighting_by_1_is_replacing():
    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    weights = [torch.ones(7), torch.linspace(0, 4, 7)]
    by_1, by_more = (
        attention_edit(model, replace_edit(source, target, equalizer=scale), negative, z, sigmas=sigmas).edited
        for scale in weights
    )
    plain = attention_edit(model, replace_edit(source, target), negative, z, sigmas=sigmas).edited
    assert torch.equal(by_1, plain) and not close(by_more, plain, 1e-3)


# ----------------------------------------------------------------------------------------------------- whole maps instead
@pytest.mark.parametrize("family", list(nets.FAMILIES))
@pytest.mark.parametrize("kind", ["replace", "refine", "reweight", "windows"])
def test_folded_attention_equals_whole_maps(family, kind):
    """The published order of operations on materialised maps gives the same predictions at every gate setting."""
    model, source, target, negative = model_of(family)
    edit, options = edits(source, target)[kind], P2POptions(0.7, 0.5, 0.25)
    sigmas = model.schedule(4)
    control = P2PControl(edit, sigmas, options)
    table = step_table(edit, options.cross_until, 4)
    explicit = ExplicitEdit(edit, control.step, table, control.self_branches)
    z = interleave(random_latent(1, 4, 8, 8, seed=1), random_latent(1, 4, 8, 8, seed=2)) * 3
    contexts, rows = [pair_context(source, target, 1), negative], pair_rows(1, ("cond", "uncond"))
    for sigma in sigmas[:-1].tolist():
        ours, theirs = (model.denoise(z, sigma, contexts, Controlled(c, rows)) for c in (control, explicit))
        assert close(ours, theirs)
    plain = model.denoise(z, float(sigmas[0]), contexts)
    edited = model.denoise(z, float(sigmas[0]), contexts, Controlled(control, rows))
    assert close(edited[:, 0], plain[:, 0], 2e-6) and not close(edited[0, 1], plain[0, 1], 1e-3)


# ------------------------------------------------------------------------------------------------- T18: who is evaluated when
class Arranged:
    """A denoiser whose calls are made in another arrangement: contexts reversed, or one at a time."""

    def __init__(self, inner, how):
        self.inner, self.how = inner, how

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def denoise(self, z, sigma, contexts, control=None):
        order = list(reversed(range(len(contexts))))
        groups = [[i] for i in order] if self.how == "apart" else [order]
        out = {}
        for group in groups:
            named = control
            if control is not None and not control.rows.mixed:
                rows = replace(control.rows, branches=tuple(control.rows.branches[i] for i in group))
                named = Controlled(control.control, rows)
            out.update(zip(group, self.inner.denoise(z, sigma, [contexts[i] for i in group], named), strict=True))
        return torch.stack([out[i] for i in range(len(contexts))])


@pytest.mark.parametrize("how", ["reversed", "apart", "few rows"])
@pytest.mark.parametrize("kind", ["blend", "masactrl", "masked", "injection"])
def test_arrangement_of_calls_does_not_matter(how, kind):
    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    edit = refine_edit(source, target, **LINES)
    control = controls(model, sigmas, edit).get(kind) or P2PControl(edit, sigmas, ALL)
    if kind == "masked":
        control = MasaCtrl(sigmas, MasaCtrlOptions(from_step=2), edit)
    prompts = PairPrompts(source, target, negative, SCALE)
    wanted = pair_edit(model, prompts, control, z).edited
    other = Arranged(model, how)
    model.max_rows = 2 if how == "few rows" else None
    assert close(pair_edit(other, prompts, control, z).edited, wanted)


def test_images_of_a_batch_do_not_know_each_other():
    model, source, target, negative = model_of()
    sigmas, z = start_of(model, images=3)
    edit = refine_edit(source, target, **LINES)
    path = invert(model, random_latent(3, 4, 8, 8), source, sigmas)

    def alone(i):
        return replace(path, latents=path.latents[:, [i]], source_latent=path.source_latent[[i]])

    for start, part in ((z, lambda i: z[[i]]), (path, alone)):
        run = {"negative": negative, "sigmas": sigmas, "guidance_scale": SCALE, "options": ALL}
        together = attention_edit(model, edit, start=start, **run).edited
        for i in (0, 2):
            assert close(attention_edit(model, edit, start=part(i), **run).edited[0], together[i])


def test_out_of_memory_inside_a_run_changes_nothing():
    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    edit = refine_edit(source, target, **LINES)
    wanted = attention_edit(model, edit, negative, z, sigmas=sigmas, options=ALL).edited
    layer, calls = model.unet.up_blocks[2].attentions[1].transformer_blocks[0].ff, []

    def full(module, args):
        calls.append(len(args[0]))
        if len(args[0]) > 4:
            raise torch.cuda.OutOfMemoryError("no room")

    handle = layer.register_forward_pre_hook(full)
    got = attention_edit(model, edit, negative, z, sigmas=sigmas, options=ALL).edited
    handle.remove()
    assert calls[0] == 8 and max(calls[1:]) == 4 and close(got, wanted)


# -------------------------------------------------------------------------------------------------------- real images
def test_an_edit_of_nothing_is_the_reconstruction():
    model, source, target, negative = model_of()
    path = invert(model, random_latent(2, 4, 8, 8), source, model.schedule(5))
    learned = Embeddings(negative, random_latent(5, 2, 7, 16), path.sigmas, path.family, path.fingerprint, path.prompt)
    borrowed = Embeddings(source, None, path.sigmas, path.family, path.fingerprint, path.prompt)
    cut = replace(borrowed, proximal=Proximal(quantile=0.5, inversion_guidance=0.3), trajectory=path)
    for name, kind, scale in (
        ("plain", negative, SCALE), ("null-text", learned, SCALE), ("npi", borrowed, SCALE), ("prox", cut, SCALE),
        ("prox at 1", cut, 1.0), ("none", None, 1.0),
    ):  # fmt: skip
        prompts = PairPrompts(source, target, kind, scale)
        wanted = reconstruct(model, path, target, negative=kind, guidance_scale=scale)
        result = pair_edit(model, prompts, PairControl(path.sigmas), path)
        assert close(result.edited, wanted), name
        assert torch.equal(result.source, path.source)


def test_embeddings_change_from_step_to_step():
    model, source, target, negative = model_of()
    path = invert(model, random_latent(1, 4, 8, 8), source, model.schedule(4))
    same = negative.tokens.expand(4, 1, 7, 16)
    made = Embeddings(negative, same.clone(), path.sigmas, path.family, path.fingerprint, path.prompt)
    edit, options = replace_edit(source, target), P2POptions(0.8, 0.4, 0.5)
    constant = attention_edit(model, edit, negative, path, options=options).edited
    assert close(attention_edit(model, edit, made, path, options=options).edited, constant)
    other = replace(made, tokens=torch.cat([same[:3], random_latent(1, 1, 7, 16)]))
    assert not close(attention_edit(model, edit, other, path, options=options).edited, constant, 1e-3)
    with pytest.raises(MismatchError, match="another model"):
        attention_edit(model, edit, replace(made, fingerprint="other"), path, options=options)


def test_local_blend_returns_the_image_where_nothing_may_change():
    model, source, target, negative = model_of()
    path = invert(model, random_latent(2, 4, 8, 8), source, model.schedule(5))
    edit = replace_edit(source, target, **LINES)
    never = P2POptions(local_blend=LocalBlendOptions(threshold=1.0, divisor=2))
    assert torch.equal(attention_edit(model, edit, negative, path, options=never).edited, path.source)
    strict = LocalBlendOptions(threshold=0.95, pool=1, divisor=2)
    some = attention_edit(model, edit, negative, path, options=P2POptions(local_blend=strict))
    kept = (some.edited == path.source).all(dim=1)
    assert 0 < kept.float().mean() < 1


# -------------------------------------------------------------------------------------------------------------- refusals
def test_what_does_not_belong_together_is_refused(caplog):
    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    edit, path = replace_edit(source, target), invert(model, random_latent(2, 4, 8, 8), source, sigmas)
    prompts = PairPrompts(source, target, negative, SCALE)
    with pytest.raises(MismatchError, match="attention control"):
        pair_edit(model, prompts, P2PControl(edit, model.schedule(5)), path)
    with pytest.raises(MismatchError, match="trajectory"):
        attention_edit(model, edit, negative, path, sigmas=model.schedule(5))
    with pytest.raises(MismatchError, match="another model"):
        attention_edit(nets.denoiser(seed=1), edit, negative, path)
    with pytest.raises(ParameterError, match="negative"):
        attention_edit(model, edit, None, path)
    with pytest.raises(ParameterError, match="sigmas"):
        attention_edit(model, edit, negative, z)
    with pytest.raises(ShapeError, match="latent has 2"):
        attention_edit(model, replace_edit(nets.prompt(1, rows=3), target), negative, z, sigmas=sigmas)
    assert not caplog.records
    attention_edit(model, replace_edit(target, source), negative, path)
    assert "another prompt" in caplog.text


def test_a_cancelled_run_leaves_nothing_behind():
    class Cancelled(Exception):
        pass

    def cancel(done, total, preview=None):
        assert total == STEPS and preview.shape == (2, 4, 8, 8)
        if done == 2:
            raise Cancelled

    model, source, target, negative = model_of()
    sigmas, z = start_of(model)
    control = P2PControl(replace_edit(source, target, **LINES), sigmas, ALL)
    prompts = PairPrompts(source, target, negative, SCALE)
    wanted = pair_edit(model, prompts, control, z).edited
    before = dict(model.unet.attn_processors)
    with pytest.raises(Cancelled):
        pair_edit(model, prompts, control, z, progress=cancel)
    assert model.unet.attn_processors == before
    assert torch.equal(pair_edit(model, prompts, control, z).edited, wanted)


def test_pairs_come_apart_as_they_were_put_together():
    parts = [random_latent(3, 2, seed=i) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(separate(interleave(*parts), 3), parts, strict=True))
