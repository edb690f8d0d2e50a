"""ComfyUI's guider with prompts that change from step to step, for any native sampler."""

from __future__ import annotations

from typing import Any

import comfy.k_diffusion.sampling as k_sampling
import comfy.model_management as management
import comfy.samplers as samplers
import torch
from torch import Tensor

from ...pipelines.core.protocols import Context
from ...pipelines.core.sigmas import SIGMA_TOLERANCE, step_of_sigma
from ...pipelines.core.trajectory import check_grid
from ...pipelines.inversion.negative_embeddings import Embeddings
from ...pipelines.layerdiffusion.iterative_guidance import IterativeGuidance
from .conditions import conditioning_for
from .denoiser import evaluated, guidance
from .model_sampling import NativeModelSampling

SAME_SIGMA = 1e-5  # largest relative difference between two sigmas that count as one


class EmbeddingsGuider(samplers.CFGGuider):
    """One negative embedding per step, from null-text or negative-prompt inversion.

    Every step's negative is a condition of the run, so ComfyUI prepares them all: ControlNets, areas and hooks act on
    each as on a plain negative. The sigma of a model call decides which negative is used.
    """

    def __init__(self, model: Any, positive: Context, embeddings: Embeddings, scale: float) -> None:
        """See `embeddings_guider` in `hosts/host.py`. Raises ShapeError for prompts of another text encoder."""
        super().__init__(model)
        sampling = NativeModelSampling(model)
        sampling.check_text(positive)
        sampling.check_text(embeddings.base)
        # On the device where ComfyUI keeps prompts: a GUIDER may wait a long time for its sampler.
        self._embeddings = embeddings.to(management.intermediate_device())
        self._trajectory = self._embeddings.trajectory
        first = embeddings.steps - 1 if embeddings.tokens is None else embeddings.first
        steps = range(first, embeddings.steps)
        negatives = {self._key(step): conditioning_for(model.model, embeddings.at(step)) for step in steps}
        self.inner_set_conds({"positive": conditioning_for(model.model, positive), **negatives})
        self.set_cfg(scale)

    def _key(self, step: int) -> str:
        """The name of a step's negative. The last one has the name that other nodes look for."""
        last = self._embeddings.steps - 1
        return "negative" if step == last or self._embeddings.tokens is None else f"negative{step}"

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """Sample as ComfyUI's guider does, with the embeddings checked first.

        Args:
            noise: [B, C, h, w] on the CPU, unit variance; zeros where the latent is noised already.
            latent_image: the latent to start from, [B, C, h, w], unscaled.
            sampler: SAMPLER.
            sigmas: the grid of the run [N + 1], falling.
            rest, named: the other arguments of ComfyUI's `CFGGuider.sample` (mask, callback, seed), passed on.
        Returns: the sampled latent [B, C, h, w], unscaled.
        Raises: MismatchError for embeddings of another model, and for sigmas of another grid.
        """
        embeddings = self._embeddings
        embeddings.check(NativeModelSampling(self.model_patcher))  # type: ignore[arg-type]  # all of a Denoiser that it reads
        if len(sigmas) > 1:
            to_the_end = embeddings.sigmas >= float(sigmas[-1]) * (1 - SIGMA_TOLERANCE)
            check_grid(embeddings.sigmas[to_the_end], sigmas, "embeddings")
            embeddings.at_sigma(float(sigmas[0]))
        trajectory = embeddings.trajectory
        self._trajectory = None if trajectory is None else trajectory.to(self.model_patcher.load_device)
        try:
            # A copy of the sigmas, because uni_pc writes into them.
            return super().sample(noise, latent_image, sampler, sigmas.clone(), *rest, **named)
        finally:
            self._trajectory = trajectory

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        """The guided denoised latent (ComfyUI calls it noise), with the negative prompt of the step.

        Args:
            x: the latent [B, C, h, w] at `timestep`, model scale.
            timestep: sigma [B], the same for every image.
            model_options: options of the run.
            seed: of the run, for ComfyUI's hooks.
        Returns: the denoised latent [B, C, h, w].
        """
        options = model_options or {}
        sigma = float(timestep.flatten()[0])
        proximal = self._embeddings.proximal
        step = step_of_sigma(sigma, self._embeddings.sigmas)
        pair = [self.conds["positive"], self.conds[self._key(step)]]
        if proximal is None:
            return samplers.sampling_function(
                self.inner_model, x, timestep, pair[1], pair[0], self.cfg, model_options=options, seed=seed
            )

        def mix(cond: Tensor, uncond: Tensor) -> Tensor:
            return guidance(self.inner_model, pair, x, timestep, (cond, uncond), self.cfg, options)

        cond, uncond = evaluated(self.inner_model, pair, x, timestep, options)
        return proximal.guide(x, sigma, cond, uncond, self._trajectory, mix)


class IterativeGuider(samplers.CFGGuider):
    """LayerDiffusion's iterative guidance: two positive prompts that alternate from step to step.

    Sigma alone does not tell which step a model call belongs to: the second call of Heun's method is at the sigma where
    the next step starts. Samplers report a step after its first call only, so their callback does not tell it either.
    So a dry run of the sampler lists its model calls first (`dry_run`). Without one, sigma decides.

    Both prompts are conditions of the run, so ComfyUI prepares them together: ControlNets, areas, hooks.
    """

    def __init__(self, model: Any, guidance: IterativeGuidance, negative: Context, scale: float) -> None:
        """See `iterative_guider` in `hosts/host.py`. Raises ShapeError for prompts of another text encoder."""
        super().__init__(model)
        sampling = NativeModelSampling(model)
        for context in (guidance.object, guidance.mixed, negative):
            sampling.check_text(context)
        self._guidance = guidance
        self._calls_to_come: list[tuple[float, float]] = []
        conds = {"positive": guidance.mixed, "object": guidance.object, "negative": negative}
        self.inner_set_conds({key: conditioning_for(model.model, context) for key, context in conds.items()})
        self.set_cfg(scale)

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """Sample as ComfyUI's guider does, with the grid checked first.

        Args:
            noise: [B, C, h, w] on the CPU, unit variance; zeros where the latent is noised already.
            latent_image: the latent to start from, [B, C, h, w], unscaled.
            sampler: SAMPLER.
            sigmas: the grid of the run [N + 1], falling.
            rest, named: the other arguments of ComfyUI's `CFGGuider.sample` (mask, callback, seed), passed on.
        Returns: the sampled latent [B, C, h, w], unscaled.
        Raises: MismatchError for sigmas of another grid.
        """
        self._guidance.check_sigmas(sigmas)
        # A copy of the sigmas, because uni_pc writes into them.
        return super().sample(noise, latent_image, sampler, sigmas.clone(), *rest, **named)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: Any, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """Sample a noised run, after a dry run of the sampler that records its model calls.

        Args:
            noise: [B, C, h, w], unit variance.
            latent_image: the latent to start from, [B, C, h, w], unscaled.
            device: where the network runs.
            sampler: SAMPLER.
            sigmas: the grid of the run [N + 1], falling.
            rest, named: the other arguments of ComfyUI's `CFGGuider.inner_sample`, passed on.
        Returns: the sampled latent [B, C, h, w], unscaled.
        """
        self._calls_to_come = dry_run(self, sampler, sigmas)
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, *rest, **named)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        """The guided denoised latent (ComfyUI calls it noise), with the positive prompt of the step.

        Args:
            x: the latent [B, C, h, w] at `timestep`, model scale.
            timestep: sigma [B], the same for every image.
            model_options: options of the run.
            seed: of the run, for ComfyUI's hooks.
        Returns: the denoised latent [B, C, h, w].
        """
        chosen = self._guidance.at_sigma(self._start_of_step(float(timestep.flatten()[0])))
        positive = self.conds["object" if chosen is self._guidance.object else "positive"]
        options = model_options or {}
        return samplers.sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], positive, self.cfg, model_options=options, seed=seed
        )

    def _start_of_step(self, sigma: float) -> float:
        """The sigma at which the current step began; `sigma` itself where that is not known."""
        if not self._calls_to_come:
            return sigma
        expected, start = self._calls_to_come.pop(0)
        if abs(expected - sigma) <= SAME_SIGMA * sigma:
            return start
        self._calls_to_come = []  # the sampler does not follow its dry run
        return sigma


class _CallRecorder:
    """Stands in for a guider during the dry run: it runs no network and records the sigma of every model call."""

    def __init__(self, guider: Any) -> None:
        self.inner_model = guider.inner_model
        self.model_patcher = guider.model_patcher
        self.conds: dict[str, Any] = {}
        self.sigmas: list[float] = []

    def __call__(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        self.sigmas.append(float(timestep.flatten()[0]))
        arguments = {
            **dict.fromkeys(("denoised", "cond_denoised", "uncond_denoised", "input"), x),
            "sigma": timestep,
            "cond": None,
            "uncond": None,
            "cond_scale": 1.0,
            "model": self.inner_model,
            "model_options": {},
        }
        for hook in (model_options or {}).get(
            "sampler_post_cfg_function", []
        ):  # some samplers read the prediction here
            hook(arguments)
        return x * 0.5


def dry_run(guider: Any, sampler: Any, sigmas: Tensor) -> list[tuple[float, float]]:
    """Run a sampler of ComfyUI on a latent of one pixel, without the network, to learn which step each call belongs to.

    Args:
        guider: the guider of the run to come.
        sampler: SAMPLER.
        sigmas: grid [N + 1].
    Returns: for every model call its sigma and the sigma at which its step starts, in order; empty for a sampler that is
        not ComfyUI's own, or whose steps cannot be told apart.
    """
    function = getattr(sampler, "sampler_function", None)
    if type(sampler) is not samplers.KSAMPLER or getattr(function, "__module__", "") != k_sampling.__name__:
        return []
    recorder = _CallRecorder(guider)
    first_calls: dict[int, int] = {}  # of every step, by its number

    def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        first_calls.setdefault(step, len(recorder.sigmas) - 1)

    channels = guider.inner_model.latent_format.latent_channels
    noise = torch.ones(1, channels, 1, 1, device=sigmas.device)
    options = {"model_options": {}, "seed": 0}
    devices = [sigmas.device] if sigmas.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():  # some samplers draw from the shared generator
        sampler.sample(recorder, sigmas.clone(), options, callback, noise, noise * 0, None, True)
    return _calls_by_step(recorder.sigmas, first_calls, sigmas.tolist())


def _calls_by_step(calls: list[float], first_calls: dict[int, int], grid: list[float]) -> list[tuple[float, float]]:
    """See `dry_run`. Every step has to begin with a call at its own sigma, and the steps have to come in order."""
    firsts = [first_calls.get(step, -1) for step in range(len(grid) - 1)]
    in_order = firsts[0] == 0 and all(a < b for a, b in zip(firsts, firsts[1:], strict=False))
    if not in_order or any(abs(calls[at] - grid[step]) > SAME_SIGMA * grid[step] for step, at in enumerate(firsts)):
        return []
    ends = [*firsts[1:], len(calls)]
    return [
        (calls[at], grid[step])
        for step, (first, end) in enumerate(zip(firsts, ends, strict=True))
        for at in range(first, end)
    ]
