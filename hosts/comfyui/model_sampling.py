"""Family, sigmas and latent scale of a native MODEL, without its weights."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

import comfy.model_base
import comfy.model_sampling
import torch
from torch import Tensor

from ...pipelines.core.errors import FamilyError
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_channels, check_pooled, check_width
from ...pipelines.core.sigmas import even_sigmas, leading_sigmas

TEXT_WIDTHS = ("context_dim", "context_in_dim", "cap_feat_dim", "joint_attention_dim")  # of U-Nets, Flux, Lumina, Qwen
POOLED = {  # entry of the config, and how many of its numbers are not the pooled text (sizes and scores)
    comfy.model_base.SDXL: ("adm_in_channels", 6 * 256),
    comfy.model_base.SDXLRefiner: ("adm_in_channels", 5 * 256),
    comfy.model_base.SD3: ("adm_in_channels", 0),
    comfy.model_base.Flux: ("vec_in_dim", 0),
}
FAMILY_OF_CONTEXT = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
REFUSED = ("STABLE_CASCADE", "IMG_TO_IMG", "FLOW_COSMOS")
_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def name_of(value: Any) -> str:
    """A name that is unique to an object (Python may reuse the id of an object that is gone)."""
    return _names.setdefault(value, uuid.uuid4().hex)


def family_of(model: Any) -> str:
    """Family of a ModelPatcher: "sd1", "sd2", "sdxl", "flow", "bundled", or "vp" for another eps or v model.

    Raises: FamilyError for a model without still-image latents, or without a form in sigma space.
    """
    inner = model.model
    latent_format, config = getattr(inner, "latent_format", None), getattr(inner, "model_config", None)
    if latent_format is None or config is None:
        raise FamilyError(f"model is a {type(inner).__name__}: connect a diffusion MODEL")
    dimensions = getattr(latent_format, "latent_dimensions", 2)
    if dimensions != 2:
        raise FamilyError(
            f"model is a {type(inner).__name__} with {dimensions}-dimensional latents (video or audio): "
            "EditKit edits still images; connect an SD, SDXL, SD3 or Flux model"
        )
    kind = inner.model_type.name
    if kind in REFUSED:
        raise FamilyError(f"model is a {type(inner).__name__} of type {kind}, which EditKit does not support")
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        return "flow"
    named = getattr(config, "editkit_family", None)
    return named or FAMILY_OF_CONTEXT.get(config.unet_config.get("context_dim"), "vp")


def text_width(model: Any) -> int | None:
    """The width of the text that a ModelPatcher's network takes; None for a family that does not say it."""
    config = model.model.model_config.unet_config
    embedder = (config.get("context_embedder_config") or {}).get("params", {})  # of SD3
    known = [*(config.get(key) for key in TEXT_WIDTHS), embedder.get("in_features")]
    return next((width for width in known if isinstance(width, int)), None)


def pooled_width(model: Any) -> int | None:
    """The width of the pooled text that a ModelPatcher's network needs; None for a family without one."""
    config = model.model.model_config.unet_config
    key, others = next((found for kind, found in POOLED.items() if type(model.model) is kind), ("", 0))
    width = config.get(key)
    return width - others if isinstance(width, int) else None


class NativeModelSampling:
    """Sigmas and latent scale of a MODEL (see `Denoiser`). It holds no weights, so a LATENT may keep it."""

    def __init__(self, model: Any) -> None:
        self.family = family_of(model)
        self.sampling = model.get_model_object("model_sampling")
        self.latent_format = model.get_model_object("latent_format")
        self.flow = isinstance(self.sampling, comfy.model_sampling.CONST)
        self.channels = int(self.latent_format.latent_channels)
        self.text_width = text_width(model)
        self.pooled_width = pooled_width(model)
        self.device: torch.device = model.load_device
        self.fingerprint = f"{name_of(model.model)}-{name_of(self.sampling)}-{model.patches_uuid}"

    @property
    def training_sigmas(self) -> Tensor:
        """Sigma of every training timestep, ascending float32 [T]. Raises FamilyError for a model without timesteps."""
        if self.flow or not isinstance(self.sampling, comfy.model_sampling.ModelSamplingDiscrete):
            raise FamilyError("this model has no training timesteps: leave offset, end and rounding as they are")
        return self.sampling.sigmas.detach().float().cpu()

    def schedule(self, steps: int, strength: float = 1.0) -> Tensor:
        """See `Denoiser.schedule`: DDIM's leading grid for discrete VP models, even table entries for all others."""
        table = self.sampling.sigmas.detach().float().cpu()
        discrete = isinstance(self.sampling, comfy.model_sampling.ModelSamplingDiscrete) and not self.flow
        return leading_sigmas(table, steps, strength) if discrete else even_sigmas(table, steps, strength)

    def check_text(self, context: Context) -> None:
        """Raise ShapeError for a prompt of another text encoder than the model's."""
        check_width(context.tokens.shape[-1], self.text_width, context.socket)
        extras = context.host[0][1] if context.host else {}
        if "unclip_conditioning" not in extras:  # which takes the place of the pooled text
            check_pooled(context.pooled, self.pooled_width, context.socket)

    def noise(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """See `Denoiser.noise`; ComfyUI's own scaling, so it fits a MODEL with patched sampling too."""
        clean, noise = torch.broadcast_tensors(clean, noise.to(clean))
        return self.sampling.noise_scaling(sigma_tensor(sigma, clean.device), noise, clean, max_denoise=False)

    def scale_in(self, latent: Tensor) -> Tensor:
        """See `Denoiser.scale_in`."""
        check_channels(latent, self.channels)
        return self.latent_format.process_in(latent.to(self.device, torch.float32))

    def scale_out(self, z: Tensor) -> Tensor:
        """See `Denoiser.scale_out`."""
        return self.latent_format.process_out(z)


def sigma_tensor(sigma: float | Tensor, device: torch.device) -> Tensor:
    """A sigma as ComfyUI takes it: float32 [1] or [B]."""
    return torch.as_tensor(sigma, dtype=torch.float32).to(device).reshape(-1)
