"""ProxNPI: proximal guidance, which keeps small edits small (Han et al. 2024; docs/methods.md, section 11.5).

Guidance moves the prediction by w times the difference of the conditional and the unconditional prediction. The
proximal step sets small differences to zero. Where nothing of the difference is left, inversion guidance may move the
latent back to the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import MismatchError, ParameterError
from ..core.masks import dilate
from ..core.sigmas import euler_step, step_of_sigma
from ..core.trajectory import Trajectory

TARGETS = ("source", "path")


def soft(delta: Tensor, threshold: Tensor) -> Tensor:
    """Soft threshold: moves every difference towards 0 by `threshold`. The published mode "l0"."""
    return delta - delta.clamp(-threshold, threshold)


def hard(delta: Tensor, threshold: Tensor) -> Tensor:
    """Hard threshold: keeps differences above `threshold` and sets the others to 0."""
    return torch.where(delta.abs() > threshold, delta, torch.zeros_like(delta))


def published_l1(delta: Tensor, threshold: Tensor) -> Tensor:
    """The published mode "l1", whose chained cases shrink twice and turn the sign of small negative differences.

    It is not odd, and the published code applies it to differences of eps; `shrink_as_published` applies it to others.
    """
    delta = soft(delta, threshold)
    delta = torch.where(delta > 0, delta - threshold, delta)
    return torch.where(delta < 0, delta + threshold, delta)


def shrink_as_published(delta: Tensor, threshold: Tensor) -> Tensor:
    """`published_l1` for differences of denoised predictions, which are -sigma times those of eps."""
    return -published_l1(-delta, threshold)


SHRINK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft": soft,
    "hard": hard,
    "published l1": shrink_as_published,
}


def quantile(values: Tensor, fraction: float) -> Tensor:
    """Linear quantile along the second axis of [B, n], as [B]; `torch.quantile` refuses more than 16 M values."""
    ordered = values.sort(dim=1).values
    place = fraction * (values.shape[1] - 1)
    low = math.floor(place)
    return torch.lerp(ordered[:, low], ordered[:, min(low + 1, values.shape[1] - 1)], place - low)


@dataclass(frozen=True)
class Proximal:
    """Settings of proximal guidance and of inversion guidance.

    Attributes:
        mode: how differences shrink: "soft", "hard" or "published l1".
        quantile: fraction of an image's differences to remove, [0, 1]; 0 removes none, 1 all. The default equals the
            published 0.7, which was taken over source and target images together.
        threshold: a fixed threshold >= 0 in units of noise (eps) instead of the quantile; None = quantile.
        batch_quantile: as published: one quantile over the whole batch and as many zeros (the source images of NPI).
        inversion_guidance: step size [0, 1] back to the source where nothing is left of the difference; 0 = off.
        inversion_guidance_below: inversion guidance acts below this sigma (published: that of timestep 400).
        inversion_guidance_target: "source": the clean source; "path": its trajectory at the sigma that the step reaches.
        dilation: latent pixels by which the edited region grows before inversion guidance acts outside it, >= 0.
        mask_of_shrunk: as published: find the edited region from the shrunk difference, so that soft modes compare
            with twice the threshold.
    """

    mode: str = "soft"
    quantile: float = 0.4
    threshold: float | None = None
    batch_quantile: bool = False
    inversion_guidance: float = 0.0
    inversion_guidance_below: float = math.inf
    inversion_guidance_target: str = "path"
    dilation: int = 1
    mask_of_shrunk: bool = False

    def __post_init__(self) -> None:
        if self.mode not in SHRINK:
            raise ParameterError(f"prox mode is {self.mode!r}: choose one of {', '.join(SHRINK)}")
        if self.inversion_guidance_target not in TARGETS:
            raise ParameterError(
                f"inversion_guidance_target (pull_to) is {self.inversion_guidance_target!r}: choose one of "
                f"{', '.join(TARGETS)}"
            )
        if not 0 <= self.quantile <= 1:
            raise ParameterError(f"quantile is {self.quantile}: give a fraction from 0 to 1")
        if not 0 <= self.inversion_guidance <= 1:
            raise ParameterError(f"inversion_guidance (pull) is {self.inversion_guidance}: give a number from 0 to 1")
        if self.threshold is not None and self.threshold < 0:
            raise ParameterError(f"threshold is {self.threshold}: give 0 or more, or leave it out for the quantile")
        if self.dilation < 0:
            raise ParameterError(f"dilation is {self.dilation}: give 0 or more latent pixels")

    def threshold_of(self, delta: Tensor, sigma: float) -> Tensor:
        """The threshold for differences [B, C, h, w] of denoised predictions, broadcastable over them.

        Such a difference is sigma times that of the noise predictions, for diffusion and flow models alike.
        """
        if self.threshold is not None:
            return delta.new_tensor(self.threshold * sigma)
        if self.quantile == 0:
            return delta.new_zeros(())
        size = delta.abs()
        if self.batch_quantile:
            return quantile(torch.cat([torch.zeros_like(size), size]).reshape(1, -1), self.quantile).view(1, 1, 1, 1)
        return quantile(size.flatten(1), self.quantile).view(-1, 1, 1, 1)

    def guide(
        self,
        z: Tensor,
        sigma: float,
        cond: Tensor,
        uncond: Tensor,
        trajectory: Trajectory | None,
        guidance: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """One step of proximal guidance.

        Args:
            z: latent [B, C, h, w] at `sigma`, model scale.
            sigma: of the step, > 0.
            cond, uncond: denoised predictions [B, C, h, w] for the positive and the negative prompt.
            trajectory: of the source; needed where `inversion_guidance` is above 0.
            guidance: combines a conditional and an unconditional prediction (classifier-free guidance).
        Returns: the guided denoised prediction [B, C, h, w].
        Raises: MismatchError without a needed trajectory.
        """
        delta = cond - uncond
        threshold = self.threshold_of(delta, sigma)
        shrunk = SHRINK[self.mode](delta, threshold)
        denoised = guidance(uncond + shrunk, uncond)
        if self.inversion_guidance == 0 or sigma >= self.inversion_guidance_below:
            return denoised
        if trajectory is None:
            raise MismatchError(
                "inversion_guidance (pull) is above 0 but these embeddings carry no trajectory: make them from a TRAJECTORY"
            )
        edited = ((shrunk if self.mask_of_shrunk else delta).abs() > threshold).to(delta)
        step_size = self.inversion_guidance * (1 - dilate(edited, 2 * self.dilation + 1))
        return denoised - step_size * self._distance(z, sigma, denoised, trajectory.expanded(len(z)).to(z.device))

    def _distance(self, z: Tensor, sigma: float, denoised: Tensor, trajectory: Trajectory) -> Tensor:
        """The distance of the denoised prediction from the target of inversion guidance.

        The published updates move the latent after the step: by a fraction of its distance from the trajectory, or of
        the prediction's distance from the source while the noise stays as predicted. A change of the prediction moves the
        latent after a first-order step by 1 - target / sigma of it, which the distance is divided by.
        """
        step = step_of_sigma(sigma, trajectory.sigmas)
        target = float(trajectory.sigmas[step + 1])
        if self.inversion_guidance_target == "source":
            distance = denoised - trajectory.source
        else:
            distance = euler_step(z, denoised, sigma, target) - trajectory.latent(step + 1)
        return distance / (1 - target / sigma)
