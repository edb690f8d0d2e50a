"""Changes of a network's weights: how a copy of it learns them, and the layout in which they are kept.

A change is kept as LoRA files keep it, so that other programs read it too: `LAYER.lora_up.weight` [out, rank],
`LAYER.lora_down.weight` [rank, in] and `LAYER.alpha` for a low-rank change (alpha / rank) up down; `LAYER.diff` and
`LAYER.diff_b` for a whole change of weight and bias. LAYER is the network's own name for the layer, or what a host maps
it to.
"""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import FamilyError, LoadError, MismatchError, ParameterError
from ..core.noise import STEP_STRIDE
from .memory import OPTIMISER_BYTES, MemoryNeed

KINDS = ("full", "lora")
ATTENTION = (re.compile(r"attn\d*\."), re.compile(r"attention"))  # the first that finds a layer counts
SUFFIXES = (".lora_up.weight", ".lora_down.weight", ".alpha", ".diff", ".diff_b")


@dataclass(frozen=True)
class TunePlan:
    """What of a network learns.

    Attributes:
        kind: "full", every weight and bias; "lora", low-rank additions to the attention projections.
        rank: of the additions, >= 1.
        seed: of their first values; the additions themselves start at 0.
        half: arithmetic: None = float32; torch.bfloat16 halves memory. What learns is float32 in both.
    """

    kind: str = "full"
    rank: int = 16
    seed: int = 0
    half: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ParameterError(f"kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.rank < 1:
            raise ParameterError(f"rank is {self.rank}: give 1 or more (16 is usual)")
        if self.half not in (None, torch.bfloat16):
            raise ParameterError(
                f"precision is {self.half}: small gradients become 0 in it; choose bfloat16 or float32"
            )

    @property
    def frozen(self) -> torch.dtype:
        """The type of the weights that stay as they are."""
        return torch.float32 if self.half is None or self.kind == "full" else self.half

    @property
    def autocast(self) -> torch.dtype | None:
        """What to run float32 weights in: those that learn must stay float32, and arithmetic around them may not."""
        return self.half if self.kind == "full" else None


class LowRank(nn.Module):
    """A linear layer, unchanged, plus a learned change of low rank in float32."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rank, bound = min(rank, layer.in_features, layer.out_features), 1 / math.sqrt(layer.in_features)
        down = torch.rand(rank, layer.in_features, generator=generator) * 2 * bound - bound
        device = layer.weight.device
        self.layer = layer
        self.down = nn.Parameter(down.to(device), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.layer(x)
        return plain + F.linear(F.linear(x.float(), self.down), self.up).to(plain.dtype)


class Learner:
    """A frozen copy of a network, `network`, that belongs to nobody else, and what learns of it in float32."""

    def __init__(
        self,
        original: nn.Module,
        plan: TunePlan,
        layer_name: Callable[[str], str] = str,
        device: torch.device | None = None,
    ) -> None:
        """`layer_name` maps the network's names; `device` is the copy's, None = the original's.

        Raises: FamilyError where no layer can learn as planned.
        """
        self._layer_name = layer_name
        self.network = copied(original, plan.frozen, device)
        self._added: dict[str, LowRank] = {}
        self._start: dict[str, Tensor] = {}
        if plan.kind == "lora":
            self._added = _add_low_rank(self.network, plan, layer_name)
        else:  # the start is kept in the original's type, which holds it exactly
            self._start = {name: value.detach().to("cpu", copy=True) for name, value in _storable(original)}

    @property
    def parameters(self) -> list[Tensor]:
        """What learns, where it lies now."""
        if self._added:
            return [value for added in self._added.values() for value in (added.down, added.up)]
        return list(dict.fromkeys(value for _, value in _storable(self.network)))

    def changes(self) -> dict[str, Tensor]:
        """What was learned, on the CPU, in the layout of the module text."""
        layer_name = self._layer_name
        found: dict[str, Tensor] = {}
        for name, added in self._added.items():
            layer = layer_name(name)
            found[f"{layer}.lora_up.weight"], found[f"{layer}.lora_down.weight"] = _kept(added.up), _kept(added.down)
            found[f"{layer}.alpha"] = torch.tensor(float(len(added.down)))
        for name, value in _storable(self.network):
            if name in self._start:
                layer, _, part = name.rpartition(".")
                suffix = "diff" if part == "weight" else "diff_b"
                found[f"{layer_name(layer)}.{suffix}"] = _kept(value) - self._start[name].float()
        return found


def copied(network: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """A frozen copy with weights of its own in another type and place, made without a copy in between."""
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for value in (*network.parameters(), *network.buffers()):
            if id(value) not in memo:
                kind = dtype if value.is_floating_point() else value.dtype
                made = torch.empty_like(value, dtype=kind, device=device or value.device).copy_(value.detach())
                memo[id(value)] = nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made
        return copy.deepcopy(network, memo).eval()


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def _storable(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Weights, and biases of layers that have a weight: what the layout has a name for."""
    named = dict(network.named_parameters())
    return [
        (name, value)
        for name, value in named.items()
        if name.endswith(".weight") or (name.endswith(".bias") and f"{name[:-5]}.weight" in named)
    ]


def attention_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The projections of its attention layers, by name. Raises FamilyError where there are none."""
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for pattern in ATTENTION:
        found = {name: layer for name, layer in linear.items() if pattern.search(name)}
        if found:
            return found
    raise FamilyError(
        f"this {type(network).__name__} has no attention projections that a LoRA could change: choose the full fine-tune"
    )


def learning_need(network: nn.Module, plan: TunePlan) -> MemoryNeed:
    """What a copy of `network` that learns takes: the copy, and the optimiser's share for what learns of it."""
    numbers = sum(value.numel() for value in network.parameters())
    learning = numbers
    if plan.kind == "lora":
        layers = attention_layers(network).values()
        learning = sum(plan.rank * (layer.in_features + layer.out_features) for layer in layers)
    return MemoryNeed(numbers * plan.frozen.itemsize + OPTIMISER_BYTES * learning)


def _add_low_rank(network: nn.Module, plan: TunePlan, layer_name: Callable[[str], str]) -> dict[str, LowRank]:
    """Put additions around the layers; their first values depend on the layer's name, so that hosts agree on them."""
    added: dict[str, LowRank] = {}
    for name, layer in attention_layers(network).items():
        number = zlib.crc32(layer_name(name).encode())
        generator = torch.Generator("cpu").manual_seed((plan.seed + number * STEP_STRIDE) % 2**64)
        added[name] = LowRank(layer, plan.rank, generator)
    for name, around in added.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, around)
    return added


@torch.no_grad()
def apply_changes(network: nn.Module, changes: Mapping[str, Tensor], layer_name: Callable[[str], str] = str) -> None:
    """Add changes to the weights of `network`, in place; computed in float32 and kept in the weights' own type.

    Raises: MismatchError for a change that no layer of this network has.
    """
    left, given = set(changes), dict(changes)
    for name, module in network.named_modules():
        layer = layer_name(name)
        for part, change in _layer_changes(layer, given).items():
            value = getattr(module, part, None)
            if value is None or value.shape.numel() != change.numel():
                raise MismatchError(f"the learned weights change {name}.{part}, which this model has in another shape")
            value.copy_(value.float() + change.to(value.device).reshape(value.shape))
            left -= {layer + suffix for suffix in SUFFIXES}
    if left:
        raise MismatchError(
            f"the learned weights were made for another model: {len(left)} of them have no place here"
            f" ({', '.join(sorted(left)[:3])})"
        )


def save_changes(changes: Mapping[str, Tensor], path: Path) -> Path:
    """Write changes as a LoRA file (safetensors); folders are made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: change.contiguous() for name, change in changes.items()}, path, metadata={"format": "pt"})
    return path


def load_changes(path: Path) -> dict[str, Tensor]:
    """Read a LoRA file. Raises LoadError for one that is missing or no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path} cannot be read ({error}): choose a LoRA file that was saved as safetensors") from error


def _layer_changes(layer: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 changes of one layer's weight and bias."""
    found = {
        part: given[layer + end].float()
        for part, end in (("weight", ".diff"), ("bias", ".diff_b"))
        if layer + end in given
    }
    up = given.get(f"{layer}.lora_up.weight")
    if up is not None:
        down = given[f"{layer}.lora_down.weight"].float()
        scale = float(given.get(f"{layer}.alpha", torch.tensor(float(len(down))))) / len(down)
        found["weight"] = scale * (up.float().flatten(1) @ down.flatten(1))
    return found
