"""A native MODEL as a Denoiser.

It does what ComfyUI's own guider does around a run: load, hooks, conditions, clean-up. The sampling loop is ours. Patches
of the MODEL (LoRA, attention patches, wrappers, guidance hooks) and of the CONDITIONING (areas, ControlNets, weight hooks)
act as they do in KSampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers as helpers
import comfy.samplers as samplers
import torch
from torch import Tensor

from ...pipelines.core.attention_sites import Controlled
from ...pipelines.core.protocols import Context
from ...pipelines.core.shapes import check_latent
from ...pipelines.learning.loss_scaling import LossScaling
from .attention.joint import JointLayers
from .attention.unet import Layers, attention_layers, controlled_options
from .conditions import Conditions, Parts, conditioning_for, name_of_prompt
from .gradients import differentiable_attention, learnable, network_blocks, refuse_learning, reserve
from .model_sampling import NativeModelSampling, sigma_tensor

GUIDANCE_HOOKS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")


@contextmanager
def native_denoiser(
    model: Any, shape: tuple[int, ...], contexts: list[Context], sigmas: Tensor | None, learning: bool = False
) -> Iterator[NativeDenoiser]:
    """Load a MODEL to predict (`hosts.host.open_denoiser`).

    Args:
        model: MODEL.
        shape: latent shape [B, C, h, w] of the largest batch to come, for the memory estimate.
        contexts: every prompt to come.
        sigmas: sigma grid of the run [N + 1], for hooks that act during a fraction of the steps; None = all training sigmas.
        learning: gradients may pass through the model, never to its weights.
    Returns: a context manager that gives the denoiser and unloads it at the end.
    Raises: FamilyError for a model that cannot edit still images.
    """
    sampling = NativeModelSampling(model)
    if learning:
        refuse_learning(model)
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    conds = _converted(model.model, contexts)
    hook_mode = model.hook_mode
    loaded = []
    denoiser = None
    try:
        samplers.preprocess_conds_hooks(conds)
        if samplers.get_total_hook_groups_in_conds(conds) <= 1:
            model.hook_mode = comfy.hooks.EnumHookMode.MinVram
        helpers.prepare_model_patcher(model, conds, options)
        samplers.filter_registered_hooks_on_conds(conds, options)
        if learning:
            reserve(model, shape)
            differentiable_attention(options)
        inner, conds, loaded = helpers.prepare_sampling(model, _memory_shape(shape, len(contexts)), conds, options)
        samplers.cast_to_load_options(options, device=model.load_device, dtype=model.model_dtype())
        grid = sampling.sampling.sigmas.flip(0) if sigmas is None else sigmas
        options.setdefault("transformer_options", {})["sample_sigmas"] = grid.to(model.load_device)
        model.pre_run()
        opened = [(context, conds[name_of_prompt(i)]) for i, context in enumerate(contexts)]
        denoiser = NativeDenoiser(sampling, model, inner, options, opened)
        with learnable([inner, *(part.model for part in loaded)]) if learning else nullcontext():
            yield denoiser
    finally:
        if denoiser is not None:
            denoiser.close()
        model.cleanup()
        helpers.cleanup_models(conds, loaded)
        samplers.cast_to_load_options(options, device=model.offload_device)
        model.hook_mode = hook_mode
        model.restore_hook_patches()


def _converted(inner: Any, contexts: list[Context]) -> dict[str, list]:
    """The prompts as ComfyUI prepares them, under the names of `name_of_prompt`."""
    return {
        name_of_prompt(i): helpers.convert_cond(conditioning_for(inner, context)) for i, context in enumerate(contexts)
    }


def _memory_shape(shape: tuple[int, ...], contexts: int) -> tuple[int, ...]:
    """The shape to reserve memory for. ComfyUI doubles its batch for cond and uncond; ours may have more contexts."""
    return (max(shape[0], -(-shape[0] * contexts // 2)), *shape[1:])


class NativeDenoiser(NativeModelSampling):
    """Valid inside `native_denoiser` only."""

    def __init__(
        self,
        sampling: NativeModelSampling,
        patcher: Any,
        inner: Any,
        options: dict,
        opened: list[tuple[Context, list[dict]]],
    ) -> None:
        self.__dict__.update(vars(sampling))
        self._sampling = sampling
        self._inner = inner
        self._options = options
        self._patcher = patcher
        self._conditions: Conditions | None = Conditions(inner, self.device, opened)
        self._layers: Layers | JointLayers | None = None  # found when the first control comes

    def without_weights(self) -> NativeModelSampling:
        """The part that may outlive the run."""
        return self._sampling

    def close(self) -> None:
        self._inner = self._patcher = self._conditions = self._layers = None

    def denoise(
        self, z: Tensor, sigma: float | Tensor, contexts: Sequence[Context], control: Controlled | None = None
    ) -> Tensor:
        """See `Denoiser.denoise`. One batch if contexts and memory allow it; ComfyUI splits it otherwise.

        Gradients follow the caller's mode; they need a denoiser that was opened for learning.
        """
        z = check_latent(z, "latent", self.channels).to(self.device, torch.float32)
        span = LossScaling(None if control is not None else self._network_dtype())  # a control may learn inside it
        z, conds = span.enter(z), self._conds(span.contexts(contexts), z)
        options = self._options if control is None else self._controlled(control, sigma)
        return span.leave(evaluated(self._inner, conds, z, _sigmas(sigma, z), options))

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The network's blocks, for gradient checkpointing."""
        return [] if self._inner is None else network_blocks(self._inner.diffusion_model)

    def _network_dtype(self) -> torch.dtype | None:
        return None if self._inner is None else self._inner.manual_cast_dtype or self._inner.get_dtype()

    def _controlled(self, control: Controlled, sigma: float | Tensor) -> dict:
        """The options of one model call under attention control; those of the run do not change."""
        if self._layers is None:
            self._layers = attention_layers(self._patcher)
        first = sigma if isinstance(sigma, (int, float)) else sigma.flatten()[0]
        return controlled_options(self._options, control, self._layers, float(first))

    def combine(
        self, z: Tensor, sigma: float | Tensor, cond: Tensor, uncond: Tensor, scale: float, contexts: Sequence[Context]
    ) -> Tensor:
        """See `Denoiser.combine`: ComfyUI's guidance, with the MODEL's guidance hooks."""
        hooked = any(self._options.get(hook) for hook in GUIDANCE_HOOKS)
        conds = self._conds(contexts, z) if hooked else []  # some hooks predict with them again
        return guidance(self._inner, conds, z, _sigmas(sigma, z), (cond, uncond), scale, self._options)

    def _conds(self, contexts: Sequence[Context], z: Tensor) -> list[Parts]:
        if self._conditions is None:
            raise RuntimeError("this denoiser is closed: open the MODEL again")
        for context in contexts:
            self.check_text(context)
        return self._conditions.of(contexts, z)


def _sigmas(sigma: float | Tensor, z: Tensor) -> Tensor:
    """The sigma of every latent, float32 [B]; a copy, because autograd may save it."""
    return sigma_tensor(sigma, z.device).expand(z.shape[0]).clone()


def evaluated(inner: Any, conds: list[Parts], z: Tensor, sigma: Tensor, options: dict) -> Tensor:
    """Denoised latents, as ComfyUI's samplers get them.

    Args:
        inner: the loaded network (`BaseModel`).
        conds: prepared conditions, one list of parts for each prediction.
        z: model-scaled [B, C, h, w].
        sigma: [B].
        options: model options of the run.
    Returns: [len(conds), B, C, h, w], float32.
    """
    replaced = options.get("sampler_calc_cond_batch_function")
    if replaced is None:
        return torch.stack(samplers.calc_cond_batch(inner, conds, z, sigma, options)).float()
    arguments = {"conds": conds, "input": z, "sigma": sigma, "model": inner, "model_options": options}
    return torch.stack(list(replaced(arguments))).float()


def guidance(
    inner: Any,
    conds: list[Parts],
    z: Tensor,
    sigma: Tensor,
    predictions: tuple[Tensor, Tensor],
    scale: float,
    options: dict,
) -> Tensor:
    """ComfyUI's classifier-free guidance, with every guidance hook of the run.

    Args:
        inner: the loaded network (`BaseModel`).
        conds: the prepared conditions of `predictions`; one alone is the conditional one, as in ComfyUI at scale 1.
        z: model-scaled [B, C, h, w].
        sigma: [B].
        predictions: conditional and unconditional denoised latents [B, C, h, w].
        scale: guidance scale (cfg).
        options: model options of the run.
    Returns: the guided denoised latent [B, C, h, w].
    """
    cond, uncond = [*conds, None, None][:2]
    out = list(predictions)
    arguments = {"conds": [cond, uncond], "cond_scale": scale, "timestep": sigma, "input": z, "sigma": sigma}
    for hook in options.get("sampler_pre_cfg_function", []):
        out = hook({**arguments, "conds_out": out, "model": inner, "model_options": options})
    return samplers.cfg_function(
        inner, out[0], out[1], scale, z, sigma, model_options=options, cond=cond, uncond=uncond
    )
