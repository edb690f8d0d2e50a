"""What every optimisation shares besides the optimiser: memory, gradient checkpointing, precision, what is shown (T20)."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from editkit.pipelines.blended.decoder_tuning import DecoderSettings, tune_decoder
from editkit.pipelines.core.errors import EditError, ParameterError
from editkit.pipelines.core.progress import LossProgress, StagedProgress, silent
from editkit.pipelines.core.tune_plan import TunePlan
from editkit.pipelines.layerdiffusion.embeddings import EmbeddingOptions, layered_embeddings
from editkit.pipelines.layerdiffusion.finetune import TuneOptions, layered_tune
from editkit.pipelines.learning import memory as module
from editkit.pipelines.learning.early_stopping import MeanPlateau
from editkit.pipelines.learning.memory import MemoryNeed, measured
from editkit.pipelines.learning.optimise import OBSERVE_EVERY, autocast, optimise, recomputing
from editkit.pipelines.learning.weight_deltas import learning_need
from editkit.tests.toy_codec import ToyCodec, box, smooth_image
from editkit.tests.toy_layered import digest, network, network_text, object_mask, patched
from editkit.tests.toys import random_latent

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------------------------- memory
def test_the_measure_counts_what_a_step_keeps():
    weight, x = torch.ones(30, 20), torch.ones(5, 20)
    with measured([weight]) as need:
        hidden = x @ weight.T  # keeps x: 5 x 20 numbers
        (hidden.exp() + hidden.exp()).sum()  # each exp keeps its own result: 5 x 30 numbers
    assert need.activations == 4 * (5 * 20 + 2 * 5 * 30)
    assert need.state == 12 * 30 * 20  # a gradient and two moments
    assert need.total == need.state + need.activations
    assert not weight.requires_grad


def test_shared_storages_and_the_weights_themselves_count_once():
    weight, x = torch.ones(4, 4), torch.ones(6, 4, requires_grad=True)
    with measured([weight]) as need:
        (x @ weight).sum() + (x[:3] @ weight).sum() + (x @ weight.T).sum()
    assert need.activations == 4 * 6 * 4


def test_nothing_is_kept_and_flags_are_restored_after_an_error():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(KeyError), measured([weight, other := torch.ones(2)]):
        kept = weakref.ref((weight * weight).exp())
        raise KeyError
    gc.collect()
    assert kept() is None
    assert weight.requires_grad and not other.requires_grad


def test_what_does_not_fit_is_refused_with_figures(monkeypatch):
    need = MemoryNeed(2 * 2**30, 2**30)
    monkeypatch.setattr(module, "free_memory", lambda device: 2**30)
    with pytest.raises(EditError, match=r"tuning needs 3\.0 GB more on cpu, where 1\.0 GB are free"):
        need.check(CPU, "tuning")
    made = []
    monkeypatch.setattr(module, "free_memory", lambda device: 4 * 2**30 if made else 2**30)
    need.check(CPU, "tuning", made.append)
    assert made == [need.total]
    monkeypatch.setattr(module, "free_memory", lambda device: None)
    need.check(CPU, "tuning")


def test_free_memory_is_known_where_it_can_be():
    free = module.free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
    assert module.free_memory(torch.device("meta")) is None


def test_the_need_of_a_copy_that_learns():
    unet = network().unet
    numbers = sum(value.numel() for value in unet.parameters())
    assert learning_need(unet, TunePlan()).total == numbers * 16
    assert (
        learning_need(unet, TunePlan(compute_dtype=torch.bfloat16)).total == numbers * 16
    )  # what learns stays float32
    low = TunePlan("lora", rank=2, compute_dtype=torch.bfloat16)
    clone = network().model_clone(low, (1, 4, 8, 8))
    learning = sum(value.numel() for value in clone.parameters)
    assert learning_need(unet, low).total == numbers * 2 + learning * 12


@pytest.mark.parametrize("what", ["decoder", "embeddings", "model", "activations"])
def test_too_little_memory_is_noticed_before_the_first_step(what, monkeypatch):
    told, denoiser = [], network()

    def progress(done, total, preview=None):
        told.append(done)

    copies = learning_need(denoiser.unet, TunePlan()).total
    monkeypatch.setattr(module, "free_memory", lambda device: copies if what == "activations" else 100)
    with pytest.raises(EditError, match="GB are free"):
        if what == "decoder":
            tune_decoder(ToyCodec(), torch.zeros(1, 3, 4, 4), smooth_image(1, 16, 16), None, box(1, 16, 16, (0, 8), (0, 8)),
                         settings=DecoderSettings(steps=2), progress=progress)  # fmt: skip
        elif what == "embeddings":
            fit(denoiser, progress)
        else:
            tune(denoiser, TunePlan(), progress)
    assert told == []


# ----------------------------------------------------------------------------------------------------------- checkpoints
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x).tanh().exp().sin()


def test_recomputing_keeps_less_and_gives_the_same_gradients():
    blocks = [Block() for _ in range(3)]
    own_forward = blocks[2].forward
    blocks[2].forward = own_forward  # somebody else's patch
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def run():
        value = x
        for block in blocks:
            value = block(value)
        return value.square().mean()

    weights = [weight for block in blocks for weight in block.parameters()]
    kept, gradients = [], []
    for chosen in ((), blocks):
        with recomputing(chosen):
            with measured(weights) as need:
                run()
            kept.append(need.activations)
            gradients.append(torch.autograd.grad(run(), weights))
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert blocks[0].calls == 5  # twice forward in each round, and once more on the way back
    assert patched(nn.ModuleList(blocks)) == ["2"] and blocks[2].forward is own_forward


def test_recomputing_is_undone_by_an_error():
    block = Block()
    with pytest.raises(KeyError), recomputing([block]):
        assert patched(block) == [""]
        raise KeyError
    assert patched(block) == []


def test_arithmetic_in_half_precision():
    with autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ParameterError, match="bfloat16"):
        autocast(CPU, torch.float16)


# -------------------------------------------------------------------------------------------------------- curves and stops
class Curves:
    def __init__(self):
        self.told: list[tuple[str, int]] = []

    def __call__(self, done, total, preview=None):
        self.told.append(("step", done))

    def losses(self, values):
        self.told.append(("losses", len(values)))
        self.last = list(values)


def test_the_loss_curve_is_shown_while_it_falls():
    value, curves = torch.ones(1), Curves()
    assert isinstance(curves, LossProgress) and not isinstance(silent, LossProgress)
    steps = 2 * OBSERVE_EVERY + 3
    result = optimise(
        [value], lambda step: torch.stack([value.sum(), 2 * value.sum()]), steps=steps, lr=0.1, progress=curves
    )
    assert [count for kind, count in curves.told if kind == "losses"] == [OBSERVE_EVERY, 2 * OBSERVE_EVERY, steps]
    assert [count for kind, count in curves.told if kind == "step"] == list(range(1, steps + 1))
    assert curves.last == result.losses


def test_a_part_of_a_run_shows_its_curve_too():
    curves = Curves()
    second = StagedProgress(curves, (10, OBSERVE_EVERY))(1)
    optimise(
        [torch.ones(1)],
        lambda step: torch.ones(1, requires_grad=True).sum(),
        steps=OBSERVE_EVERY,
        lr=0.1,
        progress=second,
    )
    assert curves.told[-2:] == [("losses", OBSERVE_EVERY), ("step", 10 + OBSERVE_EVERY)]
    assert not isinstance(StagedProgress(silent, (1, 2))(0), LossProgress)


class Stopping(Curves):
    """Asks to stop once `at` steps are reported, until another stage starts."""

    def __init__(self, at: int, refresh: float = float("inf")) -> None:
        super().__init__()
        self.at, self.asked, self.refresh = at, True, refresh

    def stop_requested(self):
        return self.asked and len([kind for kind, _ in self.told if kind == "step"]) >= self.at

    def proceed(self):
        self.asked = False


def test_a_stop_ends_the_optimisation_and_keeps_what_it_learned():
    value, reference = torch.ones(1), torch.ones(1)
    result = optimise([value], lambda step: value.square().sum(), steps=50, lr=0.1, progress=Stopping(7))
    assert result.steps == 7 and result.stopped
    optimise([reference], lambda step: reference.square().sum(), steps=7, lr=0.1)
    assert torch.equal(value, reference)


def test_another_stage_starts_after_a_stop():
    progress = Stopping(0)
    staged = StagedProgress(progress, (5, 5))
    value = torch.ones(1)
    result = optimise([value], lambda step: value.square().sum(), steps=5, lr=0.1, progress=staged(0))
    assert result.steps == 5  # `proceed` was called, so a request of before is forgotten
    assert isinstance(staged(1), LossProgress)


def test_a_progress_may_want_the_losses_by_the_clock():
    value, curves = torch.ones(1), Stopping(99, refresh=0.0)
    optimise([value], lambda step: value.square().sum(), steps=3, lr=0.1, progress=curves)
    assert [count for kind, count in curves.told if kind == "losses"] == [1, 2, 3]


def test_means_tell_a_noisy_loss_that_stands_still():
    rule, noise = MeanPlateau(50, gain=0.05), torch.rand(100, 1, generator=torch.Generator().manual_seed(0))
    falling = torch.linspace(2, 1, 100)[:, None] * (0.5 + noise)
    assert rule(1 + noise) and not rule(falling)
    assert not rule((1 + noise)[:99])


# ------------------------------------------------------------------------------------------------------------------ faults
class Cancelled(Exception):
    """What a host raises from its progress bar."""


FAULTS = [
    Cancelled(),
    RuntimeError("a kernel failed"),
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyboardInterrupt(),
]
STEPS = 6


def fit(denoiser, progress=silent, low_memory=False):
    options = EmbeddingOptions(steps=STEPS, lr=0.1, low_memory=low_memory)
    return layered_embeddings(
        denoiser, random_latent(1, 4, 8, 8), network_text(1), network_text(2), object_mask(8, 8), seeds=[1],
        options=options, progress=progress,
    )  # fmt: skip


def tune(denoiser, plan, progress=silent, low_memory=False):
    options = TuneOptions(plan=plan, steps=STEPS, lr=1e-2, low_memory=low_memory)
    return layered_tune(
        denoiser, random_latent(1, 4, 8, 8), random_latent(1, 4, 8, 8, seed=1), network_text(1), object_mask(8, 8),
        seeds=[1], options=options, progress=progress,
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["embeddings", "lora", "full"])
@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_at_any_iteration_leaves_the_model_as_it_was(stage, error):
    at = random.Random(f"{stage} {error!r}").randint(1, STEPS)
    denoiser, copies = network(), []
    before, generator, make = digest(denoiser.unet), torch.get_rng_state(), denoiser.model_clone

    def breaking(module, args):
        module.seen = getattr(module, "seen", 0) + 1
        if module.seen == at + 1:  # once for the measure
            raise error

    def clone(plan, shape):
        made = make(plan, shape)
        copies.extend(weakref.ref(value) for value in made.parameters)
        if not isinstance(error, Cancelled):
            made.denoiser.unet.register_forward_pre_hook(breaking)
        return made

    def progress(done, total, preview=None):
        if isinstance(error, Cancelled) and done == at:
            raise error

    denoiser.model_clone = clone
    denoiser.max_rows = 1  # a batch too large would be cut first
    hook = None
    if stage == "embeddings" and not isinstance(error, Cancelled):
        hook = denoiser.unet.register_forward_pre_hook(breaking)
    with pytest.raises(type(error)) as caught:
        fit(denoiser, progress, True) if stage == "embeddings" else tune(
            denoiser, TunePlan(stage, rank=2), progress, True
        )
    assert caught.value is error
    if hook is not None:
        hook.remove()
    error.__traceback__ = None
    del caught
    gc.collect()
    assert digest(denoiser.unet) == before
    assert patched(denoiser.unet) == []
    assert not any(value.requires_grad or value.grad is not None for value in denoiser.unet.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert stage == "embeddings" or (copies and all(copy() is None for copy in copies)), "the copy is still in memory"


def test_success_leaves_nothing_behind_either():
    denoiser, copies = network(), []
    make, before = denoiser.model_clone, digest(denoiser.unet)

    def clone(plan, shape):
        made = make(plan, shape)
        copies.extend(weakref.ref(value) for value in made.parameters)
        return made

    denoiser.model_clone = clone
    tune(denoiser, TunePlan())
    gc.collect()
    assert copies and all(copy() is None for copy in copies)
    assert digest(denoiser.unet) == before


def test_learning_works_where_the_host_forbids_it():
    """A host runs nodes under inference mode, and hands out weights and latents that autograd may not save."""
    with torch.inference_mode():
        tuned = tune(network(), TunePlan("lora", rank=2))
    same = tune(network(), TunePlan("lora", rank=2))
    assert all(torch.equal(change, same.changes[name]) for name, change in tuned.changes.items())
    assert not any(change.is_inference() for change in tuned.changes.values())
    with torch.inference_mode(False):
        denoiser = network()
    with torch.inference_mode():
        found = fit(denoiser)  # hosts see to ordinary tensors where the network itself is used
    assert torch.equal(found.mixed.tokens, fit(network()).mixed.tokens)
