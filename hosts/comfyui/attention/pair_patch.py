"""Attention edits as a MODEL patch: any native sampler then edits pairs of latents (see `pipelines/attention/pair_sampling.py`).

The clone carries one wrapper, around the whole run. During a run, the options of the run (a copy that ComfyUI makes) carry
two more wrappers: one around each prediction, where LocalBlend acts, and one around each model call, which then has the
run's attention control.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling as k_sampling
import comfy.patcher_extension
import torch
from torch import Tensor

from ....pipelines.attention.pair_batch import interleave, separate
from ....pipelines.attention.pair_sampling import PairPlan, PairRun, check_pairs, shared_noise
from ....pipelines.core.attention_sites import Branch
from ....pipelines.core.errors import MismatchError, ParameterError
from ....pipelines.core.shapes import check_width
from ..model_sampling import NativeModelSampling, sigma_tensor
from ..patch_keys import ATTENTION_KEY, has_attention_edit
from .joint import JointLayers
from .unet import Layers, attention_layers, controlled_options

Wrappers = comfy.patcher_extension.WrappersMP
BROWNIAN = re.compile(r"sample_dpmpp_\w*sde")  # samplers that draw from a Brownian tree by default


def native_paired_model(model: Any, plan: PairPlan) -> Any:
    """See `paired_model`. Raises FamilyError for networks whose attention is not known."""
    layers = attention_layers(model)
    if has_attention_edit(model):
        raise ParameterError("this MODEL already has an attention edit: connect the MODEL from before the first one")

    def outer_sample(
        executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        if len(sigmas) < 2:
            return executor(noise, latent, sampler, sigmas, *rest, **named)
        run = NativePairRun(plan, layers, executor.class_obj, latent, sigmas)
        if plan.share_noise:
            seed = rest[3] if len(rest) > 3 else named.get("seed")
            noise = shared_noise(noise)
            sampler = paired_sampler(sampler, noise, sigmas, run.device, seed)
        with run:
            return run.finished(executor(noise, latent, sampler, sigmas, *rest, **named))

    clone = model.clone()
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, ATTENTION_KEY, outer_sample)
    return clone


class NativePairRun:
    """One run of a sampler: a context manager. Inside it, the guider's options carry the edit."""

    def __init__(
        self, plan: PairPlan, layers: Layers | JointLayers, guider: Any, latent: Tensor, sigmas: Tensor
    ) -> None:
        self.layers = layers
        self.guider = guider
        self.device: torch.device = guider.model_patcher.load_device
        self.sampling = NativeModelSampling(guider.model_patcher)
        self.last_sigma = float(sigmas[-1])
        positive = guider.conds.get("positive") or []
        if not positive:
            raise MismatchError("this guider has no positive prompt, which an attention edit needs: use another one")
        self.positive = {part["uuid"] for part in positive}
        # A copy of the sigmas, because uni_pc writes into them.
        grid = sigmas.detach().float().cpu().clone()
        texts = [part["cross_attn"] for part in positive]
        for text in texts:
            check_width(text.shape[-1], self.sampling.text_width, "positive")
        self.run: PairRun = plan.check(self.sampling, grid, latent.to(self.device), texts)  # type: ignore[arg-type]  # what it reads
        self.model_calls = 0

    def __enter__(self) -> None:
        for kind, wrapper in ((Wrappers.PREDICT_NOISE, self.predict), (Wrappers.CALC_COND_BATCH, self.call_model)):
            comfy.patcher_extension.add_wrapper_with_key(
                kind, ATTENTION_KEY, wrapper, self.guider.model_options, is_model_options=True
            )

    def __exit__(self, *_: object) -> None:
        for wrappers in self.guider.model_options["transformer_options"]["wrappers"].values():
            wrappers.pop(ATTENTION_KEY, None)
        self.run.release()

    def predict(self, executor: Any, x: Tensor, timestep: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Around the guider's prediction of [2 B, C, h, w]."""
        sigma = float(timestep.flatten()[0])
        calls_before = self.model_calls
        self.run.blend_state(x, sigma)
        denoised = executor(x, timestep, *rest, **named)
        if self.model_calls == calls_before:
            raise MismatchError("another node calls the model without the attention edit: leave that node out")
        return self.run.blend_denoised(denoised, sigma)

    def call_model(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, *rest: Any
    ) -> Any:
        """Control the attention of every model call, including those of other nodes' guidance (PAG, ...).

        Args:
            executor: ComfyUI's next wrapper, or its evaluation of conditions.
            model: the loaded network (`BaseModel`).
            conds: prepared conditions, one list of parts for each prediction.
            x: the latents [2 B, C, h, w], source and target side by side, model scale.
            timestep: sigma [2 B], the same for every latent.
            options: model options of the run.
            rest: further arguments of the wrapper, passed on.
        Returns: what `executor` gives: a denoised latent [2 B, C, h, w] for each prediction.
        Raises: ShapeError for an odd batch.
        """
        check_pairs(x)
        self.model_calls += 1
        controlled = self.run.controlled(len(x), tuple(self._branch(parts) for parts in conds))
        options = controlled_options(options, controlled, self.layers, float(timestep.flatten()[0]))
        return executor(model, conds, x, timestep, options, *rest)

    def _branch(self, parts: list[dict] | None) -> Branch:
        """Guiders give their prompts in any order. Parts that ComfyUI adds for areas come after the prompt's own."""
        return "cond" if parts and parts[0]["uuid"] in self.positive else "uncond"

    def finished(self, samples: Tensor) -> Tensor:
        """The run's unscaled result. With a trajectory, the sources are exactly the inverted image."""
        path = self.run.trajectory
        if path is None or self.last_sigma == 0:
            return self.run.finished(samples)
        noised = self.sampling.sampling.inverse_noise_scaling(
            sigma_tensor(self.last_sigma, self.device), path.at(self.last_sigma)
        )
        return interleave(self.sampling.scale_out(noised).to(samples), separate(samples)[1])


def paired_sampler(sampler: Any, noise: Tensor, sigmas: Tensor, device: torch.device, seed: int | None) -> Any:
    """A sampler whose random noise is the same for source and target: the noise it draws for the sources alone.

    Args:
        sampler: SAMPLER.
        noise: initial noise of the pairs [2 B, C, h, w].
        sigmas: grid [N + 1].
        device: of the run.
        seed: of the run.
    Returns: SAMPLER; the given one if it draws no noise between steps.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None or "noise_sampler" not in inspect.signature(function).parameters:
        return sampler
    if sampler.extra_options.get("noise_sampler") is not None:
        return sampler
    sources = torch.empty_like(noise[::2], device=device)
    name = getattr(function, "__name__", "")
    if BROWNIAN.match(name):
        sigmas = sigmas.to(device)
        low, high = sigmas[sigmas > 0].min(), sigmas.max()
        draw = k_sampling.BrownianTreeNoiseSampler(sources, low, high, seed=seed, cpu=not name.endswith("_gpu"))
    else:
        draw = k_sampling.default_noise_sampler(sources, seed=seed)
    paired = copy.copy(sampler)
    paired.extra_options = {**sampler.extra_options, "noise_sampler": _for_both(draw)}
    return paired


def _for_both(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *sigmas: draw(*sigmas).repeat_interleave(2, dim=0)
