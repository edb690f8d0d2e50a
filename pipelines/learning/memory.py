"""Does learning fit? What it takes on top of the model, measured on one forward pass, against what is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import EditError

OPTIMISER_BYTES = 12  # per learned number: a gradient and Adam's two moments, float32


@dataclass
class MemoryNeed:
    """Bytes that learning takes on top of what lies in memory already.

    Attributes:
        state: gradients and Adam's moments.
        activations: what one step keeps for its backward pass, each storage counted once.
    """

    state: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.state + self.activations

    def check(self, device: torch.device, what: str, make_room: Callable[[int], object] | None = None) -> None:
        """Raises EditError where `device` cannot hold it; `make_room` may move other things away first."""
        free = free_memory(device)
        if free is not None and self.total > free and make_room is not None:
            make_room(self.total)
            free = free_memory(device)
        if free is not None and self.total > free:
            raise EditError(
                f"{what} needs {self.total / 2**30:.1f} GB more on {device}, where {free / 2**30:.1f} GB are free: let less"
                " learn (LoRA, a lower rank, fewer blocks), switch low_memory on, or use a smaller picture"
            )


@contextmanager
def measured(parameters: Sequence[Tensor]) -> Iterator[MemoryNeed]:
    """Find out what a step of learning `parameters` will keep: run its forward pass, once, inside. Nothing is kept."""
    from torch.multiprocessing.reductions import StorageWeakRef

    need = MemoryNeed(OPTIMISER_BYTES * sum(parameter.numel() for parameter in parameters))
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    seen: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again

    def count(value: Tensor) -> None:
        storage = value.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref.cdata not in seen and storage._cdata not in own:
            seen[ref.cdata] = ref
            need.activations += storage.nbytes()

    def absent(_: None) -> Tensor:
        raise RuntimeError("a measured forward pass has nothing to go back on")

    asked = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(count, absent):
            yield need
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on `device`; None where nobody can tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    import psutil

    return int(psutil.virtual_memory().available)
