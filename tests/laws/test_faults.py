"""Cancel, exception and lack of memory while something learns: nothing of the user's changes (T20)."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch

from editkit.pipelines.blended.decoder_tuning import DecoderSettings, LatentSettings, tune_decoder, tune_latent
from editkit.pipelines.core.errors import EditError, ParameterError
from editkit.pipelines.learning.early_stopping import Plateau
from editkit.pipelines.learning.optimise import learning_mode, optimise
from editkit.tests.toy_codec import ToyCodec, box, smooth_image


class Cancelled(Exception):
    """What a host raises from its progress bar."""


STEPS = 8
FAULTS = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "exception": RuntimeError("a kernel failed"),
    "interrupt": KeyboardInterrupt(),
    "cancel": Cancelled(),
    "none": None,
}


def run(codec: ToyCodec, which: str, progress) -> None:
    latent, source = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), smooth_image(2, 16, 13)
    mask = box(1, 16, 13, (0, 8), (0, 8))
    if which == "latent":
        tune_latent(codec, latent, source, None, mask, settings=LatentSettings(steps=STEPS), progress=progress)
    else:
        chosen = DecoderSettings(
            steps=STEPS, lr=1e-2, blocks="all" if which == "decoder" else 2, low_memory=which == "saving"
        )
        tune_decoder(codec, latent, source, None, mask, settings=chosen, progress=progress)


@pytest.mark.parametrize("which", ["decoder", "last blocks", "saving", "latent"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_iteration_leaves_the_codec_as_it_was(which, fault):
    at = random.Random(f"{which} {fault}").randint(1, STEPS)
    codec, error = ToyCodec(), FAULTS[fault]
    before, generator = codec.digest(), torch.get_rng_state()
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    make, copies, steps = codec.decoder_clone, [], []

    def clone():
        made = make()
        copies.extend(weakref.ref(weight) for block in made.blocks for weight in block.parameters())
        if error is not None and fault != "cancel":
            made.blocks[-1].fail_at, made.blocks[-1].error = at + 1, error
        return made

    def progress(done, total, preview=None):
        steps.append(done)
        if fault == "cancel" and done == at:
            raise error

    codec.decoder_clone = clone
    if error is None:
        run(codec, which, progress)
        assert steps == list(range(1, STEPS + 1))
    else:
        with pytest.raises(type(error)) as caught:
            run(codec, which, progress)
        assert caught.value is error
        assert codec.clones[0].released
        error.__traceback__ = None
        del caught
    assert codec.digest() == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert flags == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    codec.clones.clear()
    gc.collect()
    assert all(copy() is None for copy in copies), "the learned copy is still in memory"


# ------------------------------------------------------------------------------------------------- the optimiser
def leaf(*values: float) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values)


def test_adam_by_hand():
    """Adam on a linear loss: the gradient is constant, so every bias-corrected step is lr along its sign."""
    value = leaf(1.0, -2.0)
    result = optimise([value], lambda step: (value * torch.tensor([3.0, -0.5])).sum(), steps=4, lr=0.1)
    torch.testing.assert_close(value, torch.tensor([0.6, -1.6]), atol=1e-5, rtol=0)
    assert result.losses == pytest.approx([4.0 - 0.35 * i for i in range(4)], abs=1e-5)
    assert result.steps == 4


def test_rates_may_depend_on_the_step_and_terms_are_summed():
    value = leaf(0.0, 0.0)
    result = optimise(
        [value], lambda step: torch.stack([value[0], 2 * value[1]]), steps=3, lr=lambda step: 0.1 / (step + 1)
    )
    torch.testing.assert_close(value, torch.full((2,), -0.1 - 0.05 - 0.1 / 3), atol=1e-5, rtol=0)
    assert result.terms[1] == pytest.approx([-0.1, -0.2], abs=1e-5)
    assert result.losses[1] == pytest.approx(-0.3, abs=1e-5)


def test_only_what_is_listed_receives_gradients():
    listed, other = leaf(1.0), leaf(1.0).requires_grad_(True)
    optimise([listed], lambda step: (listed * other).sum(), steps=2, lr=0.1)
    assert other.grad is None
    assert other.tolist() == [1.0]
    assert other.requires_grad
    assert listed.grad is None
    assert not listed.requires_grad


def test_an_unused_parameter_stays():
    used, unused = leaf(1.0), leaf(5.0)
    optimise([used, unused], lambda step: used.sum(), steps=2, lr=0.1)
    assert float(unused) == 5.0
    assert float(used) < 1.0


@pytest.mark.parametrize("error", [Cancelled(), torch.OutOfMemoryError("out of memory")])
@pytest.mark.parametrize("at", [0, 3])
def test_a_fault_keeps_the_completed_steps_and_frees_the_rest(error, at):
    value = leaf(1.0)

    def loss(step):
        if step == at:
            raise error
        return value.sum()

    with pytest.raises(type(error)) as held:  # a host keeps the traceback, and with it every frame
        optimise([value], loss, steps=6, lr=0.1)
    frame = next(entry for entry in held.traceback if entry.frame.code.name == "optimise").frame
    assert not frame.f_locals["optimiser"].state
    assert not frame.f_locals["history"]
    torch.testing.assert_close(value, torch.tensor([1 - 0.1 * at]), atol=1e-5, rtol=0)
    assert value.grad is None
    assert not value.requires_grad


def test_the_plateau_rule():
    rule = Plateau(3, gain=0.1)
    falling, flat = (
        torch.tensor([8.0, 4, 2, 1, 0.5, 0.25])[:, None],
        torch.tensor([8.0, 4, 2, 1.9, 1.95, 1.85])[:, None],
    )
    assert not rule(falling)
    assert rule(flat)
    assert not rule(flat[:3])
    two = torch.cat([falling, flat], 1)
    assert Plateau(3, 0.1, term=1)(two)
    assert not Plateau(3, 0.1, term=0)(two)
    assert Plateau(3, 0.1)(torch.zeros(6, 2))


def test_stop_rules_are_asked_rarely_and_end_the_run():
    value, asked, told = leaf(1.0), [], []

    class Third:
        every = 3

        def __call__(self, history):
            asked.append(len(history))
            return len(history) == 6

    result = optimise(
        [value], lambda step: value.sum(), steps=9, lr=0.1, stop=Third(), progress=lambda done, total: told.append(done)
    )
    assert asked == [3, 6]
    assert result.stopped
    assert result.steps == 6 == len(result.losses)
    assert told == [1, 2, 3, 4, 5, 6]


def test_same_inputs_same_bits():
    def once():
        weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
        return optimise([weight], lambda step: (weight @ weight).square().mean(), steps=20, lr=0.05).losses, weight

    (losses, weight), (again, other) = once(), once()
    assert losses == again
    assert torch.equal(weight, other)


def test_refusals():
    value = leaf(1.0)
    with pytest.raises(EditError, match="step 2"):
        optimise([value], lambda step: value.sum() * (float("nan") if step >= 2 else 1), steps=4, lr=0.1)
    with pytest.raises(EditError, match="detaches"):
        optimise([value], lambda step: value.detach().sum(), steps=1, lr=0.1)
    with pytest.raises(ParameterError, match="nothing to learn"):
        optimise([], lambda step: value.sum(), steps=1, lr=0.1)
    for wrong in (leaf(1.0).half(), leaf(1.0).requires_grad_() * 2):
        with pytest.raises(ParameterError, match="float32 leaves"):
            optimise([wrong], lambda step, wrong=wrong: wrong.sum(), steps=1, lr=0.1)
    with torch.inference_mode():
        hidden = torch.ones(1)
    with pytest.raises(ParameterError, match="float32 leaves"):
        optimise([hidden], lambda step: hidden.sum(), steps=1, lr=0.1)


def test_learning_mode_holds_inside_a_host_that_forbids_it():
    with torch.inference_mode():
        with learning_mode():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert torch.backends.cudnn.deterministic
        assert torch.is_inference_mode_enabled()
