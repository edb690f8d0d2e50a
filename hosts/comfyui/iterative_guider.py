"""The host's guider with conditions that alternate from step to step, whatever a sampler evaluates within a step.

A level alone does not always tell the step: Heun's method looks at the end of a step, which is the start of the next. So
the host's own samplers are rehearsed on one number, which shows at which levels each of their steps looks, in order. Where
a sampler cannot be rehearsed, or does otherwise in the run, the level decides.
"""

from __future__ import annotations

from typing import Any

import comfy.k_diffusion.sampling as k_sampling
import comfy.samplers as samplers
import torch
from torch import Tensor

from ...pipelines.core.protocols import Context
from ...pipelines.layerdiffusion.embeddings import IterativeGuidance
from ..sockets import conditioning

NEAR = 1e-5  # relative difference between two levels that are one

Looks = list[tuple[float, float]]  # for every evaluation, its level and the level that its step starts from


class IterativeGuider(samplers.CFGGuider):
    """Both conditions are conditions of the run, so that the host prepares them together: ControlNets, areas, hooks."""

    def __init__(self, model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> None:
        super().__init__(model)
        self._guidance = guidance
        self._looks: Looks = []
        conds = {"positive": guidance.mixed, "subject": guidance.subject, "negative": negative}
        self.inner_set_conds({key: conditioning(context) for key, context in conds.items()})
        self.set_cfg(scale)

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """As the host's. Raises MismatchError for sigmas that are no part of the grid."""
        self._guidance.check(sigmas)
        # a copy, because uni_pc writes into the list it is given
        return super().sample(noise, latent_image, sampler, sigmas.clone(), *rest, **named)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: Any, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """As the host's, after a rehearsal."""
        self._looks = rehearsed(self, sampler, sigmas)
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, *rest, **named)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        """The guided clean prediction (the host calls it noise)."""
        chosen = self._guidance.at_sigma(self._start_of_step(float(timestep.flatten()[0])))
        positive = self.conds["subject" if chosen is self._guidance.subject else "positive"]
        return samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], positive, self.cfg,
            model_options=model_options or {}, seed=seed,
        )  # fmt: skip

    def _start_of_step(self, sigma: float) -> float:
        """The level that the step under way began at; `sigma` itself where that is not known."""
        if not self._looks:
            return sigma
        (expected, start), self._looks = self._looks[0], self._looks[1:]
        if abs(expected - sigma) <= NEAR * sigma:
            return start
        self._looks = []  # the sampler goes its own way
        return sigma


class _Stand:
    """What a sampler is given instead of a guider: predicts nothing, and notes where it was asked."""

    def __init__(self, guider: Any) -> None:
        self.inner_model, self.model_patcher = guider.inner_model, guider.model_patcher
        self.conds: dict[str, Any] = {}
        self.seen: list[float] = []

    def __call__(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        self.seen.append(float(timestep.flatten()[0]))
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):  # samplers learn the prediction from it
            hook({"denoised": x, "cond_denoised": x, "uncond_denoised": x, "input": x, "sigma": timestep,
                  "cond": None, "uncond": None, "cond_scale": 1.0, "model": self.inner_model, "model_options": {}})  # fmt: skip
        return x * 0.5


def rehearsed(guider: Any, sampler: Any, sigmas: Tensor) -> Looks:
    """Where each step of one of the host's samplers will look; empty for others."""
    function = getattr(sampler, "sampler_function", None)
    if type(sampler) is not samplers.KSAMPLER or getattr(function, "__module__", "") != k_sampling.__name__:
        return []
    stand = _Stand(guider)
    firsts: dict[int, int] = {}  # evaluations before each step

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        firsts.setdefault(step, len(stand.seen) - 1)

    channels = guider.inner_model.latent_format.latent_channels
    noise = torch.ones(1, channels, 1, 1, device=sigmas.device)
    devices = [sigmas.device] if sigmas.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():  # some samplers draw from the shared generator
        sampler.sample(stand, sigmas.clone(), {"model_options": {}, "seed": 0}, callback, noise, noise * 0, None, True)
    levels = sigmas.tolist()
    begun = [firsts.get(step, -1) for step in range(len(levels) - 1)]
    in_order = begun[0] == 0 and all(a < b for a, b in zip(begun, begun[1:], strict=False))
    if not in_order or any(abs(stand.seen[at] - levels[step]) > NEAR * levels[step] for step, at in enumerate(begun)):
        return []
    ends = [*begun[1:], len(stand.seen)]
    return [
        (stand.seen[at], levels[step])
        for step, (first, end) in enumerate(zip(begun, ends, strict=True))
        for at in range(first, end)
    ]
