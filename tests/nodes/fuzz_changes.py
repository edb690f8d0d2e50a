"""How random calls change the values of sockets: not a number, other batches and sizes, broken entries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

Value = Any


def unchanged(value: Value, random: Random) -> Value:
    return value


def stained(value: Value, random: Random) -> Value:
    """The same value with NaN or infinity in one of its tensors, wherever it lies in a structure."""
    places = random.randrange(8)
    count = [0]

    def visit(part: Value) -> Value:
        if isinstance(part, Tensor) and part.is_floating_point() and part.numel():
            count[0] += 1
            if count[0] == places % 3 + 1 or count[0] == 1:
                part = part.clone(memory_format=torch.contiguous_format)
                part.view(-1)[random.randrange(part.numel())] = random.choice([math.nan, math.inf, -math.inf])
            return part
        if isinstance(part, dict):
            return {key: visit(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(visit(inner) for inner in part) if type(part) in (list, tuple) else part
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
            return dataclasses.replace(part, **{name: visit(inner) for name, inner in fields.items()})
        return part

    return visit(value)


def _tensor(change: Callable[[Tensor, Random], Tensor]) -> Callable[[Value, Random], Value]:
    return lambda value, random: change(value, random) if isinstance(value, Tensor) else value


def _samples(change: Callable[[Tensor, Random], Tensor]) -> Callable[[Value, Random], Value]:
    def changed(value: Value, random: Random) -> Value:
        if not (isinstance(value, dict) and isinstance(value.get("samples"), Tensor)):
            return value
        kept = value if random.random() < 0.5 else {}
        return {**kept, "samples": change(value["samples"], random)}

    return changed


def _tokens(change: Callable[[Tensor, Random], Tensor]) -> Callable[[Value, Random], Value]:
    def changed(value: Value, random: Random) -> Value:
        if not isinstance(value, list):
            return value
        return [[change(tokens, random), dict(extras)] for tokens, extras in value]

    return changed


def repeated(value: Tensor, random: Random) -> Tensor:
    return value.repeat(random.choice([2, 3]), *[1] * (value.ndim - 1))


def mixed(value: Tensor, random: Random) -> Tensor:
    """A batch whose images differ, in another order than the one before."""
    both = torch.cat([value, value.flip(-1), value * 0.5])
    return both[random.sample(range(len(both)), random.choice([2, len(both)]))]


def cropped(value: Tensor, random: Random) -> Tensor:
    return value[:, : random.choice([1, 3, 5])] if value.ndim < 4 else value[:, :, : random.choice([1, 3, 5])]


def soft(value: Tensor, random: Random) -> Tensor:
    """Nowhere 0 or 1: a ramp, below one half in one case of two."""
    ramp = torch.linspace(0.05, random.choice([0.45, 0.95]), value.shape[-1])
    return ramp.expand(value.shape).clone()


def of_type(value: Tensor, random: Random) -> Tensor:
    return value.to(random.choice([torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.complex64]))


def scaled(value: Tensor, random: Random) -> Tensor:
    return value * random.choice([0, 1e-20, 255, 1e20, -1])


def rising(value: Tensor, random: Random) -> Tensor:
    return value.flip(0)


def short(value: Tensor, random: Random) -> Tensor:
    return value[: random.choice([1, 2])]


def empty(value: Tensor, random: Random) -> Tensor:
    return value[:0]


def with_axis(value: Tensor, random: Random) -> Tensor:
    return random.choice([value[None], value[0], value.reshape(-1)])


def wider(value: Tensor, random: Random) -> Tensor:
    """Text of another encoder."""
    return value.repeat(1, 1, 8)[..., : random.choice([1, value.shape[-1] * 2, value.shape[-1] - 1])]


def longer(value: Tensor, random: Random) -> Tensor:
    return value.repeat(1, 2, 1)[:, : random.choice([0, 1, value.shape[1] + 3, value.shape[1] * 2])]


def more_channels(value: Tensor, random: Random) -> Tensor:
    return value.repeat(1, 4, 1, 1)[:, : random.choice([1, 3, 5, 16])]


def _foreign(value: Value, random: Random) -> Value:
    return random.choice([[], {}, {"samples": None}, "text", 3, torch.zeros(2)])


def _entries(value: Value, random: Random) -> Value:
    """Conditioning of several entries, with a range, an area, or broken extras."""
    if not (isinstance(value, list) and value and isinstance(value[0], list)):
        return value
    tokens, extras = value[0]
    extra = random.choice([{"start_percent": 0.3}, {"area": (1, 1, 0, 0)}, {"pooled_output": torch.full((1, 4), math.nan)},
                           {"strength": 0.5}, {"pooled_output": None}])  # fmt: skip
    return random.choice([[*value, *value], [[tokens, {**extras, **extra}]], [[tokens]], [[None, {}]]])


def _with_key(value: Value, random: Random) -> Value:
    if not isinstance(value, dict):
        return value
    keys: list[dict[str, Any]] = [
        {"noise_mask": torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(1))}, {"batch_index": [3, 1]},
        {"editkit_source": [1, 0]}, {"editkit_source": torch.tensor([5])}, {"editkit_sigma": math.nan},
    ]  # fmt: skip
    return {**value, **random.choice(keys)}


TEXT_CHANGES = (wider, longer, repeated, of_type, scaled, empty, with_axis)
BATCHES = (repeated, mixed, cropped, of_type, scaled, empty, with_axis)
CHANGES: dict[str, list[Callable[[Value, Random], Value]]] = {
    "IMAGE": [unchanged, stained, _foreign, *map(_tensor, BATCHES)],
    "MASK": [unchanged, stained, _foreign, *map(_tensor, (*BATCHES, soft, soft))],
    "EDITKIT_MASK_SCHEDULE": [unchanged, stained, _foreign, *map(_tensor, (*BATCHES, soft))],
    "SIGMAS": [unchanged, stained, _foreign, *map(_tensor, (of_type, scaled, empty, with_axis, rising, short))],
    "LATENT": [unchanged, stained, _foreign, _with_key, *map(_samples, (*BATCHES, more_channels))],
    "CONDITIONING": [unchanged, stained, _foreign, _entries, *map(_tokens, TEXT_CHANGES)],
    "NOISE": [unchanged],
    "MODEL": [unchanged] * 9 + [_foreign],
    "CLIP": [unchanged] * 9 + [_foreign],
    "VAE": [unchanged] * 9 + [_foreign],
}
