"""Flow transformers of diffusers as Denoisers: SD3's layout (Esser et al. 2024), which the bundled flow model shares.

z_sigma = (1 - sigma) clean + sigma noise; the network predicts the velocity v = noise - clean, so the denoised latent is
z - sigma v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipelines.core.attention_sites import Controlled
from ...pipelines.core.errors import FamilyError
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_channels
from ...pipelines.core.sigmas import even_sigmas
from ...pipelines.core.tune_plan import TunePlan
from .attention_hooks import ControlledCall
from .finetune import DiffusersClone, with_changes
from .joint_hooks import joint_hooks
from .network_denoiser import NetworkDenoiser, rows_of_batch


@dataclass
class FlowDenoiser(NetworkDenoiser):
    """A diffusers SD3Transformer2DModel in sigma space.

    Attributes:
        transformer: the network, in any floating dtype; latents outside it are float32.
        table: the grid that schedules are cut from, ascending float32 [T], above 0 and up to 1.
        scaling_factor, shift_factor: VAE latent to model scale, (latent - shift) x scale.
        max_rows: largest batch of one network call; None = no limit. It is halved when memory runs out.
    """

    layer_prefix = "lora_transformer_"
    transformer: Any  # diffusers modules: their attributes are not typed
    table: Tensor
    scaling_factor: float
    shift_factor: float = 0.0
    max_rows: int | None = None
    flow: bool = True
    family: str = "flow"
    _fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.channels = self._channels()
        self.table = self.table.float().cpu()
        self._text_width = int(self.transformer.config["joint_attention_dim"])
        self._pooled_width = int(self.transformer.config["pooled_projection_dim"])

    def _channels(self) -> int:
        config = self.transformer.config
        if config["in_channels"] != (config["out_channels"] or config["in_channels"]):
            raise FamilyError(
                f"this transformer takes {config['in_channels']} channels (an inpainting or control model): use the "
                "base model instead"
            )
        return int(config["in_channels"])

    @property
    def network(self) -> Any:
        return self.transformer

    def with_network(self, network: Any) -> Any:
        return replace(self, transformer=network, _fingerprint=None)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    @property
    def training_sigmas(self) -> Tensor:
        """A flow model has no training timesteps. Raises FamilyError."""
        raise FamilyError("this model has no training timesteps: leave offset, end and rounding as they are")

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        """See `Denoiser.schedule`: even entries of the shifted table, as ComfyUI's scheduler "simple"."""
        return even_sigmas(self.table, steps, strength)

    def noise(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        weight = sigma if isinstance(sigma, float) else torch.as_tensor(sigma).to(clean).reshape(-1, 1, 1, 1)
        return (1 - weight) * clean + weight * noise

    def scale_in(self, latent: Tensor) -> Tensor:
        check_channels(latent, self.channels)
        return (latent.to(self.device, torch.float32) - self.shift_factor) * self.scaling_factor

    def scale_out(self, z: Tensor) -> Tensor:
        return z / self.scaling_factor + self.shift_factor

    def model_clone(self, plan: TunePlan, shape: Sequence[int]) -> DiffusersClone:
        """See `TunableDenoiser.model_clone`."""
        return DiffusersClone(self, plan)

    def with_changes(self, changes: Mapping[str, Tensor]) -> FlowDenoiser:
        """A denoiser with a copy of the weights plus `changes`. Raises MismatchError for another model's changes."""
        return with_changes(self, changes)

    def _kind(self) -> str:
        return type(self.transformer).__name__

    def _input(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        return z

    def _denoised(self, z: Tensor, out: Tensor, sigma: float | Tensor) -> Tensor:
        return z - sigma * out

    def _hooks(
        self, control: Controlled, sigma: float, latent_pixels: tuple[int, int]
    ) -> AbstractContextManager[ControlledCall]:
        return joint_hooks(self.transformer, control, sigma, latent_pixels, self.patch)

    @property
    def patch(self) -> int:
        """Latent pixels on a side of one image token."""
        return int(self.transformer.config["patch_size"])

    def _timesteps(self, sigma: float | Tensor, contexts: int) -> Tensor:
        if isinstance(sigma, float):
            return torch.full((), sigma * 1000, device=self.device)
        return (sigma.flatten() * 1000).repeat(contexts).to(self.device)

    def _added(self, contexts: Sequence[Context], batch: int, latent_pixels: torch.Size) -> dict[str, Tensor]:
        pooled = []
        for context in contexts:
            if context.pooled is None or context.pooled.shape[-1] != self._pooled_width:
                came = "none" if context.pooled is None else f"one of width {context.pooled.shape[-1]}"
                raise FamilyError(
                    f"{context.socket} needs a pooled text embedding of width {self._pooled_width} but brings {came}: "
                    "encode the prompt with the model's own text encoder"
                )
            pooled.append(rows_of_batch(context.pooled, batch, "conditioning"))
        return {"pooled": torch.cat(pooled).to(self.device, self.dtype)}

    def _run(self, x: Tensor, time: Tensor, tokens: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        patch = int(self.transformer.config["patch_size"])
        # A side that the patches do not divide is wrapped around, as in ComfyUI.
        padded = F.pad(x, (0, -width % patch, 0, -height % patch), mode="circular") if _odd(x, patch) else x
        out = self.transformer(
            hidden_states=padded,
            timestep=time.expand(len(x)).to(x.dtype),
            encoder_hidden_states=tokens,
            pooled_projections=added["pooled"],
            return_dict=False,
        )[0]
        return out[..., :height, :width]


def _odd(x: Tensor, patch: int) -> bool:
    return any(side % patch for side in x.shape[-2:])
