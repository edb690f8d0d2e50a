"""A diffusers U-Net as a Denoiser.

Families: SD 1.x, SD 2.x (eps and v prediction), SDXL and the bundled model. Transformer (flow) models run in ComfyUI only.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.core.attention_sites import Controlled
from ...pipelines.core.errors import FamilyError, ParameterError, ShapeError
from ...pipelines.core.guidance import mix
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_channels, check_width
from ...pipelines.core.sigmas import spaced_sigmas
from ...pipelines.core.tune_plan import TunePlan
from ...pipelines.learning.in_use import in_use
from ...pipelines.learning.loss_scaling import LossScaling
from .attention_hooks import ControlledCall, attention_hooks
from .finetune import DiffusersClone, network_blocks, with_changes

log = logging.getLogger("editkit")

FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass
class DiffusersDenoiser:
    """A diffusers UNet2DConditionModel in sigma space.

    Attributes:
        unet: the network, in any floating dtype; latents outside it are float32.
        table: sigma of every training timestep, ascending float32 [T].
        prediction: "epsilon" or "v_prediction".
        family: one of FAMILIES, "bundled", or the width of a text that none of them has.
        scaling_factor: VAE latent to model scale.
        factor: VAE factor, for SDXL's size embedding.
        max_rows: largest batch of one network call; None = no limit. It is halved when memory runs out.
        spacing: of the grids' timesteps, one of `sigmas.SPACINGS`.
    """

    unet: Any  # diffusers modules: their attributes are not typed
    table: Tensor
    prediction: str
    family: str
    scaling_factor: float
    factor: int
    max_rows: int | None = None
    flow: bool = False
    spacing: str = "leading"
    _fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise FamilyError(
                f"prediction type {self.prediction!r} is not supported headless: epsilon and v_prediction are"
            )
        self.channels = int(self.unet.config["in_channels"])
        if self.channels != int(self.unet.config["out_channels"]):
            raise FamilyError(
                f"this U-Net takes {self.channels} channels (an inpainting model): use the base model instead"
            )
        self.table = self.table.float().cpu()
        width = self.unet.config.get("encoder_hid_dim") or self.unet.config.get("cross_attention_dim")
        self._text_width = width if isinstance(width, int) else None

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = f"{self.family}-{self.prediction}-{weights_digest(self.unet)}"
        return self._fingerprint

    @property
    def training_sigmas(self) -> Tensor:
        """Sigma of every training timestep, ascending float32 [T]."""
        return self.table

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        return spaced_sigmas(self.table, steps, strength, self.spacing)

    def noise(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        return clean + sigma * noise

    def combine(
        self, z: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor, scale: float, contexts: Sequence[Context]
    ) -> Tensor:
        """See `Denoiser.combine`: plain classifier-free guidance."""
        return mix(cond, uncond, scale)

    def scale_in(self, latent: Tensor) -> Tensor:
        check_channels(latent, self.channels)
        return latent.to(self.device, torch.float32) * self.scaling_factor

    def scale_out(self, z: Tensor) -> Tensor:
        return z / self.scaling_factor

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's blocks, for gradient checkpointing (`optimise.recomputing`)."""
        return network_blocks(self.unet)

    def model_clone(self, plan: TunePlan, shape: Sequence[int]) -> DiffusersClone:
        """See `TunableDenoiser.model_clone`."""
        return DiffusersClone(self, plan)

    def with_changes(self, changes: Mapping[str, Tensor]) -> DiffusersDenoiser:
        """A denoiser with a copy of the weights plus `changes`. Raises MismatchError for another model's changes."""
        return with_changes(self, changes)

    def timestep(self, sigma: float) -> int:
        """The training timestep whose log sigma is nearest (exact on the grid)."""
        distance = (self.table.double().log() - torch.tensor(max(sigma, 1e-10), dtype=torch.float64).log()).abs()
        return int(distance.argmin())

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
        scale = (1 + sigma * sigma) ** -0.5
        latent_pixels = (int(z.shape[-2]), int(z.shape[-1]))
        hooks = nullcontext() if control is None else attention_hooks(self.unet, control, float(sigma), latent_pixels)
        with in_use(network_blocks(self.unet)), hooks as call:  # another thread's hooks would run here too
            network = [self._network(z * scale, sigma, group, call) for group in _same_length(contexts)]
        out = torch.cat(network)
        if self.prediction == "epsilon":
            return span.leave(z - sigma * out)
        return span.leave(z * (scale * scale) - out * (sigma * scale))

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

    def _timesteps(self, sigma: float | Tensor, contexts: int) -> Tensor:
        """The timestep of every batch row, or one number if all rows share it."""
        if isinstance(sigma, float):
            return torch.full((), self.timestep(sigma), device=self.device)
        return torch.tensor([self.timestep(each) for each in sigma.flatten().tolist()] * contexts).to(self.device)

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
        tokens = torch.cat([_rows(context.tokens, batch, "conditioning") for context in contexts])
        added = self._added(contexts, batch, x.shape[-2:])
        rows = x.repeat(len(contexts), 1, 1, 1).to(self.dtype)
        tokens = tokens.to(self.device, self.dtype)
        t = self._timesteps(sigma, len(contexts))
        control_rows = [row for number, _ in group for row in hooks.rows_of.chunk(number)] if hooks else []

        def call(begin: int, end: int) -> Tensor:
            extra = {name: value[begin:end] for name, value in added.items()}
            kwargs = {"added_cond_kwargs": extra} if extra else {}
            if hooks:
                hooks.rows = tuple(control_rows[begin:end])
            time = t[begin:end] if t.ndim else t
            return self.unet(rows[begin:end], time, tokens[begin:end], return_dict=False, **kwargs)[0].float()

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

    def _added(self, contexts: Sequence[Context], batch: int, latent_pixels: torch.Size) -> dict[str, Tensor]:
        """SDXL's pooled text and size embedding; nothing for other families."""
        if self.unet.config.get("addition_embed_type") != "text_time":
            return {}
        pooled = []
        for context in contexts:
            if context.pooled is None:
                raise FamilyError(
                    "this SDXL model needs pooled text embeddings: encode the prompt with its own text encoder"
                )
            pooled.append(_rows(context.pooled, batch, "conditioning"))
        height, width = (int(side) * self.factor for side in latent_pixels)
        ids = torch.tensor([height, width, 0, 0, height, width], device=self.device, dtype=self.dtype)
        return {
            "text_embeds": torch.cat(pooled).to(self.device, self.dtype),
            "time_ids": ids.expand(len(contexts) * batch, -1),
        }


def _rows(value: Tensor, batch: int, socket: str) -> Tensor:
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
