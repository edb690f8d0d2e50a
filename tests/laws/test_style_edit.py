"""Edits on learned values: whose rows they reach and when, what they add to Prompt-to-Prompt, and files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.hosts.embeddings import load_learned, save_learned
from editkit.pipelines.attention.local_blend import LocalBlendOptions
from editkit.pipelines.attention.p2p import P2PControl, P2POptions
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.pair_loop import PairPrompts, attention_edit, pair_edit
from editkit.pipelines.attention.plug_and_play import PlugAndPlay, PlugAndPlayOptions
from editkit.pipelines.core.errors import LoadError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.inversion.ddim import reconstruct
from editkit.pipelines.inversion.negative_prompt import negative_prompt
from editkit.pipelines.sdedit import sdedit
from editkit.pipelines.stylediffusion.control import StyleControl
from editkit.pipelines.stylediffusion.edit import NoisedStart, StyleEditOptions, style_edit, style_transfer
from editkit.pipelines.stylediffusion.inversion import StyleOptions, style_invert
from editkit.pipelines.stylediffusion.value_embeddings import ValueEmbeddings
from editkit.tests.toy_attention import replace_edit, rows_of, site
from editkit.tests.toy_values import NULL, SOURCE, TARGET, AttentionDenoiser, B, D, T, inverted, text
from editkit.tests.toys import random_latent

STEPS = 6
GATES = P2POptions(cross_until=0.6, self_until=0.6, uncond_self_until=0.5)
CLOSED = P2POptions(cross_until=0, self_until=0)
EDIT = replace_edit(SOURCE, TARGET)


def embeddings(denoiser, *, plain: bool = False, direct: bool = False, batch: int = B, ratio: float = 1.0):
    """Values as if they had been learned; `plain` = scale 1, shift 0."""
    path = inverted(denoiser, batch, STEPS, ratio=ratio)
    shape = (len(path.latents) - 1, batch, T, D)
    scale, shift = random_latent(*shape, seed=31), random_latent(*shape, seed=32)
    if plain:
        scale, shift = torch.ones(shape), torch.zeros(shape)
    return ValueEmbeddings(SOURCE, None if direct else scale, shift, path, 7.5, denoiser.fingerprint)


class Spy(PairControl):
    """An inner control that sees what the layers get: value inputs by sigma and row."""

    def __init__(self, sigmas, needed=("cond", "uncond")):
        super().__init__(sigmas)
        self.needed, self.seen = frozenset(needed), {}

    def needs(self, step):
        return self.needed


class Watched(StyleControl):
    """Notes every value input, as the layer will get it."""

    def wants(self, site):
        return site.cross

    def inputs(self, key, value, site):
        new_key, new_value = super().inputs(key, value, site)
        assert new_key is key
        for i, row in enumerate(site.rows):
            self.inner.seen.setdefault((self.step(site.sigma), row), []).append((value[i], new_value[i]))
        return new_key, new_value


def watched(denoiser, learned, **kwargs):
    spy = Spy(learned.sigmas)
    prompts = PairPrompts(SOURCE, TARGET, NULL, 7.5)
    pair_edit(denoiser, prompts, Watched(learned, spy, **kwargs), learned.trajectory)
    return spy.seen


# --------------------------------------------------------------------------------------------------- rows and steps
@pytest.mark.parametrize("direct", [False, True])
def test_conditional_rows_get_their_values_at_every_layer_and_nobody_else(direct):
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser, direct=direct)
    seen = watched(denoiser, learned, target_until=0.5)
    assert len(seen) == STEPS * 4 * B and {len(layers) for layers in seen.values()} == {3}
    for (step, row), layers in seen.items():
        for own, used in layers:
            scale, shift = learned.at(step)
            expected = shift[row.image] if direct else own * scale[row.image] + shift[row.image]
            changed = row.branch == "cond" and (row.role == "source" or step < 3)
            assert torch.equal(used, expected if changed else own)


def test_t10_tau_v():
    """30 steps: tau_v = 0.6 reaches steps 0 to 17."""
    learned = embeddings(AttentionDenoiser())
    long = replace(
        learned.trajectory,
        sigmas=torch.linspace(3, 0, 31),
        latents=learned.trajectory.latents[:1].expand(31, -1, -1, -1, -1),
    )
    long = replace(learned, trajectory=long, scale=None, shift=torch.zeros(30, B, T, D))
    control = StyleControl(long, target_until=0.6)
    rows = rows_of("tc0", "tu0")
    wanted = [control.wants(site(rows, sigma)) for sigma in long.sigmas[:-1].tolist()]
    assert wanted == [True] * 18 + [False] * 12
    assert [control.active(step) for step in (17, 18)] == [True, False]
    assert not any(control.wants(site(rows, 1.0, cross=False)) for _ in range(1))
    with pytest.raises(ParameterError, match="value_until"):
        StyleControl(long, target_until=1.2)


def test_values_of_one_call_are_made_once():
    learned = embeddings(AttentionDenoiser())
    control = StyleControl(learned)
    text_rows, rows = random_latent(2, T, D, seed=1), rows_of("sc0", "tc1")
    first = control.inputs(text_rows, text_rows, site(rows, 3.0))[1]
    assert control.inputs(text_rows, text_rows, site(rows, 3.0))[1] is first
    assert control.inputs(text_rows, text_rows, site(rows, 2.5))[1] is not first
    assert control.inputs(text_rows, text_rows, site(rows_of("tc1", "sc0"), 3.0))[1] is not first
    assert not torch.equal(control.inputs(text_rows + 1, text_rows + 1, site(rows, 3.0))[1], first)
    control.reset()
    assert control._last is None


def test_a_prompt_that_a_host_repeats_gets_its_values_repeated():
    learned = embeddings(AttentionDenoiser())
    control, own, rows = StyleControl(learned), random_latent(1, T, D, seed=1), rows_of("tc0")
    once = control.inputs(own, own, site(rows, 3.0))[1]
    twice = own.repeat(1, 2, 1)
    assert torch.equal(control.inputs(twice, twice, site(rows, 3.0))[1], once.repeat(1, 2, 1))
    odd = random_latent(1, T + 1, D, seed=1)
    with pytest.raises(MismatchError):
        control.inputs(odd, odd, site(rows, 3.0))


def test_half_precision_rows_keep_their_type():
    learned = embeddings(AttentionDenoiser())
    own = random_latent(1, T, D, seed=1)
    control, rows = StyleControl(learned), rows_of("tc0")
    exact, found = (control.inputs(x, x, site(rows, 3.0))[1] for x in (own, own.half()))
    assert found.dtype == torch.float16 and torch.allclose(found.float(), exact, atol=1e-2)


# -------------------------------------------------------------------------------------------------------------- laws
@pytest.mark.parametrize("options", [GATES, CLOSED])
def test_scale_one_and_shift_zero_is_prompt_to_prompt_bit_for_bit(options):
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser, plain=True)
    ours = style_edit(denoiser, learned, EDIT, NULL, options=StyleEditOptions(1.0, options))
    plain = attention_edit(denoiser, EDIT, NULL, learned.trajectory, options=options)
    assert torch.equal(ours.edited, plain.edited) and torch.equal(ours.source, learned.trajectory.source)


def test_tau_v_zero_without_attention_edits_is_plain_sampling_of_the_target():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    ours = style_edit(denoiser, learned, EDIT, NULL, options=StyleEditOptions(0.0, CLOSED))
    assert torch.equal(
        ours.edited, reconstruct(denoiser, learned.trajectory, TARGET, negative=NULL, guidance_scale=7.5)
    )
    assert denoiser.forward_passes == 2 * 2 * B * STEPS


def test_with_the_own_prompt_an_edit_is_the_reconstruction():
    denoiser = AttentionDenoiser()
    path = inverted(denoiser, steps=STEPS)
    result = style_invert(
        denoiser, path, SOURCE, NULL, random_latent(B, 6, D, seed=21), options=StyleOptions(inner=15, inner_decay=0.0)
    )
    same = replace_edit(SOURCE, SOURCE)
    for options in (CLOSED, P2POptions(0.6, 0.0)):
        edited = style_edit(denoiser, result.embeddings, same, NULL, options=StyleEditOptions(1.0, options)).edited
        if options is CLOSED:
            assert torch.allclose(edited, result.rebuilt, atol=1e-4)
        assert (edited - path.source).norm() < 1.2 * (result.rebuilt - path.source).norm() + 0.2 * path.source.norm()


def test_values_change_the_edit_only_while_they_last():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    found = [
        style_edit(denoiser, learned, EDIT, NULL, options=StyleEditOptions(part, GATES)).edited for part in (0, 0.5, 1)
    ]
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_local_blend_keeps_the_source_where_no_word_looks():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    edit = replace_edit(SOURCE, TARGET, blend_source=(2,), blend_target=(2,))
    nowhere = replace(GATES, local_blend=LocalBlendOptions(threshold=1.0, start=0.0))
    ours = style_edit(denoiser, learned, edit, NULL, options=StyleEditOptions(0.5, nowhere))
    assert torch.equal(ours.edited, learned.trajectory.source)


def test_other_negatives_take_part():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    borrowed = style_edit(denoiser, learned, EDIT, negative_prompt(denoiser, learned.trajectory, SOURCE))
    assert torch.allclose(borrowed.edited, style_edit(denoiser, learned, EDIT, SOURCE).edited, atol=1e-5)


def test_images_of_a_batch_do_not_meet():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    both = style_edit(denoiser, learned, EDIT, NULL).edited
    for image in range(B):
        one, path = slice(image, image + 1), learned.trajectory
        alone = replace(
            learned, scale=learned.scale[:, one], shift=learned.shift[:, one],
            trajectory=replace(path, latents=path.latents[:, one], source_latent=path.source_latent[one]),
        )  # fmt: skip
        assert torch.allclose(both[one], style_edit(denoiser, alone, EDIT, NULL).edited, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ SDEdit
HALF = NoisedStart(0.5, [1, 2])


def test_sdedit_without_values_and_attention_is_plain_sdedit():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    denoiser.schedule = lambda steps, strength=1.0: learned.sigmas[round((1 - strength) * steps) :]
    for strength in (0.5, 1.0):
        prompts = EditPrompts(TARGET, NULL, 7.5)
        plain = sdedit(
            denoiser, learned.trajectory.source_latent, prompts, seeds=[1, 2], steps=STEPS, strength=strength
        )
        options, start = StyleEditOptions(0.0, CLOSED), NoisedStart(strength, [1, 2])
        ours = style_edit(denoiser, learned, EDIT, NULL, options=options, start=start)
        assert torch.allclose(ours.edited, plain, atol=1e-6)
        assert torch.equal(ours.source, learned.trajectory.source)


def test_sdedit_with_values_counts_its_steps_on_the_whole_grid():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)

    def run(values=learned, part: float = 1.0):
        return style_edit(denoiser, values, EDIT, NULL, options=StyleEditOptions(part, CLOSED), start=HALF).edited

    assert torch.equal(run(part=0.5), run(part=0.0)) and not torch.allclose(run(), run(part=0.0))
    denoiser.forward_passes = 0
    run()
    assert denoiser.forward_passes == 2 * B * 3
    late = replace(learned, scale=learned.scale.clone(), shift=learned.shift.clone())
    late.scale[:3], late.shift[:3] = 0, 0  # steps that do not run
    assert torch.equal(run(), run(late))


def test_sdedit_looks_at_a_source_with_the_same_noise():
    """With the source's own prompt and all gates open, the target is what the source's noise line gives."""
    denoiser = AttentionDenoiser()
    learned, open_ = embeddings(denoiser), StyleEditOptions(1.0, P2POptions(1.0, 1.0))
    found = style_edit(denoiser, learned, EDIT, NULL, options=open_, start=HALF).edited
    closed = style_edit(denoiser, learned, EDIT, NULL, options=StyleEditOptions(1.0, CLOSED), start=HALF).edited
    assert not torch.allclose(found, closed)
    first = next(z for sigma, _, z in denoiser.log if sigma == pytest.approx(float(learned.sigmas[3])))
    assert torch.equal(first[0], first[1])  # source and target begin alike


def test_sdedit_asks_for_a_seed_per_image():
    denoiser = AttentionDenoiser()
    with pytest.raises(ShapeError, match="seeds"):
        style_edit(denoiser, embeddings(denoiser), EDIT, NULL, start=NoisedStart(0.5, [1]))


# ---------------------------------------------------------------------------------------------------- style transfer
def content(denoiser, **kwargs):
    path = inverted(denoiser, 1, STEPS, source=text(50), **kwargs)
    return replace(path, latents=path.latents + 0.1 * random_latent(*path.latents.shape, seed=51))


def test_transfer_without_style_is_feature_injection():
    denoiser = AttentionDenoiser()
    plain, options = embeddings(denoiser, plain=True, batch=1), PlugAndPlayOptions(0.8, 0.5)
    path = content(denoiser)
    ours = style_transfer(denoiser, plain, path, text(50), TARGET, NULL, options=options)
    prompts = PairPrompts(text(50), TARGET, NULL, 7.5)
    pnp = pair_edit(denoiser, prompts, PlugAndPlay(path.sigmas, options), path)
    assert torch.equal(ours.edited, pnp.edited)


def test_transfer_starts_from_the_content_with_the_values_of_the_style():
    denoiser = AttentionDenoiser()
    style, path, off = embeddings(denoiser, batch=1), content(denoiser), PlugAndPlayOptions(0, 0)
    ours = style_transfer(denoiser, style, path, text(50), TARGET, NULL, options=off).edited
    moved = replace(style, trajectory=replace(path, prompt=style.trajectory.prompt))
    alone = style_edit(denoiser, moved, EDIT, NULL, options=StyleEditOptions(1.0, CLOSED)).edited
    assert torch.equal(ours, alone)
    seen = Watched(style, Spy(style.sigmas), source=False)
    pair_edit(denoiser, PairPrompts(text(50), TARGET, NULL, 7.5), seen, path)
    sources = [layers for (_, row), layers in seen.inner.seen.items() if row.role == "source"]
    assert sources and all(torch.equal(own, used) for layers in sources for own, used in layers)


# ------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("direct", [False, True])
def test_a_loaded_inversion_makes_the_same_edit_bit_for_bit(direct, tmp_path):
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser, direct=direct)
    loaded = load_learned(save_learned(learned, tmp_path / "deep" / "cat.safetensors"))
    assert isinstance(loaded, ValueEmbeddings) and loaded.fingerprint is None
    ours, again = (style_edit(denoiser, one, EDIT, NULL).edited for one in (learned, loaded))
    assert torch.equal(ours, again)
    assert loaded.base.text == SOURCE.text and loaded.guidance_scale == 7.5


def test_negatives_load_through_the_same_door(tmp_path):
    denoiser = AttentionDenoiser()
    negatives = negative_prompt(denoiser, inverted(denoiser, steps=STEPS), SOURCE)
    loaded = load_learned(save_learned(negatives, tmp_path / "negative.safetensors"))
    assert torch.equal(loaded.base.tokens, negatives.base.tokens)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "half.safetensors", {"format": "editkit-values-1", "embeddings": "{}"})
    for name, message in (("other", "no embeddings"), ("half", "incomplete"), ("none", "does not exist")):
        with pytest.raises(LoadError, match=message):
            load_learned(tmp_path / f"{name}.safetensors")


# ---------------------------------------------------------------------------------------------------------- mistakes
def test_what_does_not_belong_together_is_refused():
    denoiser = AttentionDenoiser()
    learned = embeddings(denoiser)
    with pytest.raises(MismatchError, match="another model"):
        style_edit(denoiser, replace(learned, fingerprint="other"), EDIT, NULL)
    with pytest.raises(MismatchError, match="source prompt"):
        style_edit(denoiser, learned, replace_edit(text(60), TARGET), NULL)
    wide = replace(TARGET, tokens=random_latent(1, T + 1, D))
    with pytest.raises(ShapeError, match="tokens"):
        style_edit(denoiser, learned, replace_edit(SOURCE, wide), NULL)
    with pytest.raises(MismatchError, match="made on"):
        style_transfer(denoiser, learned, inverted(denoiser, steps=5), SOURCE, TARGET, NULL)


def test_values_of_a_part_of_the_run_serve_that_part():
    denoiser = AttentionDenoiser()
    late = embeddings(denoiser, ratio=0.5)
    assert late.first == 3
    with pytest.raises(MismatchError, match="steps 3 to 5"):
        late.at(2)
    with pytest.raises(MismatchError, match="learned from step 3"):
        style_edit(denoiser, late, EDIT, NULL, start=NoisedStart(0.9, [1, 2]))
    with pytest.raises(MismatchError, match="one encoding ratio"):
        style_transfer(denoiser, late, inverted(denoiser, steps=STEPS), SOURCE, TARGET, NULL)
    assert torch.isfinite(style_edit(denoiser, late, EDIT, NULL).edited).all()


def test_the_control_of_prompt_to_prompt_decides_what_is_evaluated():
    learned = embeddings(AttentionDenoiser())
    inner = P2PControl(EDIT, learned.sigmas, GATES)
    control = StyleControl(learned, inner, target_until=0.0)
    for step in range(STEPS):
        assert control.needs(step) == inner.needs(step)
    assert control.active(0) and not control.active(STEPS - 1)
