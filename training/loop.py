"""The one training loop skeleton of the stages: step-based, seeded per step, resumable, with an EMA.

A stage is a function of the step number alone, so a run that is stopped and resumed takes the same steps as one that
is not. Checkpoints are safetensors (weights, EMA, Adam moments), never pickles.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

log = logging.getLogger("editkit.training")


def cosine_lr(step: int, steps: int, *, warmup: int = 100, hold: float = 0.0, floor: float = 0.01) -> float:
    """Factor on the peak learning rate: linear warm-up, constant for the fraction `hold` of the steps, then cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    begin = max(warmup, hold * steps)
    if step <= begin:
        return 1.0
    progress = min(1.0, (step - begin) / max(1.0, steps - begin))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of one step (CPU): equal for a resumed run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Trainer:
    """Weights, their EMA and an AdamW, saved together. `named` is the flat dict of every parameter that learns."""

    def __init__(self, named: dict[str, torch.nn.Parameter], lr: float, *, ema: float, weight_decay: float = 0.01):
        self.named = named
        self.lr = lr
        self.decay = ema
        self.step = 0
        self.optimizer = torch.optim.AdamW(named.values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.ema = {name: value.detach().clone() for name, value in named.items()}

    def update(self, loss: torch.Tensor, factor: float, *, clip: float = 1.0) -> None:
        """One optimiser step at `factor` times the peak learning rate, then the EMA."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.named.values()), clip)
        self.optimizer.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.named.values()], 1 - decay)

    def save(self, path: Path) -> None:
        tensors = {}
        for name, value in self.named.items():
            tensors[f"weight/{name}"] = value.detach().contiguous()
            tensors[f"ema/{name}"] = self.ema[name].contiguous()
            state = self.optimizer.state.get(value)
            if state:
                tensors[f"m/{name}"], tensors[f"v/{name}"] = (
                    state["exp_avg"].contiguous(),
                    state["exp_avg_sq"].contiguous(),
                )
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"step": str(self.step)})
        temporary.replace(path)

    def resume(self, path: Path) -> bool:
        """Continue from `path` if it exists."""
        if not path.exists():
            return False
        with safe_open(path, "pt") as file, torch.no_grad():
            keys = set(file.keys())
            self.step = int(file.metadata()["step"])
            for name, value in self.named.items():
                value.copy_(file.get_tensor(f"weight/{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema/{name}"))
                if f"m/{name}" in keys:
                    moments = {"exp_avg": file.get_tensor(f"m/{name}"), "exp_avg_sq": file.get_tensor(f"v/{name}")}
                    self.optimizer.state[value] = {
                        "step": torch.tensor(float(self.step)),
                        **{key: tensor.to(value.device) for key, tensor in moments.items()},
                    }
        log.info("resumed %s at step %d", path.name, self.step)
        return True

    def adopt_ema(self) -> None:
        """Put the EMA into the live weights (at the end of a stage, or for an evaluation of a copy)."""
        with torch.no_grad():
            for name, value in self.named.items():
                value.copy_(self.ema[name])


def run_steps(
    trainer: Trainer,
    steps: int,
    loss_of_step: Callable[[int], torch.Tensor],
    *,
    checkpoint: Path,
    lr: Callable[[int], float],
    save_every: int = 200,
    log_every: int = 50,
) -> Iterator[int]:
    """Train until `steps`; yields each step number after it, so that a stage can measure its model in between."""
    mean = 0.0
    begun = time.monotonic()
    first = trainer.step
    while trainer.step < steps:
        loss = loss_of_step(trainer.step)
        trainer.update(loss, lr(trainer.step))
        mean = loss.item() if trainer.step == first + 1 else 0.98 * mean + 0.02 * loss.item()
        if trainer.step % log_every == 0:
            rate = (trainer.step - first) / (time.monotonic() - begun)
            log.info("%s step %d/%d loss %.5f, %.2f steps/s", checkpoint.stem, trainer.step, steps, mean, rate)
        if trainer.step % save_every == 0 or trainer.step == steps:
            trainer.save(checkpoint)
        yield trainer.step


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
