"""LayerDiffusion, stage 2 and sampling: what learns from which image, and which prompt each step uses (docs/methods.md, 10)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.pipelines.core.errors import FamilyError, MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.samplers import predictor, sample
from editkit.pipelines.core.tune_plan import TunePlan
from editkit.pipelines.layerdiffusion.finetune import REFERENCE_SEED, TuneOptions, layered_tune
from editkit.pipelines.layerdiffusion.iterative_guidance import IterativeGuidance, takes_object
from editkit.pipelines.learning.denoising_loss import NoiseError, masked_mean
from editkit.pipelines.learning.weight_deltas import apply_changes, attention_layers, copied
from editkit.tests.toy_layered import digest, network, network_text, object_mask
from editkit.tests.toys import ToyDenoiser, pointwise, prompt, random_latent

LORA = TunePlan("lora", rank=2)
FULL = TunePlan()
SEEDS = [21]
MASK = object_mask(8, 8)
MIXED = network_text(5)


def image(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return random_latent(batch, 4, 8, 8, seed=seed)


def tune(denoiser=None, *, latent=None, reference=None, context=MIXED, mask=MASK, seeds=SEEDS, outside=None, **options):
    return layered_tune(
        denoiser or network(),
        image(1) if latent is None else latent,
        image(2) if reference is None else reference,
        context,
        mask,
        background_mask=outside,
        seeds=seeds,
        options=TuneOptions(**{"plan": LORA, "steps": 3, "lr": 1e-2, **options}),
    )


def size(changes) -> float:
    return sum(
        float(change.abs().sum()) for name, change in changes.items() if name.endswith(("up.weight", "diff", "diff_b"))
    )


# ------------------------------------------------------------------------------------------------------------- the losses
def test_the_two_losses():
    denoiser = network()
    found = tune(denoiser, steps=1, object_weight=2.0, background_weight=0.5)
    for losses, latent, seed, where, weight in (
        (found.object_losses, image(1), 21, MASK[:, None], 2.0),
        (found.background_losses, image(2), (21 + REFERENCE_SEED) % 2**64, 1 - MASK[:, None], 0.5),
    ):
        error = NoiseError(denoiser, latent, [seed])
        with torch.no_grad():
            assert losses == pytest.approx([weight * float(masked_mean(error(0, [MIXED])[0], where))], rel=1e-4)


def test_normalised_losses_do_not_depend_on_the_objects_size():
    plain, normal = tune(steps=1), tune(steps=1, normalise=True)
    share = float(MASK.mean())
    assert normal.object_losses[0] == pytest.approx(plain.object_losses[0] / share, rel=1e-4)
    assert normal.background_losses[0] == pytest.approx(plain.background_losses[0] / (1 - share), rel=1e-4)


def test_another_mask_may_say_where_the_reference_counts():
    elsewhere = torch.ones(1, 8, 8)
    elsewhere[:, 4:] = 0
    found, error = tune(steps=1, outside=elsewhere), NoiseError(network(), image(2), [(21 + REFERENCE_SEED) % 2**64])
    with torch.no_grad():
        expected = float(masked_mean(error(0, [MIXED])[0], elsewhere[:, None]))
    assert found.background_losses == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("plan", [LORA, FULL], ids=["lora", "full"])
def test_a_weight_of_0_leaves_an_image_out(plan):
    """The reference is not evaluated; the other image's draws are as before."""
    found = {}
    for name, reference in (("none", None), ("some", image(7)), ("other", image(8))):
        denoiser, rows = network(), []
        make = denoiser.model_clone

        def clone(plan, shape, make=make, rows=rows):
            made = make(plan, shape)
            made.denoiser.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
            return made

        denoiser.model_clone = clone
        options = TuneOptions(plan=plan, steps=3, lr=1e-2, background_weight=0.0)
        found[name] = layered_tune(denoiser, image(1), reference, MIXED, MASK, seeds=SEEDS, options=options)
        assert set(rows) == {1}
    for name in ("some", "other"):
        assert all(torch.equal(change, found[name].changes[key]) for key, change in found["none"].changes.items())
    assert found["none"].background_losses == [0.0] * 3
    both = tune(plan=plan)
    assert both.object_losses[0] == pytest.approx(found["none"].object_losses[0], rel=1e-5)
    assert size({key: both.changes[key] - change for key, change in found["none"].changes.items()}) > 0


def test_an_object_that_is_nowhere_gives_no_gradient():
    found = tune(mask=torch.zeros(1, 8, 8), background_weight=0.0)
    assert found.object_losses == [0.0] * 3
    assert size(found.changes) == 0


@pytest.mark.parametrize("plan", [LORA, FULL], ids=["lora", "full"])
def test_no_steps_change_nothing(plan):
    denoiser = network()
    found = tune(denoiser, steps=0, plan=plan)
    assert size(found.changes) == 0
    assert digest(denoiser.with_changes(found.changes).unet) == digest(denoiser.unet)


@pytest.mark.parametrize("plan", [LORA, FULL], ids=["lora", "full"])
def test_learning_lowers_both_losses(plan):
    """On draws that were not learned from."""
    denoiser = network()
    tuned = denoiser.with_changes(tune(denoiser, steps=60, lr=5e-3, plan=plan).changes)

    def mean(model, latent, where):
        error = NoiseError(model, latent, [77])
        with torch.no_grad():
            return sum(float(masked_mean(error(step, [MIXED])[0], where)) for step in range(40))

    for latent, where in ((image(1), MASK[:, None]), (image(2), 1 - MASK[:, None])):
        assert mean(tuned, latent, where) < 0.9 * mean(denoiser, latent, where)


def test_images_of_a_batch_share_one_copy():
    found = tune(latent=torch.cat([image(1), image(3)]), seeds=[21, 22], steps=1)
    each = [tune(latent=image(1), seeds=[21], steps=1), tune(latent=image(3), seeds=[22], steps=1)]
    for losses in ("object_losses", "background_losses"):
        assert getattr(found, losses)[0] == pytest.approx(sum(getattr(one, losses)[0] for one in each) / 2, rel=1e-4)
    rows = tune(latent=torch.cat([image(1), image(1)]), seeds=[21, 21], context=network_text(5, rows=2), steps=1)
    assert rows.object_losses[0] == pytest.approx(
        sum(
            tune(context=MIXED.with_tokens(network_text(5, rows=2).tokens[b : b + 1]), steps=1).object_losses[0]
            for b in range(2)
        )
        / 2,
        rel=1e-4,
    )


# --------------------------------------------------------------------------------------------------------- what may learn
class Spy:
    """Which tensors Adam had gradients for, at every step."""

    def __init__(self, monkeypatch):
        self.steps, real = [], torch.optim.Adam.step

        def step(adam, closure=None):
            values = [value for group in adam.param_groups for value in group["params"]]
            self.steps.append({id(value) for value in values if value.grad is not None})
            return real(adam, closure)

        monkeypatch.setattr(torch.optim.Adam, "step", step)


@pytest.mark.parametrize("plan", [LORA, FULL], ids=["lora", "full"])
def test_gradients_reach_only_what_should_learn(plan, monkeypatch):
    denoiser, spy, clones = network(), Spy(monkeypatch), []
    before, tokens = digest(denoiser.unet), MIXED.tokens.clone()
    make = denoiser.model_clone

    def clone(plan, shape):
        made = make(plan, shape)
        clones.append({name: id(value) for name, value in made.denoiser.unet.named_parameters()})
        return made

    denoiser.model_clone = clone
    found = tune(denoiser, steps=1, plan=plan)
    names = {name for name, number in clones[0].items() if number in spy.steps[0]}
    layers = attention_layers(denoiser.unet)
    if plan.kind == "full":
        assert names == {name for name, _ in denoiser.unet.named_parameters()}
        assert all(name.endswith((".diff", ".diff_b")) for name in found.changes)
    else:
        assert names == {f"{name}.{part}" for name in layers for part in ("up", "down")}
        assert {name.split(".")[0] for name in found.changes} == {
            "lora_unet_" + name.replace(".", "_") for name in layers
        }
    assert len(spy.steps[0]) == len(names)
    assert digest(denoiser.unet) == before
    assert all(weight.grad is None for weight in denoiser.unet.parameters())
    assert torch.equal(MIXED.tokens, tokens) and MIXED.tokens.grad is None


def test_attention_projections_are_what_a_lora_changes():
    names = set(attention_layers(network().unet))
    assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in names)
    assert len(names) == 8 * (1 + 1 + 2)  # two attentions a layer: one layer down, one in the middle, two up
    with pytest.raises(FamilyError, match="full fine-tune"):
        attention_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


# -------------------------------------------------------------------------------------------------- changes of the weights
@pytest.mark.parametrize("plan", [LORA, FULL, TunePlan("lora", rank=500)], ids=["lora", "full", "whole rank"])
def test_changes_give_the_model_that_learned(plan):
    denoiser = network()
    clone = denoiser.model_clone(plan, (1, 4, 8, 8))
    with torch.no_grad():
        for i, value in enumerate(clone.parameters):
            value += (0.02 if plan is FULL else 0.3) * random_latent(*value.shape, seed=i)
    tuned, z = denoiser.with_changes(clone.changes()), image(4)
    with torch.no_grad():
        learned, plain = clone.denoiser.denoise(z, 2.0, [MIXED]), denoiser.denoise(z, 2.0, [MIXED])
        torch.testing.assert_close(tuned.denoise(z, 2.0, [MIXED]), learned, atol=1e-3, rtol=1e-3)
    assert (learned - plain).abs().max() > 0.05
    assert tuned.fingerprint != denoiser.fingerprint
    clone.release()
    assert clone.parameters == () and clone.denoiser is None


def test_half_weights_are_learned_in_float32_and_kept_in_half():
    denoiser = network()
    denoiser.unet.to(torch.bfloat16)
    before = {name: value.clone() for name, value in denoiser.unet.named_parameters()}
    clone = denoiser.model_clone(FULL, (1, 4, 8, 8))
    assert {value.dtype for value in clone.parameters} == {torch.float32}
    assert all(not change.any() for change in clone.changes().values())
    with torch.no_grad():
        clone.parameters[0] += 1e-6  # less than bfloat16 can show
    assert max(float(change.max()) for change in clone.changes().values()) == pytest.approx(1e-6, rel=0.1)
    tuned = denoiser.with_changes(clone.changes())
    assert tuned.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in denoiser.unet.named_parameters())


def test_low_rank_learning_in_half_keeps_the_frozen_weights_in_half():
    clone = network().model_clone(replace(LORA, compute_dtype=torch.bfloat16), (1, 4, 8, 8))
    kinds = {name: value.dtype for name, value in clone.denoiser.unet.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.endswith((".up", ".down"))} == {torch.float32}
    assert {kind for name, kind in kinds.items() if not name.endswith((".up", ".down"))} == {torch.bfloat16}
    exact, rough = (tune(plan=replace(LORA, compute_dtype=dtype), lr=1e-3) for dtype in (None, torch.bfloat16))
    assert rough.object_losses[0] == pytest.approx(exact.object_losses[0], rel=0.1)
    assert rough.object_losses[0] != exact.object_losses[0]
    full = tune(plan=replace(FULL, compute_dtype=torch.bfloat16), lr=1e-3)
    assert full.object_losses[0] == pytest.approx(exact.object_losses[0], rel=0.1)


def test_the_first_values_of_a_lora_come_from_its_seed():
    def down(seed):
        return network().model_clone(replace(LORA, seed=seed), (1, 4, 8, 8)).parameters[0]

    assert torch.equal(down(1), down(1)) and not torch.equal(down(1), down(2))


def test_changes_of_another_model_are_refused():
    changes = tune(steps=1).changes
    with pytest.raises(MismatchError, match="another model"):
        network().with_changes({**changes, "lora_unet_elsewhere.diff": torch.zeros(1)})
    other = copied(torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3)}), torch.float32)
    with pytest.raises(MismatchError, match="another shape"):
        apply_changes(other, {"a.diff": torch.zeros(2, 2)})
    assert not any(value.requires_grad for value in other.parameters())


def test_a_copy_shares_what_the_original_shares_and_nothing_with_it():
    layer = torch.nn.Linear(3, 3)
    tied = torch.nn.ModuleList([layer, torch.nn.Linear(3, 3)])
    tied[1].weight = layer.weight
    made = copied(tied, torch.bfloat16)
    assert made[0].weight is made[1].weight and made[0].weight.dtype == torch.bfloat16
    assert made[0].weight.data_ptr() != layer.weight.data_ptr()
    assert layer.weight.requires_grad and not made[0].weight.requires_grad
    with torch.inference_mode():
        hidden = torch.nn.Linear(2, 2)
    assert not any(value.is_inference() for value in copied(hidden, torch.float32).parameters())


def test_blocks_that_compute_again_give_the_same_bits():
    plain, saving = tune(plan=FULL), tune(plan=FULL, low_memory=True)
    assert all(torch.equal(change, saving.changes[name]) for name, change in plain.changes.items())


# --------------------------------------------------------------------------------------------------------------- sampling
def test_t16_the_sequence_of_conditions():
    fifty = [takes_object(step, 50) for step in range(50)]
    assert fifty == [True, False] * 25  # t = 50 is even; t = 1 follows the mix
    assert sum(fifty) == 25
    assert [takes_object(step, 5) for step in range(5)] == [False, True, False, True, False]  # t = 5, 4, 3, 2, 1
    assert [takes_object(step, 50, 1) for step in range(50)] == [False, True] * 25


def test_conditions_are_found_by_sigma():
    denoiser = ToyDenoiser(pointwise())
    sigmas = denoiser.schedule(10)
    a, b = prompt(1.0), prompt(2.0)
    guidance = IterativeGuidance(a, b, sigmas)
    for step, (high, low) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        wanted = a if step % 2 == 0 else b
        for level in (high, low + 0.5 * (high - low), low + 0.01 * (high - low)):  # where other samplers look as well
            assert guidance.at_sigma(level) is wanted
    tail = IterativeGuidance(a, b, sigmas[4:])
    assert all(tail.at_sigma(level) is guidance.at_sigma(level) for level in sigmas[4:-1].tolist())
    assert IterativeGuidance(a, b, sigmas, phase=1).at_sigma(float(sigmas[0])) is b
    for part in (sigmas, sigmas[4:], sigmas[:5], sigmas[2:6]):
        guidance.check(denoiser, part)
    for other in (denoiser.schedule(9), sigmas * 0.9):
        with pytest.raises(MismatchError, match="alternating guider"):
            guidance.check(denoiser, other)


def run(positive, scale=3.0, name="euler"):
    denoiser = ToyDenoiser(pointwise())
    predict = predictor(denoiser, EditPrompts(positive, prompt(0.0), scale))
    return sample(name, predict, 8 * image(6), denoiser.schedule(6))


def test_alternation_in_a_loop():
    sigmas, rule = ToyDenoiser(pointwise()).schedule(6), pointwise()
    z, levels = 8 * image(6), sigmas.tolist()
    for i in range(6):
        value = 1.0 if i % 2 == 0 else 2.0
        clean = rule(z, levels[i], 0.0) + 3 * (rule(z, levels[i], value) - rule(z, levels[i], 0.0))
        z = clean + levels[i + 1] / levels[i] * (z - clean)
    torch.testing.assert_close(run(IterativeGuidance(prompt(1.0), prompt(2.0), sigmas)), z)


def test_equal_conditions_are_plain_sampling():
    sigmas = ToyDenoiser(pointwise()).schedule(6)
    for name in ("euler", "dpmpp_2m"):
        alternating = run(IterativeGuidance(prompt(1.0), prompt(1.0), sigmas), name=name)
        assert torch.equal(alternating, run(prompt(1.0), name=name))
    assert not torch.equal(run(IterativeGuidance(prompt(1.0), prompt(2.0), sigmas)), run(prompt(1.0)))
    assert torch.equal(run(IterativeGuidance(prompt(1.0), prompt(1.0), sigmas), scale=1.0), run(prompt(1.0), scale=1.0))


# --------------------------------------------------------------------------------------------------------------- refusals
def test_refusals():
    with pytest.raises(ParameterError, match="no reference"):
        layered_tune(network(), image(1), None, MIXED, MASK, seeds=SEEDS)
    with pytest.raises(ShapeError, match="reference has"):
        tune(reference=random_latent(1, 4, 6, 8))
    with pytest.raises(ShapeError, match="background_mask"):
        tune(outside=torch.ones(1, 3, 3))
    with pytest.raises(ParameterError, match="both 0"):
        TuneOptions(object_weight=0, background_weight=0)
    for name in ("object_weight", "background_weight", "patience"):
        with pytest.raises(ParameterError, match=name):
            TuneOptions(**{name: -1})
    for wrong, match in (
        (dict(kind="some"), "kind"),
        (dict(rank=0), "rank"),
        (dict(compute_dtype=torch.float16), "bfloat16"),
    ):
        with pytest.raises(ParameterError, match=match):
            TunePlan(**wrong)
