"""What the denoisers over diffusers networks share: batches of contexts, splitting by memory, hooks, precision."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.core.attention_sites import Controlled
from ...pipelines.core.errors import ParameterError, ShapeError
from ...pipelines.core.guidance import mix
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_width
from ...pipelines.learning.in_use import in_use
from ...pipelines.learning.loss_scaling import LossScaling
from .attention_hooks import ControlledCall

log = logging.getLogger("editkit")


class NetworkDenoiser(ABC):
    """A diffusers network in sigma space (see `Denoiser`). A subclass says what the network takes and predicts."""

    layer_prefix: str
    family: str
    flow: bool
    channels: int
    max_rows: int | None
    table: Tensor
    _fingerprint: str | None
    _text_width: int | None

    @property
    @abstractmethod
    def network(self) -> Any:
        """The diffusers module."""

    @abstractmethod
    def with_network(self, network: Any) -> Any:
        """The same denoiser over another network of this kind."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The network's blocks, for gradient checkpointing (`optimise.recomputing`)."""

    @property
    @abstractmethod
    def training_sigmas(self) -> Tensor:
        """Sigma of every training timestep, ascending float32 [T]."""

    @abstractmethod
    def _kind(self) -> str:
        """What tells models of equal weights apart: family and prediction, for the fingerprint."""

    @abstractmethod
    def _input(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """The network's input for the latent z [B, C, h, w] at `sigma`."""

    @abstractmethod
    def _denoised(self, z: Tensor, out: Tensor, sigma: float | Tensor) -> Tensor:
        """The denoised latents of the network's outputs `out` [contexts, B, C, h, w]."""

    @abstractmethod
    def _timesteps(self, sigma: float | Tensor, contexts: int) -> Tensor:
        """The network's time for every batch row; a 0-dimensional tensor if all rows share it."""

    @abstractmethod
    def _added(self, contexts: Sequence[Context], batch: int, latent_pixels: torch.Size) -> dict[str, Tensor]:
        """What the network takes beside latent, time and tokens, one row per batch row."""

    @abstractmethod
    def _run(self, x: Tensor, time: Tensor, tokens: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """One network call."""

    @abstractmethod
    def _hooks(
        self, control: Controlled, sigma: float, latent_pixels: tuple[int, int]
    ) -> AbstractContextManager[ControlledCall]:
        """Attention hooks for one call of `denoise`."""

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = f"{self._kind()}-{weights_digest(self.network)}"
        return self._fingerprint

    def combine(
        self, z: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor, scale: float, contexts: Sequence[Context]
    ) -> Tensor:
        """See `Denoiser.combine`: plain classifier-free guidance."""
        return mix(cond, uncond, scale)

    def denoise(
        self, z: Tensor, sigma: float | Tensor, contexts: Sequence[Context], control: Controlled | None = None
    ) -> Tensor:
        """See `Denoiser.denoise`; gradients reach the contexts. Raises ParameterError, ShapeError, FamilyError."""
        sigma = self._checked_sigma(sigma, len(z), control)
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ShapeError(f"latent is {list(z.shape)}: this model takes [batch, {self.channels}, height, width]")
        if control is not None and len(control.rows.batch) != len(z):
            raise ShapeError(f"latent batch has {len(z)} rows but the control names {len(control.rows.batch)}")
        for context in contexts:
            check_width(context.tokens.shape[-1], self._text_width, context.socket)
        span = LossScaling(self.dtype if control is None else None)  # a control may learn inside the network
        z, contexts = span.enter(z.to(self.device, torch.float32)), span.contexts(contexts)
        x = self._input(z, sigma)
        latent_pixels = (int(z.shape[-2]), int(z.shape[-1]))
        hooks = nullcontext() if control is None else self._hooks(control, float(sigma), latent_pixels)
        with in_use(self.blocks), hooks as call:  # another thread's hooks would run here too
            network = [self._network(x, sigma, group, call) for group in _same_length(contexts)]
        return span.leave(self._denoised(z, torch.cat(network), sigma))

    def _checked_sigma(self, sigma: float | Tensor, batch: int, control: Controlled | None) -> float | Tensor:
        """One sigma for all latents, or one for each, [B, 1, 1, 1] on the device."""
        sigmas = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)
        if (sigmas <= 0).any():
            raise ParameterError(f"sigma is {float(sigmas.min())}: a denoiser needs a sigma above 0")
        if len(sigmas) == 1:
            return float(sigma)
        if len(sigmas) != batch or control is not None:
            raise ShapeError(
                f"{len(sigmas)} sigmas came for a latent batch of {batch}: give 1 or {batch}, and 1 with a control"
            )
        return sigmas.to(self.device).view(-1, 1, 1, 1)

    def _network(
        self, x: Tensor, sigma: float | Tensor, group: Sequence[tuple[int, Context]], hooks: ControlledCall | None
    ) -> Tensor:
        """Raw network output [len(group), B, C, h, w] in float32.

        Args:
            x: network input [B, C, h, w].
            sigma: one for all latents, or [B, 1, 1, 1].
            group: contexts with the same number of tokens, each with its number among all contexts.
            hooks: of a call with attention control.
        """
        contexts = [context for _, context in group]
        batch = x.shape[0]
        tokens = torch.cat([rows_of_batch(context.tokens, batch, "conditioning") for context in contexts])
        added = self._added(contexts, batch, x.shape[-2:])
        rows = x.repeat(len(contexts), 1, 1, 1).to(self.dtype)
        tokens = tokens.to(self.device, self.dtype)
        t = self._timesteps(sigma, len(contexts))
        control_rows = [row for number, _ in group for row in hooks.rows_of.chunk(number)] if hooks else []

        def call(begin: int, end: int) -> Tensor:
            extra = {name: value[begin:end] for name, value in added.items()}
            if hooks:
                hooks.rows = tuple(control_rows[begin:end])
            time = t[begin:end] if t.ndim else t
            return self._run(rows[begin:end], time, tokens[begin:end], extra).float()

        return self._chunked(call, len(rows), hooks.rows_of.unit if hooks else 1).reshape(len(contexts), *x.shape)

    def _chunked(self, call: Callable[[int, int], Tensor], rows: int, unit: int = 1) -> Tensor:
        """Call the network on all batch rows, in as few calls as memory allows; the limit is kept for later calls.

        Args:
            call: the network on the rows from `begin` to `end`.
            rows: their number.
            unit: rows that must stay in one call; calls take multiples of it.
        """
        while True:
            size = max(unit, (self.max_rows or rows) // unit * unit)
            try:
                parts = [call(i, min(i + size, rows)) for i in range(0, rows, size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.cuda.OutOfMemoryError:
                if size == unit:
                    raise
                self.max_rows = max(1, min(size, rows) // 2)
                torch.cuda.empty_cache()
                log.warning("out of memory with %d rows in one call: trying %d", size, self.max_rows)


def rows_of_batch(value: Tensor, batch: int, socket: str) -> Tensor:
    if value.shape[0] not in (1, batch):
        raise ShapeError(f"{socket} has {value.shape[0]} rows but the latent batch has {batch}: pass 1 or {batch}")
    return value.expand(batch, *value.shape[1:])


def _same_length(contexts: Sequence[Context]) -> Iterator[list[tuple[int, Context]]]:
    """Groups of neighbouring contexts with the same number of tokens, for one call each. Every context has its number."""
    group: list[tuple[int, Context]] = []
    for number, context in enumerate(contexts):
        if group and group[0][1].tokens.shape[1:] != context.tokens.shape[1:]:
            yield group
            group = []
        group.append((number, context))
    if group:
        yield group


def weights_digest(module: nn.Module) -> str:
    """A short name for a set of weights, from names, shapes and a few values of every tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        sample = value.detach().flatten()[:: max(1, value.numel() // 16)][:16].float().cpu()
        digest.update(name.encode() + str(tuple(value.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()
