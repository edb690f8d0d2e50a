"""Estimate the memory of one optimisation step and refuse to start if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import EditError
from ..core.protocols import Denoiser

OPTIMISER_BYTES = 12  # per learned number: its gradient and Adam's two moments, float32


@dataclass
class MemoryNeed:
    """Bytes that an optimisation needs on top of what is in memory already.

    Attributes:
        state: gradients and Adam's moments.
        activations: what one forward pass keeps for its backward pass, each storage counted once.
    """

    state: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.state + self.activations

    def check(self, device: torch.device, what: str, make_room: Callable[[int], object] | None = None) -> None:
        """Refuse what does not fit.

        Args:
            device: where the optimisation runs.
            what: its name, for the error.
            make_room: called with the bytes needed if they are not free; it may unload other models.
        Raises: EditError where the device still has too little memory.
        """
        free = free_memory(device)
        if free is not None and self.total > free and make_room is not None:
            make_room(self.total)
            free = free_memory(device)
        if free is not None and self.total > free:
            raise EditError(
                f"{what} needs {self.total / 2**30:.1f} GB more on {device}, where {free / 2**30:.1f} GB are free:"
                " train fewer weights (LoRA, a lower rank, fewer blocks), switch low_memory on, or use a smaller image"
            )


@contextmanager
def measured(parameters: Sequence[Tensor]) -> Iterator[MemoryNeed]:
    """Measure what an optimisation of `parameters` needs: run its forward pass once inside. It keeps no activations."""
    from torch.multiprocessing.reductions import StorageWeakRef

    need = MemoryNeed(OPTIMISER_BYTES * sum(parameter.numel() for parameter in parameters))
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    seen: dict[int, StorageWeakRef] = {}  # a weak reference prevents the reuse of the address

    def count(value: Tensor) -> None:
        storage = value.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref.cdata not in seen and storage._cdata not in own:
            seen[ref.cdata] = ref
            need.activations += storage.nbytes()

    def refuse(_: None) -> Tensor:
        raise RuntimeError("a measured forward pass keeps no activations, so it has no backward pass")

    asked = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(count, refuse):
            yield need
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)


def check_step_memory(parameters: Sequence[Tensor], loss: Callable[[], object], denoiser: Denoiser, what: str) -> None:
    """Estimate the memory of one optimisation step and refuse to start if it does not fit. Evaluates `loss` once.

    Args:
        parameters: what learns.
        loss: the forward pass of one step.
        denoiser: the model that the loss evaluates; a host's denoiser may unload other models to make room.
        what: the optimisation's name, for the error.
    Raises: EditError.
    """
    with measured(parameters) as need:
        loss()
    need.check(denoiser.device, what, getattr(denoiser, "make_room", None))


def free_memory(device: torch.device) -> int | None:
    """Free bytes on `device`; None where they are not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    import psutil

    return int(psutil.virtual_memory().available)
