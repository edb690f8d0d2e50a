"""Attention edits under samplers of any kind: what a loop of ours would do, on toys whose every step is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.pipelines.attention.map_drawing import chosen_words, heat_over, map_images, normalised, spread_steps
from editkit.pipelines.attention.pair_batch import interleave, separate
from editkit.pipelines.attention.pair_control import PairControl
from editkit.pipelines.attention.pair_loop import PairPrompts, pair_edit
from editkit.pipelines.attention.pair_sampling import PairPlan, paired_context, paired_predictor, shared_noise
from editkit.pipelines.attention.prompts.words import prompt_words
from editkit.pipelines.core.errors import MismatchError, ParameterError, ShapeError
from editkit.pipelines.core.guidance import EditPrompts
from editkit.pipelines.core.protocols import Context, Token
from editkit.pipelines.core.samplers import sample
from editkit.pipelines.core.trajectory import context_digest
from editkit.pipelines.inversion.ddim import invert
from editkit.pipelines.inversion.negative_embeddings import Embeddings
from editkit.tests.toys import ToyDenoiser, pointwise, prompt, random_latent

STEPS, SCALE = 6, 3.0
SOURCE, TARGET, NEGATIVE = prompt(0.3), prompt(1.0), prompt(-0.2)


class Rows(ToyDenoiser):
    """Every row is predicted by the prompt row that belongs to it; notes who the rows are."""

    def __init__(self):
        super().__init__(pointwise())
        self.seen = []

    def denoise(self, z, sigma, contexts, control=None):
        out = []
        for number, context in enumerate(contexts):
            values = context.tokens.mean((1, 2)).expand(len(z)) if len(context.tokens) in (1, len(z)) else None
            assert values is not None, "a prompt has one row, or one for each latent"
            out.append(torch.stack([self.rule(row, float(sigma), float(v)) for row, v in zip(z, values, strict=True)]))
            if control is not None:
                self.seen.append((float(sigma), control.rows.chunk(number)))
        return torch.stack(out)


class Growing(PairControl):
    """A LocalBlend whose mask is one column wider after every step, and closed at first."""

    def needs(self, step):
        return frozenset({"cond"})

    def blend(self, source, target, step):
        mask = torch.arange(target.shape[-1]) < step
        return target if step == 0 else torch.where(mask, target, source)


def run_of(plan, denoiser, sigmas, latent, name="euler", negative=NEGATIVE, scale=SCALE):
    positive = paired_context(SOURCE, TARGET)
    run = plan.check(denoiser, sigmas, latent, [positive.tokens])
    predict = paired_predictor(denoiser, EditPrompts(positive, negative, scale), run)
    return separate(sample(name, predict, latent.clone(), sigmas))


def test_a_sampler_of_first_order_is_our_loop():
    """The mask changes from step to step: the sampler's own state must have been blended, not only what was predicted."""
    denoiser = Rows()
    sigmas = denoiser.schedule(STEPS)
    z = random_latent(2, 4, 5, 6, seed=3) * float(sigmas[0])
    ours = pair_edit(denoiser, PairPrompts(SOURCE, TARGET, NEGATIVE, SCALE), Growing(sigmas), z)
    source, edited = run_of(PairPlan(Growing), denoiser, sigmas, interleave(z, z))
    torch.testing.assert_close(source, ours.source)
    torch.testing.assert_close(edited, ours.edited)
    assert (edited - source)[..., : STEPS - 1].abs().min() > 0 and torch.equal(
        edited[..., STEPS - 1 :], source[..., STEPS - 1 :]
    )


def test_the_same_beside_a_real_image():
    denoiser = Rows()
    sigmas = denoiser.schedule(STEPS)
    path = invert(denoiser, random_latent(2, 4, 5, 6, seed=4), SOURCE, sigmas)
    ours = pair_edit(denoiser, PairPrompts(SOURCE, TARGET, NEGATIVE, SCALE), Growing(sigmas), path)
    plan = PairPlan(Growing, trajectory=lambda: path)
    start = interleave(path.latents[0], path.latents[0])
    source, edited = run_of(plan, denoiser, sigmas, start)
    torch.testing.assert_close(edited, ours.edited)
    assert torch.equal(source, path.source)
    other = interleave(path.latents[0] + 1, path.latents[0])  # whatever the sampler was given
    torch.testing.assert_close(run_of(plan, denoiser, sigmas, other)[1], ours.edited)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_where_the_words_never_attend_the_target_ends_as_its_source(name):
    class Nowhere(PairControl):
        def blend(self, source, target, step):
            return source

    denoiser = Rows()
    sigmas = denoiser.schedule(STEPS)
    z = random_latent(1, 4, 5, 6, seed=3) * float(sigmas[0])
    source, edited = run_of(PairPlan(Nowhere), denoiser, sigmas, interleave(z, z), name)
    torch.testing.assert_close(edited, source)
    alone = run_of(PairPlan(PairControl), denoiser, sigmas, interleave(z, z), name)
    torch.testing.assert_close(source, alone[0])
    assert (alone[1] - alone[0]).abs().max() > 1e-2


def test_rows_are_told_by_meaning_and_guidance_costs_nothing_at_scale_one():
    denoiser = Rows()
    sigmas = denoiser.schedule(2)
    z = random_latent(2, 4, 5, 6)
    run_of(PairPlan(PairControl), denoiser, sigmas, z, scale=1.0)
    assert {rows for _, rows in denoiser.seen} == {(("source", "cond", 0), ("target", "cond", 0))}
    denoiser.seen.clear()
    run_of(PairPlan(PairControl), denoiser, sigmas, random_latent(4, 4, 5, 6))
    roles = [tuple((row.role, row.branch, row.image) for row in rows) for _, rows in denoiser.seen[:2]]
    assert roles == [
        tuple((role, branch, image) for image in (0, 1) for role in ("source", "target"))
        for branch in ("cond", "uncond")
    ]


def test_negatives_of_every_step():
    """Embeddings that differ from step to step stand where one negative does."""
    denoiser = Rows()
    sigmas = denoiser.schedule(3)
    z = random_latent(2, 4, 5, 6) * float(sigmas[0])
    same = Embeddings(NEGATIVE, None, sigmas, "toy", None, context_digest(SOURCE))
    wanted = run_of(PairPlan(PairControl), denoiser, sigmas, z)
    for got, want in zip(run_of(PairPlan(PairControl), denoiser, sigmas, z, negative=same), wanted, strict=True):
        torch.testing.assert_close(got, want)
    rising = replace(same, tokens=torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 2, 3))
    other = run_of(PairPlan(PairControl), denoiser, sigmas, z, negative=rising)
    assert (other[1] - wanted[1]).abs().max() > 1e-3


def test_noise_is_shared_by_a_pair_and_by_nobody_else():
    noise = random_latent(6, 2, 2, 2)
    shared = shared_noise(noise)
    source, target = separate(shared)
    assert torch.equal(source, target) and torch.equal(source, noise[::2])


def test_prompts_of_two_rows():
    long = Context(torch.randn(1, 3, 3), torch.randn(1, 4))
    both = paired_context(Context(torch.randn(1, 2, 3), torch.randn(1, 4)), long)
    assert both.tokens.shape == (2, 6, 3) and both.pooled is not None and both.pooled.shape == (2, 4)
    assert torch.equal(both.tokens[1], long.tokens.repeat(1, 2, 1)[0])
    with pytest.raises(ShapeError, match="width 3 but target of 5"):
        paired_context(SOURCE, Context(torch.randn(1, 2, 5)))


def test_a_plan_refuses_what_does_not_belong():
    denoiser = Rows()
    sigmas, plan = denoiser.schedule(3), PairPlan(PairControl, tokens=7)
    with pytest.raises(ShapeError, match="3 rows"):
        plan.check(denoiser, sigmas, torch.zeros(3, 4, 5, 6), [torch.zeros(2, 7, 3)])
    with pytest.raises(MismatchError, match="positive has 1 rows"):
        plan.check(denoiser, sigmas, torch.zeros(2, 4, 5, 6), [torch.zeros(1, 7, 3)])
    with pytest.raises(MismatchError, match="aligned on 7"):
        plan.check(denoiser, sigmas, torch.zeros(2, 4, 5, 6), [torch.zeros(2, 8, 3)])
    plan.check(denoiser, sigmas, torch.zeros(4, 4, 5, 6), [torch.zeros(4, 14, 3)])
    path = invert(denoiser, random_latent(1, 4, 5, 6), SOURCE, denoiser.schedule(5))
    with pytest.raises(MismatchError, match="trajectory"):
        PairPlan(PairControl, trajectory=lambda: path).check(denoiser, sigmas, torch.zeros(2, 4, 5, 6), [])


# --------------------------------------------------------------------------------------------------------- maps for people
def test_steps_are_spread_over_a_part():
    assert spread_steps(50, 5, 0.0, 1.0) == [0, 12, 24, 37, 49]
    assert spread_steps(50, 3, 0.5, 0.5) == [24]
    assert spread_steps(4, 100, 0.0, 1.0) == [0, 1, 2, 3]
    assert spread_steps(1, 3, 0.0, 1.0) == [0]
    with pytest.raises(ParameterError, match="behind"):
        spread_steps(10, 2, 0.9, 0.1)
    with pytest.raises(ParameterError, match="start"):
        spread_steps(10, 2, -0.1, 0.5)


def test_words_are_chosen_by_name():
    text = "a red cat, a blue cat"
    spans = [(0, 1), (2, 5), (6, 9), (11, 12), (13, 17), (18, 21)]
    words = prompt_words(text, [Token(1, -1, -1), *(Token(2, *span) for span in spans)])
    assert chosen_words(words, "", "source") == [
        ("a#1", (1,)),
        ("red", (2,)),
        ("cat#1", (3,)),
        ("a#2", (4,)),
        ("blue", (5,)),
        ("cat#2", (6,)),
    ]
    assert chosen_words(words, "cat, cat#2, red cat", "source") == [
        ("cat", (3, 6)),
        ("cat#2", (6,)),
        ("red cat", (2, 3)),
    ]
    with pytest.raises(ParameterError, match="dog"):
        chosen_words(words, "dog", "source")
    with pytest.raises(ParameterError, match="no words"):
        chosen_words((), "", "target")


def test_images_of_maps():
    maps = torch.rand(2, 3, 4, 5) * 0.1
    images = map_images(maps, ["one", "two", "three"])
    assert images.shape[0] == 6 and images.shape[-1] == 3
    assert torch.equal(images[4], map_images(maps[1:, 1:2], ["two"])[0]), "image by image, word by word"
    assert normalised(maps).amax((2, 3)).eq(1).all() and normalised(maps * 0).eq(0).all()
    heat = torch.tensor([[0.0, 1 / 3], [2 / 3, 1.0]])
    black_red_yellow_white = torch.tensor([[[0.0, 0, 0], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]])
    torch.testing.assert_close(heat_over(heat, None), black_red_yellow_white)
    image = torch.rand(8, 8, 3)
    cold = heat_over(torch.zeros(2, 2), image)
    torch.testing.assert_close(cold, image.mean(-1, keepdim=True).expand(8, 8, 3))
