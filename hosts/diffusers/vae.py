"""A diffusers AutoencoderKL as a LatentCodec, and its decoder as a `DecoderClone`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.core.errors import ShapeError
from ...pipelines.core.shapes import check_channels, check_latent


@dataclass
class DiffusersCodec:
    """A diffusers AutoencoderKL. It computes in the VAE's dtype and returns float32."""

    vae: Any

    def __post_init__(self) -> None:
        self.factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        self.channels = int(self.vae.config["latent_channels"])

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        if image.shape[1] % self.factor or image.shape[2] % self.factor:
            raise ShapeError(
                f"image is {image.shape[2]} x {image.shape[1]}: pad it to multiples of {self.factor} pixels"
            )
        pixels = image.movedim(-1, 1).to(self.device, self.dtype) * 2 - 1
        with torch.no_grad():
            posterior = self.vae.encode(pixels).latent_dist
        mean = posterior.mean.float()
        return mean if noise is None else mean + posterior.std.float() * noise.to(mean)

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        check_latent(latent, "latent", self.channels)
        with torch.no_grad():
            pixels = self.vae.decode(latent.to(self.device, self.dtype)).sample.float()
        image = pixels.movedim(1, -1) * 0.5 + 0.5
        return image.clamp(0, 1) if clamp else image

    def decoder_clone(self) -> DiffusersDecoder:
        return DiffusersDecoder(self)


class DiffusersDecoder:
    """A float32 copy of a decoder as a chain of blocks: start and middle, each upsampling block, end."""

    def __init__(self, codec: DiffusersCodec) -> None:
        self._codec = codec
        post = getattr(codec.vae, "post_quant_conv", None)
        with torch.inference_mode(False):
            self._decoder: Any = copy.deepcopy(codec.vae.decoder).float().requires_grad_(False)
            self._post: Any = nn.Identity() if post is None else copy.deepcopy(post).float().requires_grad_(False)
        decoder = self._decoder
        self.blocks: Sequence[nn.Module] = [
            nn.Sequential(decoder.conv_in, decoder.mid_block),
            *decoder.up_blocks,
            nn.Sequential(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out),
        ]

    def prepare(self, latent: Tensor) -> Tensor:
        check_channels(latent, self._codec.channels)
        return self._post(latent.to(self._codec.device, torch.float32))

    def finish(self) -> TunedCodec:
        """The tuned decoder stays in float32. The encoder is the original module, not a copy."""
        vae = copy.copy(self._codec.vae)
        vae._modules = {**vae._modules, "decoder": self._decoder.requires_grad_(False), "post_quant_conv": self._post}
        return TunedCodec(vae)

    def release(self) -> None:
        self.blocks = []
        self._decoder = self._post = None


class TunedCodec(DiffusersCodec):
    """A codec with a float32 decoder and an encoder of any dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.encoder.parameters()).dtype

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        check_latent(latent, "latent", self.channels)
        with torch.no_grad():
            pixels = self.vae.decoder(self.vae.post_quant_conv(latent.to(self.device, torch.float32)))
        image = pixels.movedim(1, -1) * 0.5 + 0.5
        return image.clamp(0, 1) if clamp else image
