"""The protocols between the methods and the hosts that run the networks.

Every method is written against these. `hosts/diffusers/` implements them without ComfyUI, `hosts/comfyui/` over a native
ComfyUI MODEL, VAE and CLIP. The parity tests compare the latents of both.

Scales: a *latent* is what a VAE gives (unscaled, as on a LATENT socket); a latent in *model scale* is what the network
sees (`scale_in`). All loops run in model scale and float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention_sites import Controlled
    from .tune_plan import TunePlan


@dataclass(frozen=True)
class Context:
    """One encoded prompt.

    Attributes:
        tokens: text embedding [R, T, D], float; R is 1 (for every image) or the batch size.
        pooled: pooled text embedding [R, P], only for families that have one (SDXL).
        text: the prompt, if it is known (for messages).
        host: what else the host attached (areas, masks, ControlNets, hooks); opaque to the methods.
        socket: where the prompt came from, for messages.
        guidance: the guidance value of a guidance-distilled model (Flux dev), an input of its network; None = its default.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    text: str | None = None
    host: Any = field(default=None, repr=False, compare=False)
    socket: str = field(default="the prompt", repr=False, compare=False)
    guidance: float | None = None

    def with_tokens(self, tokens: Tensor) -> Context:
        """The same context with another embedding (null-text, value embeddings, interpolation)."""
        return replace(self, tokens=tokens)

    # A context also serves as a prompt that is the same at every step: `guidance.Positive` and `guidance.Negative`.
    def at_sigma(self, sigma: float) -> Context:
        """This context, at every sigma."""
        return self

    def check(self, denoiser: Denoiser, sigmas: Tensor) -> None:
        """Accept every model and grid, because a plain prompt belongs to none."""

    def guides(self, scale: float) -> bool:
        """Whether guidance needs the unconditional prediction: at every scale but 1."""
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
        """See `Negative.combine`; the denoiser's classifier-free guidance."""
        return denoiser.combine(z, sigma, cond, uncond, scale, contexts)


@dataclass(frozen=True)
class Token:
    """One text token: its vocabulary id and its character span [start, end) in the prompt; (-1, -1) = special token."""

    id: int
    start: int
    end: int


@runtime_checkable
class Denoiser(Protocol):
    """A diffusion or flow model in sigma space that predicts the noise-free latent.

    VP models (eps and v): z = clean + sigma * noise (the variance-exploding variable). Flow: z = (1 - sigma) clean +
    sigma * noise. In both, (z - denoise(z)) / sigma is the derivative dz/dsigma (docs/methods.md, section 0.2).
    """

    family: str
    channels: int
    flow: bool
    """True for rectified-flow models, False for eps and v models."""

    @property
    def device(self) -> torch.device: ...

    @property
    def fingerprint(self) -> str:
        """A digest of the weights and patches in force: equal for the same model, different for another."""

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        """Sigmas of a grid of `steps` steps, of which the last fraction `strength` runs: float32 [n + 1], falling to 0."""

    def noise(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """`clean` [B, C, h, w] noised to `sigma` with unit-variance `noise`, model scale."""

    def denoise(
        self, z: Tensor, sigma: float | Tensor, contexts: Sequence[Context], control: Controlled | None = None
    ) -> Tensor:
        """Predict the noise-free latent under each context.

        Args:
            z: the latent [B, C, h, w] at `sigma`, model scale.
            sigma: above 0, one number or [B].
            contexts: the prompts.
            control: attention hooks for this call only.
        Returns: denoised latents, one per context: float32 [len(contexts), B, C, h, w].
        Raises: FamilyError where the attention of the network cannot be controlled (joint-attention transformers).
        """

    def combine(
        self, z: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor, scale: float, contexts: Sequence[Context]
    ) -> Tensor:
        """Classifier-free guidance of two predictions. A host with guidance hooks runs them here.

        Args:
            z: the latent [B, C, h, w] at `sigma`, model scale.
            sigma: above 0, one number or [B].
            cond, uncond: denoised latents [B, C, h, w].
            scale: guidance scale.
            contexts: the prompts of the predictions: positive and negative, or the positive alone without guidance.
        Returns: the guided denoised latent [B, C, h, w].
        """

    def scale_in(self, latent: Tensor) -> Tensor:
        """VAE latent to model scale, float32, on the model's device."""

    def scale_out(self, z: Tensor) -> Tensor:
        """Model scale to VAE latent."""


@runtime_checkable
class DenoiserClone(Protocol):
    """A trainable copy of a denoiser with its own weights."""

    parameters: Sequence[Tensor]
    """The trainable tensors: float32 leaves."""

    blocks: Sequence[torch.nn.Module]
    """The network's blocks, for gradient checkpointing."""

    @property
    def denoiser(self) -> Denoiser:
        """Predicts with the current weights; gradients reach `parameters`."""

    def changes(self) -> dict[str, Tensor]:
        """The learned changes of the weights (`learning.weight_deltas`), under the layer names of LoRA files."""

    def release(self) -> None:
        """Free the copy; called also after an error or a cancel."""


@runtime_checkable
class TunableDenoiser(Denoiser, Protocol):
    """A denoiser that can be fine-tuned, on a copy."""

    def model_clone(self, plan: TunePlan, shape: Sequence[int]) -> DenoiserClone:
        """A trainable copy.

        Args:
            plan: which weights learn, and how.
            shape: the largest latent [B, C, h, w] of the training, for the estimate of memory.
        Raises: EditError where it does not fit into memory; FamilyError for a network that cannot learn by this plan.
        """


@runtime_checkable
class DecoderClone(Protocol):
    """A trainable float32 copy of a VAE's decoder with its own weights."""

    blocks: Sequence[torch.nn.Module]
    """The decoder as a chain; `blocks[i]` maps the output of `blocks[i - 1]`; the last gives [B, 3, H, W] in [-1, 1]."""

    def prepare(self, latent: Tensor) -> Tensor:
        """The input of the first block for a latent [B, C, h, w]."""

    def finish(self) -> LatentCodec:
        """The codec that decodes with the learned weights (and encodes as before)."""

    def release(self) -> None:
        """Free the copy, after an error or a cancel."""


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
        """Image [B, H, W, 3], float32. Without `clamp`, values may lie outside [0, 1]."""

    def decoder_clone(self) -> DecoderClone: ...


@runtime_checkable
class TextEncoder(Protocol):
    def encode(self, text: str) -> Context: ...

    def encode_negative(self, text: str) -> Context:
        """A negative prompt. Some models are trained with zeros where there is none."""

    def tokens(self, text: str) -> list[Token]:
        """Every token of the padded sequence, in order, with its character span in `text`."""


@runtime_checkable
class Ranker(Protocol):
    """A CLIP-style model that embeds images and texts in one space."""

    @property
    def device(self) -> torch.device: ...

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, H, W, 3] in [0, 1] (resized and normalised inside)."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D]."""


@runtime_checkable
class ImageEncoder(Protocol):
    """An image tower before its pooling and projection: images as sequences of tokens."""

    def image_tokens(self, images: Tensor) -> Tensor:
        """Tokens [B, S, W], float32, of images [B, H, W, 3] in [0, 1] (resized and normalised inside)."""
