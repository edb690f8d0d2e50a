"""Changes of a network's weights: a copy that learns them, and their file layout.

Changes have the layout of LoRA files, which other programs read. A low-rank change (alpha / rank) up down has the keys
`LAYER.lora_up.weight` [out, rank], `LAYER.lora_down.weight` [rank, in] and `LAYER.alpha`. A full change of weight and bias
has `LAYER.diff` and `LAYER.diff_b`. LAYER is the layer's name in the network, or the name that a host maps it to.
"""

from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import FamilyError, LoadError, MismatchError
from ..core.noise import STEP_STRIDE, folded_seed
from ..core.tune_plan import TunePlan
from .memory import OPTIMISER_BYTES, MemoryNeed

ATTENTION = (re.compile(r"attn\d*\."), re.compile(r"attention"))  # the first pattern that matches a layer decides
SUFFIXES = (".lora_up.weight", ".lora_down.weight", ".alpha", ".diff", ".diff_b")


class LowRank(nn.Module):
    """A frozen linear layer plus a learned low-rank change in float32."""

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
    """A frozen copy of a network and its float32 weights that learn.

    Attributes:
        network: the copy; it shares no weight with the original.
    """

    def __init__(
        self,
        original: nn.Module,
        plan: TunePlan,
        layer_name: Callable[[str], str] = str,
        device: torch.device | None = None,
    ) -> None:
        """Copy a network.

        Args:
            original: the network; it is not changed.
            plan: which weights learn.
            layer_name: maps a layer's name in the network to its name in LoRA files.
            device: of the copy; None = the original's.
        Raises: FamilyError where no layer can learn as planned.
        """
        self._layer_name = layer_name
        self.network = copied(original, plan.frozen_dtype, device)
        self._added: dict[str, LowRank] = {}
        self._start: dict[str, Tensor] = {}
        if plan.kind == "lora":
            self._added = _add_low_rank(self.network, plan, layer_name)
        else:  # the original's type holds the initial weights exactly
            self._start = {name: value.detach().to("cpu", copy=True) for name, value in _storable(original)}

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that learn."""
        if self._added:
            return [value for added in self._added.values() for value in (added.down, added.up)]
        return list(dict.fromkeys(value for _, value in _storable(self.network)))

    def changes(self) -> dict[str, Tensor]:
        """The learned changes on the CPU, in the layout of the module docstring."""
        layer_name = self._layer_name
        found: dict[str, Tensor] = {}
        for name, added in self._added.items():
            layer = layer_name(name)
            found[f"{layer}.lora_up.weight"] = _kept(added.up)
            found[f"{layer}.lora_down.weight"] = _kept(added.down)
            found[f"{layer}.alpha"] = torch.tensor(float(len(added.down)))
        for name, value in _storable(self.network):
            if name in self._start:
                layer, _, part = name.rpartition(".")
                suffix = "diff" if part == "weight" else "diff_b"
                found[f"{layer_name(layer)}.{suffix}"] = _kept(value) - self._start[name].float()
        return found


def copied(network: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """A frozen copy of a network in another type and on another device, made without an intermediate copy."""
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
    """Weights, and biases of layers that have a weight: the parameters that the file layout can name."""
    named = dict(network.named_parameters())
    return [
        (name, value)
        for name, value in named.items()
        if name.endswith(".weight") or (name.endswith(".bias") and f"{name[:-5]}.weight" in named)
    ]


def attention_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The projections of a network's attention layers, by name. Raises FamilyError where there are none."""
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for pattern in ATTENTION:
        found = {name: layer for name, layer in linear.items() if pattern.search(name)}
        if found:
            return found
    raise FamilyError(
        f"this {type(network).__name__} has no attention projections that a LoRA could change: choose the full fine-tune"
    )


def learning_need(network: nn.Module, plan: TunePlan) -> MemoryNeed:
    """The memory that a `Learner` of `network` needs: the copy, and gradients and Adam's moments of what learns."""
    numbers = sum(value.numel() for value in network.parameters())
    learning = numbers
    if plan.kind == "lora":
        layers = attention_layers(network).values()
        learning = sum(plan.rank * (layer.in_features + layer.out_features) for layer in layers)
    return MemoryNeed(numbers * plan.frozen_dtype.itemsize + OPTIMISER_BYTES * learning)


def _add_low_rank(network: nn.Module, plan: TunePlan, layer_name: Callable[[str], str]) -> dict[str, LowRank]:
    """Wrap the attention projections. Initial values depend on the layer's name, so that all hosts draw the same."""
    added: dict[str, LowRank] = {}
    for name, layer in attention_layers(network).items():
        number = zlib.crc32(layer_name(name).encode())
        generator = torch.Generator("cpu").manual_seed((folded_seed(plan.seed) + number * STEP_STRIDE) % 2**64)
        added[name] = LowRank(layer, plan.rank, generator)
    for name, around in added.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, around)
    return added


@torch.no_grad()
def apply_changes(network: nn.Module, changes: Mapping[str, Tensor], layer_name: Callable[[str], str] = str) -> None:
    """Add changes to the weights of `network`, in place. Sums are float32 and then rounded to the weights' type.

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
            f"the learned weights were made for another model: {len(left)} of them belong to no layer of this one"
            f" ({', '.join(sorted(left)[:3])})"
        )


def save_changes(changes: Mapping[str, Tensor], path: Path) -> Path:
    """Write changes as a LoRA file (safetensors); folders are made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: change.contiguous() for name, change in changes.items()}, path, metadata={"format": "pt"})
    return path


def load_changes(path: Path) -> dict[str, Tensor]:
    """Read a LoRA file. Raises LoadError for a file that is missing or not safetensors."""
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
