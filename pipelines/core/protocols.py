"""What a model must offer: the three protocols between the maths and its hosts.

Every method is written against these. `backends/diffusers.py` implements them headless, `hosts/host.py` over a native
ComfyUI MODEL, VAE and CLIP; the parity tests hold both to the same latents.

Scales: a *latent* is what a VAE gives (unscaled, as on a LATENT socket); a *model-scaled* latent is what the network
sees (`scale_in`). All loops run on model-scaled latents in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..learning.weight_deltas import TunePlan
    from .attention_sites import Controlled


@dataclass(frozen=True)
class Context:
    """One encoded prompt.

    Attributes:
        tokens: text embedding [R, T, D], float; R is 1 (for every image) or the batch size.
        pooled: pooled text embedding [R, P], only for families that have one (SDXL).
        text: the prompt, if it is known (for fingerprints and messages).
        host: whatever else the host attached (areas, masks, ControlNets, hooks); opaque to the maths.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    text: str | None = None
    host: Any = field(default=None, repr=False, compare=False)

    def with_tokens(self, tokens: Tensor) -> Context:
        """The same context with another embedding (null-text, value embeddings, interpolation)."""
        return replace(self, tokens=tokens)

    # A context is the prompt that is the same at every step: `guidance.Positive` and `guidance.Negative`.
    def at_sigma(self, sigma: float) -> Context:
        """Itself, at every sigma."""
        return self

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """Nothing: a plain prompt fits every grid."""

    def guides(self, scale: float) -> bool:
        """As a negative: plain guidance at scale 1 is the conditional prediction alone."""
        return scale != 1

    def combine(
        self,
        denoiser: Denoiser,
        z: Tensor,
        sigma: float,
        cond: Tensor,
        uncond: Tensor,
        scale: float,
        contexts: Sequence[Context],
    ) -> Tensor:
        """As a negative: the denoiser's own classifier-free guidance. Arguments as in `guidance.Negative`."""
        return denoiser.combine(z, sigma, cond, uncond, scale, contexts)


@dataclass(frozen=True)
class Token:
    """One text token: its vocabulary id and the character span [start, end) it covers in the prompt; (-1, -1) = special."""

    id: int
    start: int
    end: int


@runtime_checkable
class Denoiser(Protocol):
    """A diffusion or flow model in sigma space, seen as a predictor of the clean latent.

    VP models (eps and v): z = clean + sigma * noise (the variance-exploding variable). Flow: z = (1 - sigma) clean +
    sigma * noise. In both, (z - denoise(z)) / sigma is the derivative dz/dsigma (methods.md, 0.2).
    """

    family: str
    channels: int
    flow: bool
    """True for rectified-flow models, False for eps and v models."""

    @property
    def device(self) -> torch.device: ...

    @property
    def fingerprint(self) -> str:
        """Names the weights and patches in force: equal for the same model, different for another."""

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        """Sigmas of the last `strength` part of a grid of `steps` steps: float32 [n + 1], descending, ending with 0."""

    def noise(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """`clean` [B, C, h, w] noised to level `sigma` with unit-variance `noise`, model scale."""

    def denoise(
        self, z: Tensor, sigma: float | Tensor, contexts: Sequence[Context], control: Controlled | None = None
    ) -> Tensor:
        """Clean predictions [len(contexts), B, C, h, w], float32, of `z` [B, C, h, w] at level `sigma` > 0.

        With `control`, its hooks are in force for this call only. Raises FamilyError where the network has no attention
        layers of the kind that can be controlled (joint-attention transformers).
        """

    def combine(
        self, z: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor, scale: float, contexts: Sequence[Context]
    ) -> Tensor:
        """Classifier-free guidance of two predictions; hosts with their own guidance hooks run them here.

        `contexts` are what was predicted: positive and negative, or the positive alone where guidance is off.
        """

    def scale_in(self, latent: Tensor) -> Tensor:
        """VAE latent to model scale, float32, on the model's device."""

    def scale_out(self, z: Tensor) -> Tensor:
        """Model scale to VAE latent."""


@runtime_checkable
class DenoiserClone(Protocol):
    """A denoiser that may learn: a copy whose weights belong to nobody else."""

    parameters: Sequence[Tensor]
    """What learns: float32 leaves."""

    blocks: Sequence[torch.nn.Module]
    """The network's blocks, for gradient checkpointing."""

    @property
    def denoiser(self) -> Denoiser:
        """Predicts with the weights as they are now; gradients reach what learns."""

    def changes(self) -> dict[str, Tensor]:
        """What was learned so far, in the layout of `weights.py` under the layer names that LoRA files use."""

    def release(self) -> None:
        """Forget the copy (in every outcome)."""


@runtime_checkable
class TunableDenoiser(Denoiser, Protocol):
    """A denoiser whose weights may be learned, on a copy."""

    def model_clone(self, plan: TunePlan, shape: Sequence[int]) -> DenoiserClone:
        """A copy that learns as `plan` says, on latents [B, C, h, w] of `shape` at most.

        Raises: EditError where it does not fit into memory; FamilyError for a network that cannot learn so.
        """


@runtime_checkable
class DecoderClone(Protocol):
    """A decoder that may learn: a float32 copy whose weights belong to nobody else."""

    blocks: Sequence[torch.nn.Module]
    """The decoder as a chain; `blocks[i]` maps the output of `blocks[i - 1]`; the last gives [B, 3, H, W] in [-1, 1]."""

    def prepare(self, latent: Tensor) -> Tensor:
        """Latent [B, C, h, w] as the first block wants it."""

    def finish(self) -> LatentCodec:
        """The codec that decodes with the learned weights (and encodes as before)."""

    def release(self) -> None:
        """Forget the copy (after an error or a cancel)."""


@runtime_checkable
class LatentCodec(Protocol):
    """A VAE. Images are [B, H, W, 3] in [0, 1]; H and W are multiples of `factor`."""

    factor: int
    channels: int

    @property
    def device(self) -> torch.device: ...

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Posterior mean [B, C, H / factor, W / factor], float32, unscaled; with `noise` of that shape, a sample."""

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        """Image [B, H, W, 3], float32; without `clamp` the values may leave [0, 1]."""

    def decoder_clone(self) -> DecoderClone: ...


@runtime_checkable
class TextEncoder(Protocol):
    def encode(self, text: str) -> Context: ...

    def tokens(self, text: str) -> list[Token]:
        """Every token of the padded sequence, in order, with its character span in `text`."""


@runtime_checkable
class Ranker(Protocol):
    """A CLIP-style judge of images against texts."""

    @property
    def device(self) -> torch.device: ...

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, H, W, 3] in [0, 1] (resized and normalised inside)."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D]."""


@runtime_checkable
class ImageEncoder(Protocol):
    """A picture as a sequence of tokens: an image tower before its pooling and projection."""

    def image_tokens(self, images: Tensor) -> Tensor:
        """Tokens [B, S, W], float32, of images [B, H, W, 3] in [0, 1] (resized and normalised inside)."""
