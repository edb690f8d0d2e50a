"""Flux transformers of diffusers as Denoisers (Black Forest Labs 2024): flow in packed latents.

Patches of 2 x 2 latent pixels become tokens of 4 x channels numbers. Every token has a place (0, row, column) for the rotary
embedding; text tokens have (0, 0, 0). Guidance-distilled models (Flux dev) take a guidance value as an input, from the
positive prompt (`Context.guidance`), and need no negative prompt; Flux schnell takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipelines.core.errors import FamilyError
from ...pipelines.core.protocols import Context
from .flow_denoiser import FlowDenoiser

PATCH = 2
DEFAULT_GUIDANCE = 3.5  # as in ComfyUI


@dataclass
class FluxDenoiser(FlowDenoiser):
    """A diffusers FluxTransformer2DModel in sigma space. Attributes as in `FlowDenoiser`."""

    def _channels(self) -> int:
        config = self.transformer.config
        packed = int(config["in_channels"])
        if packed % PATCH**2 or packed != (config.get("out_channels") or packed) or config.get("patch_size", 1) != 1:
            raise FamilyError(
                f"this transformer takes {packed} packed channels and gives {config.get('out_channels') or packed} (a fill "
                "or control model): use the base model instead"
            )
        return packed // PATCH**2

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _timesteps(self, sigma: float | Tensor, contexts: int) -> Tensor:
        """Sigma itself: the network multiplies it by 1000."""
        if isinstance(sigma, float):
            return torch.full((), sigma, device=self.device)
        return sigma.flatten().repeat(contexts).to(self.device)

    def _added(self, contexts: Sequence[Context], batch: int, latent_pixels: torch.Size) -> dict[str, Tensor]:
        added = super()._added(contexts, batch, latent_pixels)
        if self.transformer.config.get("guidance_embeds"):
            values = [DEFAULT_GUIDANCE if context.guidance is None else context.guidance for context in contexts]
            added["guidance"] = torch.tensor(values, device=self.device).repeat_interleave(batch)
        return added

    def _run(self, x: Tensor, time: Tensor, tokens: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        # A side that the patches do not divide is wrapped around, as in ComfyUI.
        wrap = (0, -width % PATCH, 0, -height % PATCH)
        padded = F.pad(x, wrap, mode="circular") if any(wrap) else x
        rows, columns = padded.shape[-2] // PATCH, padded.shape[-1] // PATCH
        out = self.transformer(
            hidden_states=pack(padded),
            timestep=time.expand(len(x)).to(x.dtype),
            encoder_hidden_states=tokens,
            pooled_projections=added["pooled"],
            guidance=added["guidance"].to(x.dtype) if "guidance" in added else None,
            img_ids=places(rows, columns).to(x.device),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack(out, rows, columns)[..., :height, :width]


def pack(z: Tensor) -> Tensor:
    """Latents [B, C, h, w] as patches [B, h w / 4, 4 C], where the channel comes first in a patch."""
    return F.pixel_unshuffle(z, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: [B, C, 2 rows, 2 columns]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)


def places(rows: int, columns: int) -> Tensor:
    """(0, row, column) of every patch, [rows x columns, 3]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
