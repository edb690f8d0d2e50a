"""Attention edits under any sampler, which only asks for the denoised latent of a batch of pairs.

Our own loop blends the target after each step (`PairControl.blend`). Third-party samplers expose no end-of-step hook, so the
state is blended in place just before each prediction, with the maps of the steps so far. The denoised latent is blended too:
multistep samplers keep it as their history, and the last step returns it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.attention_sites import Branch, Controlled
from ..core.errors import MismatchError, ShapeError
from ..core.guidance import EditPrompts, constant_positive
from ..core.protocols import Context, Denoiser
from ..core.samplers import Predict
from ..core.sigmas import JUST_ABOVE
from ..core.trajectory import Trajectory
from .pair_batch import interleave, pair_context, pair_rows, separate
from .pair_control import PairControl


@dataclass(frozen=True)
class PairPlan:
    """The attention edit that a MODEL carries to its sampler.

    Attributes:
        make: the control of one run along a grid [N + 1].
        sigmas: the grid on which step ranges are counted; None = the sampler's own.
        tokens: the text tokens that the prompts were aligned on; None = any.
        share_noise: whether the target gets its source's noise, at the start and at every step.
        trajectory: returns the source's trajectory if it is a real image, which the source then follows.
    """

    make: Callable[[Tensor], PairControl]
    sigmas: Tensor | None = None
    tokens: int | None = None
    share_noise: bool = True
    trajectory: Callable[[], Trajectory] | None = None

    def check(self, denoiser: Denoiser, sampled: Tensor, latent: Tensor, positive: list[Tensor]) -> PairRun:
        """Begin a run.

        Args:
            denoiser: the model that is sampled.
            sampled: the sampler's grid, [N + 1].
            latent: the sampler's latents [2 B, C, h, w].
            positive: the tokens [2 or 2 B, T, D] of each part of the positive prompt.
        Returns: the run, with its control and, for a real image, its trajectory.
        Raises: ShapeError for an odd batch, MismatchError for a prompt or a trajectory of another edit or model.
        """
        images = check_pairs(latent)
        for tokens in positive:
            if len(tokens) not in (2, 2 * images):
                raise MismatchError(
                    f"positive has {len(tokens)} rows but an attention edit needs 2, source and target: connect the "
                    "conditioning of the node that patched the model"
                )
            if self.tokens is not None and tokens.shape[1] % self.tokens:
                raise MismatchError(
                    f"positive has {tokens.shape[1]} tokens but the prompts were aligned on {self.tokens}: connect the "
                    "conditioning of the node that patched the model"
                )
        trajectory = None if self.trajectory is None else self.trajectory().fitted(denoiser, sampled, latent[::2])
        return PairRun(self.make(sampled if self.sigmas is None else self.sigmas), trajectory)


def check_pairs(latent: Tensor) -> int:
    """The pairs of a latent batch. Raises ShapeError for an odd batch."""
    if len(latent) % 2:
        raise ShapeError(
            f"the sampler's latent batch has {len(latent)} rows but an attention edit needs pairs (source, target, source, "
            "target, ...): set batch_size to 2, or repeat the latent once"
        )
    return len(latent) // 2


class PairRun:
    """One run of a sampler on a batch of pairs."""

    def __init__(self, control: PairControl, trajectory: Trajectory | None) -> None:
        self.control = control
        self.trajectory = trajectory
        self._predicted = False

    def controlled(self, rows: int, branches: tuple[Branch, ...]) -> Controlled:
        """The control for a model call on `rows` latents, with one context for each of `branches`."""
        return Controlled(self.control, pair_rows(rows // 2, branches))

    def blend_state(self, z: Tensor, sigma: float) -> None:
        """Put the source [::2] on its trajectory and blend the target [1::2]: z [2 B, C, h, w] at `sigma`, in place."""
        if self.trajectory is not None:
            z[::2] = self.trajectory.at(sigma).to(z)
        if self._predicted:  # LocalBlend has no maps before the first prediction
            source, target = separate(z)
            blended = self.control.blend(source, target, self.control.step(sigma * JUST_ABOVE))
            if blended is not target:
                target.copy_(blended)

    def blend_denoised(self, denoised: Tensor, sigma: float) -> Tensor:
        """The denoised latents [2 B, C, h, w] for the sampler, with the source's own and the target blended."""
        self._predicted = True
        source, target = separate(denoised)
        if self.trajectory is not None:
            source = self.trajectory.source.to(denoised)
        blended = self.control.blend(source, target, self.control.step(sigma))
        return denoised if blended is target and self.trajectory is None else interleave(source, blended)

    def finished(self, samples: Tensor) -> Tensor:
        """An unscaled result [2 B, C, h, w]; the source of a real image is the image's latent, bit for bit."""
        if self.trajectory is None:
            return samples
        return interleave(self.trajectory.source_latent.to(samples), separate(samples)[1])

    def release(self) -> None:
        """Forget what the run has collected."""
        self.control.reset()


def paired_predictor(denoiser: Denoiser, prompts: EditPrompts, run: PairRun) -> Predict:
    """The guided denoised latents of pairs [2 B, C, h, w] as a function of latent and sigma; writes into the latent.

    The positive prompt has a row for source and target, or one for each latent; the negative is as in plain sampling.
    """
    pair = constant_positive(prompts.positive, "an attention edit")
    negative, scale = prompts.negative, prompts.guidance_scale
    repeated: dict[int, Context] = {}

    def predict(z: Tensor, sigma: float) -> Tensor:
        run.blend_state(z, sigma)
        rows = len(z)
        positive = repeated.setdefault(rows, _repeated(pair, rows))
        if negative is None or not negative.guides(scale):
            denoised = denoiser.denoise(z, sigma, [positive], run.controlled(rows, ("cond",)))[0]
            return run.blend_denoised(denoiser.combine(z, sigma, denoised, denoised, 1.0, [positive]), sigma)
        contexts = [positive, negative.at_sigma(sigma)]
        cond, uncond = denoiser.denoise(z, sigma, contexts, run.controlled(rows, ("cond", "uncond")))
        return run.blend_denoised(negative.combine(denoiser, z, sigma, cond, uncond, scale, contexts), sigma)

    return predict


def _repeated(context: Context, rows: int) -> Context:
    """A context of two rows, source and target, repeated for a batch of pairs; one row or one per latent stays."""
    if len(context.tokens) in (1, rows):
        return context
    pooled = None if context.pooled is None else context.pooled.repeat(rows // 2, 1)
    return replace(context, tokens=context.tokens.repeat(rows // 2, 1, 1), pooled=pooled)


def paired_context(source: Context, target: Context) -> Context:
    """One context with a row for source and target, [2, T, D].

    Prompts of different lengths are repeated to a common length, as hosts do. Attention over repeated keys is the same.
    Raises: ShapeError for prompts of several rows, or of different text encoders.
    """
    for context, name in ((source, "source"), (target, "target")):
        if len(context.tokens) != 1:
            raise ShapeError(f"{name} has {len(context.tokens)} rows: an attention edit takes a prompt of 1 row each")
    if source.tokens.shape[2] != target.tokens.shape[2]:
        raise ShapeError(
            f"source has tokens of width {source.tokens.shape[2]} but target of {target.tokens.shape[2]}: encode both with "
            "the same text encoder"
        )
    length = math.lcm(source.tokens.shape[1], target.tokens.shape[1])
    first, second = (c.with_tokens(c.tokens.repeat(1, length // c.tokens.shape[1], 1)) for c in (source, target))
    return pair_context(first, second, 1)


def shared_noise(noise: Tensor) -> Tensor:
    """Noise [2 B, ...] in which every target has its source's."""
    return noise[::2].repeat_interleave(2, dim=0)
