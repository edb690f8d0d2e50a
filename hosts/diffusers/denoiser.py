"""A diffusers U-Net as a Denoiser.

Families: SD 1.x, SD 2.x (eps and v prediction), SDXL and the bundled model. Flow transformers: `flow_denoiser.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.core.attention_sites import Controlled
from ...pipelines.core.errors import FamilyError
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_channels
from ...pipelines.core.sigmas import spaced_sigmas
from ...pipelines.core.tune_plan import TunePlan
from .attention_hooks import ControlledCall, attention_hooks
from .finetune import DiffusersClone, network_blocks, with_changes
from .network_denoiser import NetworkDenoiser, rows_of_batch

FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass
class DiffusersDenoiser(NetworkDenoiser):
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

    layer_prefix = "lora_unet_"
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
    def network(self) -> Any:
        return self.unet

    def with_network(self, network: Any) -> Any:
        return replace(self, unet=network, _fingerprint=None)

    @property
    def blocks(self) -> list[nn.Module]:
        return network_blocks(self.unet)

    @property
    def training_sigmas(self) -> Tensor:
        """Sigma of every training timestep, ascending float32 [T]."""
        return self.table

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        return spaced_sigmas(self.table, steps, strength, self.spacing)

    def noise(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        return clean + sigma * noise

    def scale_in(self, latent: Tensor) -> Tensor:
        check_channels(latent, self.channels)
        return latent.to(self.device, torch.float32) * self.scaling_factor

    def scale_out(self, z: Tensor) -> Tensor:
        return z / self.scaling_factor

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

    def _kind(self) -> str:
        return f"{self.family}-{self.prediction}"

    def _input(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        return z * _signal(sigma)

    def _denoised(self, z: Tensor, out: Tensor, sigma: float | Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return z - sigma * out
        scale = _signal(sigma)
        return z * (scale * scale) - out * (sigma * scale)

    def _hooks(
        self, control: Controlled, sigma: float, latent_pixels: tuple[int, int]
    ) -> AbstractContextManager[ControlledCall]:
        return attention_hooks(self.unet, control, sigma, latent_pixels)

    def _timesteps(self, sigma: float | Tensor, contexts: int) -> Tensor:
        """The timestep of every batch row, or one number if all rows share it."""
        if isinstance(sigma, float):
            return torch.full((), self.timestep(sigma), device=self.device)
        return torch.tensor([self.timestep(each) for each in sigma.flatten().tolist()] * contexts).to(self.device)

    def _run(self, x: Tensor, time: Tensor, tokens: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        kwargs = {"added_cond_kwargs": dict(added)} if added else {}
        return self.unet(x, time, tokens, return_dict=False, **kwargs)[0]

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
            pooled.append(rows_of_batch(context.pooled, batch, "conditioning"))
        height, width = (int(side) * self.factor for side in latent_pixels)
        ids = torch.tensor([height, width, 0, 0, height, width], device=self.device, dtype=self.dtype)
        return {
            "text_embeds": torch.cat(pooled).to(self.device, self.dtype),
            "time_ids": ids.expand(len(contexts) * batch, -1),
        }


def _signal(sigma: Any) -> Any:
    """The share of the signal in a variance-preserving latent, one number or one per latent."""
    return (1 + sigma * sigma) ** -0.5
