"""Attention edits as a MODEL patch: any native sampler then edits pairs of latents (see `pipelines/attention/pair_sampling.py`).

Only a wrapper around the whole run is put on the clone. While a run lasts, its own options (the host makes a copy for every
run) carry two more: around each prediction, where LocalBlend acts, and around each evaluation of prompts, which then runs
under the run's control.
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

from ...pipelines.attention.pair_batch import interleave, separate
from ...pipelines.attention.pair_sampling import PairPlan, PairRun, check_pairs, shared_noise
from ...pipelines.core.attention_sites import Branch
from ...pipelines.core.errors import MismatchError, ParameterError
from .attention_hooks import KEY, Layers, attention_layers, controlled_options
from .model_sampling import NativeModelSampling, sigma_tensor

Wrappers = comfy.patcher_extension.WrappersMP
BROWNIAN = re.compile(r"sample_dpmpp_\w*sde")  # samplers whose own noise is a Brownian path


def native_paired_model(model: Any, plan: PairPlan) -> Any:
    """See `paired_model`. Raises FamilyError for networks without separate self- and cross-attention."""
    layers = attention_layers(model)
    if has_attention_edit(model):
        raise ParameterError("this MODEL already has an attention edit: connect the MODEL from before the first one")

    def outer_sample(
        executor: Any, noise: Tensor, latent: Tensor, sampler: Any, levels: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        if len(levels) < 2:
            return executor(noise, latent, sampler, levels, *rest, **named)
        run = NativePairRun(plan, layers, executor.class_obj, latent, levels)
        if plan.share_noise:
            seed = rest[3] if len(rest) > 3 else named.get("seed")
            noise, sampler = shared_noise(noise), paired_sampler(sampler, noise, levels, run.device, seed)
        with run:
            return run.finished(executor(noise, latent, sampler, levels, *rest, **named))

    clone = model.clone()
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, KEY, outer_sample)
    return clone


def has_attention_edit(model: Any) -> bool:
    return bool(model.get_wrappers(Wrappers.OUTER_SAMPLE, KEY))


class NativePairRun:
    """One run of a sampler; a context manager, inside which the guider's options carry the edit."""

    def __init__(self, plan: PairPlan, layers: Layers, guider: Any, latent: Tensor, levels: Tensor) -> None:
        self.layers, self.guider = layers, guider
        self.device: torch.device = guider.model_patcher.load_device
        self.levels, self.last = NativeModelSampling(guider.model_patcher), float(levels[-1])
        positive = guider.conds.get("positive") or []
        if not positive:
            raise MismatchError("this guider has no positive prompt, which an attention edit needs: use another one")
        self.positive = {part["uuid"] for part in positive}
        # the sampler's levels are copied: uni_pc writes into the list it is given
        grid = levels.detach().float().cpu().clone()
        texts = [part["cross_attn"] for part in positive]
        self.run: PairRun = plan.check(self.levels, grid, latent.to(self.device), texts)  # type: ignore[arg-type]  # what it reads
        self.evaluations = 0

    def __enter__(self) -> None:
        for kind, wrapper in ((Wrappers.PREDICT_NOISE, self.predict), (Wrappers.CALC_COND_BATCH, self.evaluate)):
            comfy.patcher_extension.add_wrapper_with_key(
                kind, KEY, wrapper, self.guider.model_options, is_model_options=True
            )

    def __exit__(self, *_: object) -> None:
        for wrappers in self.guider.model_options["transformer_options"]["wrappers"].values():
            wrappers.pop(KEY, None)
        self.run.release()

    def predict(self, executor: Any, x: Tensor, timestep: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Around the guider's prediction of [2 B, C, h, w]."""
        sigma, before = float(timestep.flatten()[0]), self.evaluations
        self.run.blend_state(x, sigma)
        clean = executor(x, timestep, *rest, **named)
        if self.evaluations == before:
            raise MismatchError(
                "another node evaluates the model in a way of its own, past the attention edit: leave that node out"
            )
        return self.run.blend_denoised(clean, sigma)

    def evaluate(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, *rest: Any
    ) -> Any:
        """Around every evaluation of prompts, those of other nodes' guidance (PAG, ...) too."""
        check_pairs(x)
        self.evaluations += 1
        controlled = self.run.controlled(len(x), tuple(self._branch(parts) for parts in conds))
        options = controlled_options(options, controlled, self.layers, float(timestep.flatten()[0]))
        return executor(model, conds, x, timestep, options, *rest)

    def _branch(self, parts: list[dict] | None) -> Branch:
        """Guiders give their prompts in any order; what the host adds to one for areas comes behind its own parts."""
        return "cond" if parts and parts[0]["uuid"] in self.positive else "uncond"

    def finished(self, samples: Tensor) -> Tensor:
        """The run's unscaled result, in which a real picture's rows are the picture."""
        path = self.run.trajectory
        if path is None or self.last == 0:
            return self.run.finished(samples)
        noised = self.levels.sampling.inverse_noise_scaling(sigma_tensor(self.last, self.device), path.at(self.last))
        return interleave(self.levels.scale_out(noised).to(samples), separate(samples)[1])


def paired_sampler(sampler: Any, noise: Tensor, levels: Tensor, device: torch.device, seed: int | None) -> Any:
    """The same sampler, whose noise between steps is one for source and target: what it would draw for the sources alone."""
    function = getattr(sampler, "sampler_function", None)
    if function is None or "noise_sampler" not in inspect.signature(function).parameters:
        return sampler
    if sampler.extra_options.get("noise_sampler") is not None:
        return sampler
    sources = torch.empty_like(noise[::2], device=device)
    name = getattr(function, "__name__", "")
    if BROWNIAN.match(name):
        levels = levels.to(device)
        low, high = levels[levels > 0].min(), levels.max()
        draw = k_sampling.BrownianTreeNoiseSampler(sources, low, high, seed=seed, cpu=not name.endswith("_gpu"))
    else:
        draw = k_sampling.default_noise_sampler(sources, seed=seed)
    paired = copy.copy(sampler)
    paired.extra_options = {**sampler.extra_options, "noise_sampler": _for_both(draw)}
    return paired


def _for_both(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *levels: draw(*levels).repeat_interleave(2, dim=0)
