"""Blended Latent Diffusion as a MODEL patch: any native sampler then edits inside the masks only.

Two wrappers, both public API of ComfyUI: PREDICT_NOISE blends around each prediction (`PredictionBlend`), OUTER_SAMPLE
prepares a run and restores the source after it, so that samplers which follow the ODE only nearly (uni_pc) end with the
exact source too.
"""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.sample
import torch
from torch import Tensor

from ...pipelines.blended.blending import blend, restore_source
from ...pipelines.blended.prediction import PredictionBlend
from ...pipelines.core.errors import FamilyError, ParameterError, ShapeError
from ...pipelines.core.masks import MaskSchedule
from ...pipelines.core.shapes import check_latent, match_batch
from .model_sampling import family_of, sigma_tensor
from .patch_keys import BLEND_KEY, blends

Wrappers = comfy.patcher_extension.WrappersMP


def native_blended_model(model: Any, schedule: MaskSchedule, source: Tensor | None, sigmas: Tensor | None) -> Any:
    """A clone of MODEL that blends in every native sampler (`hosts.host.blended_model`; docs/methods.md, section 1).

    A sampler that adds no noise of its own (KSamplerAdvanced's second stage) starts from a noised LATENT: then `source`
    is required, and the background's noise is read off that LATENT (or redrawn, where its seed is the sampler's own).

    Args:
        model: MODEL.
        schedule: mask schedule on the latent grid, batch B or 1.
        source: unscaled latent [B or 1, C, h, w]; None takes the latent that the sampler is given.
        sigmas: grid [N + 1] on which the schedule's steps are counted; None takes the sampler's own.
    Returns: MODEL.
    Raises: ParameterError for a MODEL that already blends; FamilyError for one that cannot edit still images.
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
        run = BlendedRun(guider.model_patcher, schedule, latent if source is None else source, latent, levels, given)
        run.set_noise(noise, seed, given_source=source is not None)
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
        denoised = executor(run.outside.blend_state(x, sigma), timestep, *rest, **named)
        return run.outside.blend_denoised(denoised, sigma)

    clone = model.clone()
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, BLEND_KEY, outer_sample)
    clone.add_wrapper_with_key(Wrappers.PREDICT_NOISE, BLEND_KEY, predict_noise)
    return clone


class BlendedRun:
    """One sampler run: its source, noise and masks on the compute device."""

    def __init__(
        self,
        patcher: Any,
        schedule: MaskSchedule,
        source: Tensor,
        latent: Tensor,
        sigmas: Tensor,
        grid: Tensor | None,
    ) -> None:
        """Collect what the run needs.

        Args:
            patcher: the ModelPatcher that the sampler runs.
            schedule: mask schedule on the latent grid.
            source: clean source latent, unscaled, [B or 1, C, h, w].
            latent: the sampler's latent, unscaled, [B, C, h, w].
            sigmas: the sampler's sigmas.
            grid: sigmas on which the schedule counts; None = the sampler's.
        Raises: FamilyError, ShapeError.
        """
        self.device = patcher.load_device
        self.sampling = patcher.get_model_object("model_sampling")
        self.latent_format = patcher.get_model_object("latent_format")
        if latent.ndim != 4:
            raise FamilyError(f"the sampler's latent has {latent.ndim} dimensions: only still images can be blended")
        self.sigmas = sigmas.detach().float().cpu().clone()  # uni_pc writes into the list it is given
        self.batch = latent.shape[0]
        self.source = self._fitted(source, latent)
        self.clean = self.latent_format.process_in(self.source)
        self.started = self.latent_format.process_in(latent.to(self.device, torch.float32))
        self.fixed_noise = torch.zeros_like(self.clean)
        self.outside = PredictionBlend(
            schedule.expanded(self.batch, *latent.shape[-2:]).to(self.device),
            self.sigmas if grid is None else grid,
            self.clean,
            self.background,
        )

    def _fitted(self, source: Tensor, latent: Tensor) -> Tensor:
        source = check_latent(source, "source latent", latent.shape[1])
        if source.shape[-2:] != latent.shape[-2:]:
            raise ShapeError(
                f"source latent is {source.shape[-1]} x {source.shape[-2]} latent pixels but the sampler's latent is "
                f"{latent.shape[-1]} x {latent.shape[-2]}: encode both at one size"
            )
        return match_batch(source.to(self.device, torch.float32), self.batch, "source latent", "the sampler's latent")

    def set_noise(self, noise: Tensor, seed: int | None, *, given_source: bool) -> None:
        """The noise that the background rides on: the sampler's, or the one inside an already noised latent."""
        first = float(self.sigmas[0])
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
        outside = self.outside.arrival_mask(sigma) == 0
        error = torch.where(outside, drawn - solved, zero).abs().amax()
        return drawn if outside.any() and float(error) < 1e-2 else solved

    def background(self, sigma: float, *, noise: Tensor | None = None, clean: Tensor | None = None) -> Tensor:
        """The source noised to `sigma`, [B, C, h, w], model scale."""
        clean = self.clean if clean is None else clean
        return self.sampling.noise_scaling(
            sigma_tensor(sigma, self.device), self.fixed_noise if noise is None else noise, clean, max_denoise=False
        )

    def finish(self, samples: Tensor) -> Tensor:
        """The run's unscaled result with the source outside the mask, noised to the sigma where the run stopped.

        A run that is cut short but ends at 0 uses the last mask of the schedule, as a whole run does.
        """
        last = float(self.sigmas[-1])
        if last == 0:
            return restore_source(samples, self.source, self.outside.schedule, self.outside.sigmas)
        noised = self.sampling.inverse_noise_scaling(sigma_tensor(last, self.device), self.background(last))
        outside = self.latent_format.process_out(noised).to(samples)
        return blend(samples, outside, self.outside.mask(float(self.sigmas[-2])).to(samples))
