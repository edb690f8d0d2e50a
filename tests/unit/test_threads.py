"""Two calls at once on one headless model: both are right, and the model is whole afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch

from editkit.hosts.diffusers.finetune import network_blocks
from editkit.pipelines.attention.pair_batch import single_rows
from editkit.pipelines.core.attention_sites import Controlled, Passive
from editkit.pipelines.learning.in_use import deterministic_convolutions, in_use
from editkit.pipelines.learning.optimise import learning_mode, recomputing
from editkit.tests.parity import attention_nets as nets
from editkit.tests.toys import random_latent

TIMES = 3
Z = random_latent(1, 4, 8, 8, seed=9) * 2


class Halved(Passive):
    """Every attention gives half of its queries: far from what the layers give themselves."""

    def wants(self, site) -> bool:
        return True

    def attend(self, q, k, v, site):
        return q / 2 if q.shape == v.shape else None


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Threads change after every few instructions, as they do after hours of work."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def state(unet) -> list:
    """What a call may change for its own time: processors, hooks and `forward`."""
    return [
        (name, vars(module).get("processor"), vars(module).get("forward"), len(module._forward_hooks))
        for name, module in unet.named_modules()
    ]


def together(*calls) -> list[list]:
    """The results of each call, made by its own thread several times while the others make theirs."""
    barrier = Barrier(len(calls))

    def repeat(call) -> list:
        barrier.wait()
        return [call() for _ in range(TIMES)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(repeat, call) for call in calls]]


def test_calls_with_and_without_attention_control_do_not_meet():
    model = nets.denoiser("sd1")
    context = nets.prompt(1, model.family)
    controlled = Controlled(Halved(), single_rows(1, ("cond",)))
    calls = [lambda: model.denoise(Z, 2.0, [context], controlled), lambda: model.denoise(Z, 2.0, [context])]
    wanted, before = [call() for call in calls], state(model.unet)
    assert not torch.allclose(*wanted)
    for results, right in zip(together(*calls), wanted, strict=True):
        assert all(torch.equal(result, right) for result in results)
    assert state(model.unet) == before


def test_two_threads_may_recompute_the_same_blocks():
    model = nets.denoiser("sd1")
    context = nets.prompt(1, model.family)
    before, flags = state(model.unet), (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)

    def learn() -> torch.Tensor:
        with learning_mode():
            tokens = context.tokens.clone().requires_grad_(True)
            with recomputing(network_blocks(model.unet)):
                loss = model.denoise(Z, 2.0, [context.with_tokens(tokens)]).square().sum()
                return torch.autograd.grad(loss, tokens)[0]

    right = learn()
    assert all(torch.equal(result, right) for results in together(learn, learn) for result in results)
    assert state(model.unet) == before
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == flags


def test_a_thread_waits_for_blocks_that_another_recomputes():
    blocks = [torch.nn.Linear(1, 1)]
    entered = Event()

    def enter() -> None:
        with recomputing(blocks):
            entered.set()

    thread = Thread(target=enter)
    with recomputing(blocks):
        thread.start()
        assert not entered.wait(0.3)
    thread.join()
    assert entered.is_set() and "forward" not in vars(blocks[0])


def test_the_settings_of_convolutions_return_when_the_last_thread_leaves():
    before = torch.backends.cudnn.deterministic
    first, second = deterministic_convolutions(), deterministic_convolutions()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.deterministic
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.deterministic == before


def test_a_thread_may_use_again_what_it_uses():
    layers = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
    entered = []
    with in_use(layers), in_use(reversed(layers)):
        entered.append(True)
    assert entered == [True]
