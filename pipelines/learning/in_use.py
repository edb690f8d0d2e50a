"""One thread at a time changes a network: its attention processors, the `forward` of its blocks, cuDNN's settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_guard = Lock()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def in_use(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Wait until no other thread has any of `modules` in use, and keep them until the end of the block.

    The same thread may enter again. Locks are taken in one order for all threads, so that two cannot wait for each other.
    """
    with _guard:
        locks = [_locks.setdefault(module, RLock()) for module in sorted(set(modules), key=id)]
    with ExitStack() as entered:
        for lock in locks:
            entered.enter_context(lock)
        yield


class _Deterministic:
    """How many threads need deterministic convolutions, and the settings from before the first."""

    def __init__(self) -> None:
        self.users = 0
        self.before = (False, False)

    def enter(self) -> None:
        cudnn = torch.backends.cudnn
        with _guard:
            if self.users == 0:
                self.before = (cudnn.deterministic, cudnn.benchmark)
                cudnn.deterministic, cudnn.benchmark = True, False
            self.users += 1

    def leave(self) -> None:
        cudnn = torch.backends.cudnn
        with _guard:
            self.users -= 1
            if self.users == 0:
                cudnn.deterministic, cudnn.benchmark = self.before


_deterministic = _Deterministic()


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """cuDNN is deterministic inside; its settings return when the last thread leaves."""
    _deterministic.enter()
    try:
        yield
    finally:
        _deterministic.leave()
