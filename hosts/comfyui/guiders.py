"""The host's guider with a negative for every step: any native sampler then follows null-text or negative-prompt inversion."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import comfy.samplers as samplers
from torch import Tensor

from ...pipelines.core.protocols import Context
from ...pipelines.core.sigmas import step_of_sigma
from ...pipelines.core.trajectory import SIGMA_TOLERANCE, check_grid
from ...pipelines.inversion.negative_embeddings import Embeddings
from ..sockets import conditioning
from .denoiser import evaluated, guidance
from .model_sampling import NativeModelSampling


class EmbeddingsGuider(samplers.CFGGuider):
    """Every step's negative is a condition of the run, so that the host prepares them all: ControlNets, areas and hooks
    act on each as on a plain negative. Which one is in force is told from the noise level, so a sampler may evaluate
    where and as often as it likes.
    """

    def __init__(self, model: Any, positive: Context, embeddings: Embeddings, scale: float) -> None:
        super().__init__(model)
        # where the host keeps prompts: a GUIDER may wait long for its sampler
        self._embeddings = embeddings.to(management.intermediate_device())
        self._trajectory = self._embeddings.trajectory
        first = embeddings.steps - 1 if embeddings.tokens is None else embeddings.first
        steps = range(first, embeddings.steps)
        negatives = {self._key(step): conditioning(embeddings.at(step)) for step in steps}
        self.inner_set_conds({"positive": conditioning(positive), **negatives})
        self.set_cfg(scale)

    def _key(self, step: int) -> str:
        """The host's key of a step's negative; the last one's is the name that other nodes look for."""
        last = self._embeddings.steps - 1
        return "negative" if step == last or self._embeddings.tokens is None else f"negative{step}"

    def sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        """As the host's. Raises MismatchError for another model, and for sigmas that are no part of the grid."""
        embeddings = self._embeddings
        embeddings.check(NativeModelSampling(self.model_patcher))  # type: ignore[arg-type]  # all of a Denoiser that it reads
        if len(sigmas) > 1:
            to_the_end = embeddings.sigmas >= float(sigmas[-1]) * (1 - SIGMA_TOLERANCE)
            check_grid(embeddings.sigmas[to_the_end], sigmas, "embeddings")
            embeddings.at_sigma(float(sigmas[0]))
        self._trajectory = (
            None if embeddings.trajectory is None else embeddings.trajectory.to(self.model_patcher.load_device)
        )
        try:
            # a copy, because uni_pc writes into the list it is given
            return super().sample(noise, latent_image, sampler, sigmas.clone(), *rest, **named)
        finally:
            self._trajectory = embeddings.trajectory

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None
    ) -> Tensor:
        """The guided clean prediction (the host calls it noise)."""
        options, sigma, proximal = model_options or {}, float(timestep.flatten()[0]), self._embeddings.proximal
        step = step_of_sigma(sigma, self._embeddings.sigmas)
        pair = [self.conds["positive"], self.conds[self._key(step)]]
        if proximal is None:
            return samplers.sampling_function(
                self.inner_model, x, timestep, pair[1], pair[0], self.cfg, model_options=options, seed=seed
            )
        cond, uncond = evaluated(self.inner_model, pair, x, timestep, options)
        return proximal.guide(
            x, sigma, cond, uncond, self._trajectory,
            lambda *mixed: guidance(self.inner_model, pair, x, timestep, mixed, self.cfg, options),
        )  # fmt: skip
