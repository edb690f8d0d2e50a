"""A native VAE as a LatentCodec, and a copy of its decoder that can be fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import DiagonalGaussianRegularizer
from comfy.ldm.modules.diffusionmodules.model import Decoder, nonlinearity
from comfy.ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from torch import Tensor

from ...pipelines.core.errors import FamilyError, ShapeError
from ...pipelines.core.shapes import check_image, check_latent

TRAINING_MEMORY = 6  # memory of a backward pass, in float32 decodes: an estimate (14 GB at 512 x 512)


class NativeCodec:
    """See `LatentCodec`. Results stay on the VAE's device. When memory runs out it works in tiles, as ComfyUI does."""

    def __init__(self, vae: Any) -> None:
        if not hasattr(vae, "first_stage_model") or vae.first_stage_model is None:
            raise FamilyError(f"vae is a {type(vae).__name__} without weights: connect a VAE loader")
        if vae.latent_dim != 2 or vae.output_channels != 3:
            raise FamilyError(
                f"vae is a {type(vae.first_stage_model).__name__} with {vae.latent_dim}-dimensional latents "
                "(video or audio): EditKit edits still images"
            )
        self.vae = vae
        self.factor = int(vae.spacial_compression_decode())
        self.channels = int(vae.latent_channels)
        self._on_device = _without_clamp(vae)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @torch.no_grad()
    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """See `LatentCodec.encode`. Raises ShapeError for a size that the VAE would crop."""
        image = check_image(image, "image")
        if image.shape[1] % self.factor or image.shape[2] % self.factor:
            size = f"{image.shape[2]} x {image.shape[1]}"
            raise ShapeError(f"image is {size}: pad it to multiples of {self.factor} pixels")
        if noise is None:
            return self._on_device.encode(image).float()
        return torch.cat([self._sample(image[i : i + 1], noise[i : i + 1]) for i in range(image.shape[0])])

    def _sample(self, image: Tensor, noise: Tensor) -> Tensor:
        """One draw from the posterior of one image [1, H, W, 3]: mean + standard deviation x noise."""
        vae = getattr(self.vae, "source", self.vae)
        model = vae.first_stage_model
        if not isinstance(getattr(model, "regularization", None), DiagonalGaussianRegularizer):
            raise FamilyError(
                f"vae is a {type(model).__name__}, whose posterior has no standard deviation: encode the mean"
            )
        pixels = vae.process_input(image.movedim(-1, 1)).to(vae.device, vae.vae_dtype)
        management.load_models_gpu([vae.patcher], memory_required=vae.memory_used_encode(pixels.shape, vae.vae_dtype))
        moments = model.encoder(pixels)
        if hasattr(model, "quant_conv"):
            moments = model.quant_conv(moments)
        posterior = DiagonalGaussianDistribution(moments.float())
        return posterior.mean + posterior.std * noise.to(posterior.mean)

    @torch.no_grad()
    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        """See `LatentCodec.decode`."""
        image = self._on_device.decode(check_latent(latent, "latent", self.channels))
        return image.clamp(0, 1) if clamp else image

    def decoder_clone(self) -> NativeDecoderClone:
        """See `LatentCodec.decoder_clone`. Raises FamilyError for a decoder whose blocks are not known."""
        return NativeDecoderClone(self.vae)


def _without_clamp(vae: Any) -> Any:
    """A shallow copy (same weights) that leaves results on the compute device and does not clip colours.

    Two points of the VAE's own mapping to [0, 1] give the range of the raw decoder.
    """
    low, high = vae.process_output(torch.tensor([-0.5, 0.5])).tolist()
    shadow = copy.copy(vae)
    shadow.output_device = vae.device
    shadow.process_output = lambda image: image * (high - low) + (low + high) / 2
    return shadow


class NativeDecoderClone:
    """See `DecoderClone`: always float32, because half precision cannot hold small updates."""

    blocks: Sequence[torch.nn.Module]

    def __init__(self, vae: Any) -> None:
        model = vae.first_stage_model
        decoder: Any = getattr(model, "decoder", None)
        if not _can_be_tuned(decoder):
            name = type(model if decoder is None else decoder).__name__
            raise FamilyError(
                f"the decoder of vae is a {name}, which cannot be tuned: connect the model's full KL autoencoder"
            )
        management.load_models_gpu([vae.patcher], force_full_load=True)  # the copy contains the patches in force
        with torch.inference_mode(False):
            own = DecoderOnly(decoder, getattr(model, "post_quant_conv", None))
            own.to(device=vae.patcher.offload_device, dtype=torch.float32).requires_grad_(False).eval()
        self._patcher = comfy.model_patcher.ModelPatcher(own, vae.device, vae.patcher.offload_device)
        self._vae: Any = vae
        self._own: Any = own
        self.blocks = own.chain()

    def prepare(self, latent: Tensor) -> Tensor:
        """See `DecoderClone.prepare`; makes room for the optimisation first. Gradients reach a latent that learns."""
        latent = check_latent(latent, "latent", int(self._vae.latent_channels))
        need = TRAINING_MEMORY * self._vae.memory_used_decode(latent.shape, torch.float32)
        learning = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():
            management.load_models_gpu([self._patcher], memory_required=need, force_full_load=True)
            with torch.set_grad_enabled(learning):
                return self._own.first(latent.to(self._vae.device, torch.float32).clone())

    def finish(self) -> NativeCodec:
        """See `DecoderClone.finish`. `codec.vae` is the patched VAE for native nodes; it encodes with the original."""
        self._own.requires_grad_(False)
        return NativeCodec(TunedVAE(self._vae, self._own, self._patcher))

    def release(self) -> None:
        """See `DecoderClone.release`."""
        self.blocks = ()
        if self._patcher is not None:
            self._patcher.detach()
        self._patcher = self._own = None


def _can_be_tuned(decoder: Any) -> bool:
    """Whether it is ComfyUI's decoder of still images. Newer versions build video decoders of the same class."""
    ends_early = getattr(decoder, "give_pre_end", False)  # older versions leave out the last layers with it
    return type(decoder) is Decoder and not ends_early and isinstance(decoder.conv_in, torch.nn.Conv2d)


class DecoderOnly(torch.nn.Module):
    """A copy of a VAE's decoding half. Names match the whole VAE's state dict."""

    def __init__(self, decoder: Decoder, post_quant_conv: torch.nn.Module | None) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        if post_quant_conv is not None:
            self.post_quant_conv = copy.deepcopy(post_quant_conv)

    def first(self, latent: Tensor) -> Tensor:
        return self.post_quant_conv(latent) if hasattr(self, "post_quant_conv") else latent

    def decode(self, latent: Tensor, **options: Any) -> Tensor:
        """Latent to [B, 3, H, W] in [-1, 1], as ComfyUI calls it."""
        return self.decoder(self.first(latent), **options)

    def chain(self) -> list[torch.nn.Module]:
        """The decoder as a chain whose first blocks training may freeze: start and middle, one block per resolution, end."""
        middle = [_Resolution(self.decoder.up[i]) for i in reversed(range(self.decoder.num_resolutions))]
        return [_Start(self.decoder), *middle, _End(self.decoder)]


class _Start(torch.nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.conv_in, self.mid = decoder.conv_in, decoder.mid

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid.block_1(self.conv_in(x), None)
        return self.mid.block_2(self.mid.attn_1(x), None)


class _Resolution(torch.nn.Module):
    def __init__(self, up: Any) -> None:
        super().__init__()
        self.up: Any = up

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.up.block):
            x = block(x, None)
            if len(self.up.attn) > 0:
                x = self.up.attn[i](x)
        return self.up.upsample(x) if hasattr(self.up, "upsample") else x


class _End(torch.nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.norm_out = decoder.norm_out
        self.conv_out = decoder.conv_out
        self.tanh_out = decoder.tanh_out

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_out(nonlinearity(self.norm_out(x)))
        return torch.tanh(x) if self.tanh_out else x


class TunedVAE(comfy.sd.VAE):
    """A VAE with a fine-tuned decoder in float32. Everything else is the original's, encoding included."""

    def __init__(self, source: Any, own: DecoderOnly, patcher: Any) -> None:
        self.__dict__.update(vars(source))
        self.source = getattr(source, "source", source)
        self.first_stage_model, self.patcher = own, patcher
        self.vae_dtype = torch.float32

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        source = copy.copy(self.source)
        source.output_device = self.output_device
        return source.encode(*args, **kwargs)

    def encode_tiled(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.source.encode_tiled(*args, **kwargs)

    def get_sd(self) -> dict[str, Tensor]:
        """The state dict of the whole VAE, so that a saved file is complete."""
        return {**self.source.get_sd(), **self.first_stage_model.state_dict()}
