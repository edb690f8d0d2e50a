"""Blended Latent Diffusion as a MODEL patch: any native sampler then edits inside the masks only (methods.md, 1).

Two wrappers, both public API of the host. Around each prediction, the outside of the sampler's state is replaced by the
source noised to that level, and the outside of the clean prediction by the source: the second keeps the history of
multistep samplers on the source's line, the first undoes what ancestral noise added. After the run the outside is
written once more, so that samplers which only nearly follow the line (uni_pc) end exactly too.
"""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.sample
import torch
from torch import Tensor

from ...pipelines.blended.blending import blend
from ...pipelines.core.errors import FamilyError, ParameterError, ShapeError
from ...pipelines.core.masks import MaskSchedule
from ...pipelines.core.shapes import check_latent, match_batch
from .model_sampling import family_of, sigma_tensor

KEY = "editkit_blend"
ABOVE = 1 + 3e-5  # just above a level of the grid, seen with the tolerance of `step_of_sigma`
Wrappers = comfy.patcher_extension.WrappersMP


def native_blended_model(model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
    """See `_host.blended_model`.

    A sampler that adds no noise of its own (KSamplerAdvanced's second stage) starts from a noised LATENT: then `source`
    is required, and the background's noise is read off that LATENT (or redrawn, where its seed is the sampler's own).
    """
    family_of(model)
    if blends(model):
        raise ParameterError("this MODEL already blends: connect the MODEL from before the first blending node")
    given = None if sigmas is None else sigmas.detach().float().cpu().clone()
    runs: dict[int, BlendedRun] = {}  # by guider, for the length of one run

    def outer_sample(
        executor: Any, noise: Tensor, latent: Tensor, sampler: Any, levels: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        if len(levels) < 2:
            return executor(noise, latent, sampler, levels, *rest, **named)
        guider = executor.class_obj
        seed = rest[3] if len(rest) > 3 else named.get("seed")
        run = BlendedRun(guider.model_patcher, schedule, latent if source is None else source, latent, levels)
        run.set_noise(noise, seed, given_source=source is not None)
        run.grid = run.levels if given is None else given
        runs[id(guider)] = run
        try:
            return run.finish(executor(noise, latent, sampler, levels, *rest, **named))
        finally:
            del runs[id(guider)]

    def predict_noise(executor: Any, x: Tensor, timestep: Tensor, *rest: Any, **named: Any) -> Tensor:
        run = runs.get(id(executor.class_obj))
        if run is None:
            return executor(x, timestep, *rest, **named)
        sigma = float(timestep.flatten()[0])
        state = blend(x, run.background(timestep).to(x), run.mask_before(sigma).to(x))
        clean = executor(state, timestep, *rest, **named)
        return blend(clean, run.clean.to(clean), run.mask(sigma).to(clean))

    clone = model.clone()
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, KEY, outer_sample)
    clone.add_wrapper_with_key(Wrappers.PREDICT_NOISE, KEY, predict_noise)
    return clone


def blends(model: Any) -> bool:
    return bool(model.get_wrappers(Wrappers.OUTER_SAMPLE, KEY))


class BlendedRun:
    """What one sampler run needs: source, noise and masks on the compute device."""

    def __init__(self, patcher: Any, schedule: MaskSchedule, source: Tensor, latent: Tensor, levels: Tensor) -> None:
        self.device = patcher.load_device
        self.sampling = patcher.get_model_object("model_sampling")
        self.latent_format = patcher.get_model_object("latent_format")
        if latent.ndim != 4:
            raise FamilyError(f"the sampler's latent has {latent.ndim} dimensions: only still images can be blended")
        self.levels = self.grid = levels.detach().float().cpu().clone()  # uni_pc writes into the list it is given
        self.batch = latent.shape[0]
        self.source = self._fitted(source, latent)
        self.clean = self.latent_format.process_in(self.source)
        self.started = self.latent_format.process_in(latent.to(self.device, torch.float32))
        self.schedule = schedule.expanded(self.batch, *latent.shape[-2:]).to(self.device)
        self.fixed_noise = torch.zeros_like(self.clean)

    def _fitted(self, source: Tensor, latent: Tensor) -> Tensor:
        source = check_latent(source, "source latent", latent.shape[1])
        if source.shape[-2:] != latent.shape[-2:]:
            raise ShapeError(
                f"source latent is {source.shape[-1]} x {source.shape[-2]} cells but the sampler's latent is "
                f"{latent.shape[-1]} x {latent.shape[-2]}: encode both at one size"
            )
        return match_batch(source.to(self.device, torch.float32), self.batch, "source latent", "the sampler's latent")

    def set_noise(self, noise: Tensor, seed: int | None, *, given_source: bool) -> None:
        """The noise that the background rides on: the sampler's, or the one inside an already noised latent."""
        first = float(self.levels[0])
        if torch.count_nonzero(noise):
            self.fixed_noise = noise.to(self.device, torch.float32)
        elif first > 0:
            if not given_source:
                raise ParameterError(
                    "the sampler adds no noise, so its latent is noised already: connect the clean latent as source too"
                )
            self.fixed_noise = self._noise_inside(noise, first, seed)

    def _noise_inside(self, like: Tensor, sigma: float, seed: int | None) -> Tensor:
        """Solve started = noise_scaling(sigma, n, source) for n; redraw it where the sampler's seed explains it.

        Inside the mask the solution also holds the edit so far, which a schedule that shrinks later would show as
        background; the redrawn noise does not.
        """
        zero = torch.zeros_like(self.clean)
        start = self.background(sigma, noise=zero, clean=self.started)
        solved = (start - self.background(sigma, noise=zero)) / sigma
        if seed is None:
            return solved
        drawn = comfy.sample.prepare_noise(torch.empty(like.shape), seed).to(solved)
        outside = self.mask_before(sigma) == 0
        error = torch.where(outside, drawn - solved, zero).abs().amax()
        return drawn if outside.any() and float(error) < 1e-2 else solved

    def mask(self, sigma: float) -> Tensor:
        """[B, 1, h, w] of the step that leaves this level."""
        return self.schedule.at_sigma(sigma, self.grid)

    def mask_before(self, sigma: float) -> Tensor:
        """[B, 1, h, w] of the step that reached this level: `blended_denoise` blends after each step, so its state at
        a level was blended with this one. Between two levels both masks are the running step's."""
        return self.schedule.at_sigma(sigma * ABOVE, self.grid)

    def background(self, sigma: float | Tensor, *, noise: Tensor | None = None, clean: Tensor | None = None) -> Tensor:
        """The source at a level, model scale."""
        clean = self.clean if clean is None else clean
        level = sigma_tensor(sigma, self.device)
        return self.sampling.noise_scaling(
            level, self.fixed_noise if noise is None else noise, clean, max_denoise=False
        )

    def finish(self, samples: Tensor) -> Tensor:
        """The run's unscaled result with the outside exact: the source, at the level where the run stopped.

        A run that is cut short but ends clean is held to the last mask, as a whole run is.
        """
        last = float(self.levels[-1])
        if last == 0:
            return blend(samples, self.source.to(samples), self.schedule.at(len(self.grid) - 2, self.grid).to(samples))
        noised = self.sampling.inverse_noise_scaling(sigma_tensor(last, self.device), self.background(last))
        outside = self.latent_format.process_out(noised).to(samples)
        return blend(samples, outside, self.mask(float(self.levels[-2])).to(samples))
