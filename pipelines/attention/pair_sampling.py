"""Attention edits under a sampler of any kind: what it may ask for is a prediction for a batch of pairs.

A loop of ours blends after each step (`PairControl.blend`). A sampler of somebody else's asks for a prediction of its state,
so here that state is blended, in place, when it comes, with what was known when its level was reached: it is the sampler's
state after its last step. The clean prediction is blended too, so that the history of multistep samplers stays on the source's
line, and so that the last step ends where it must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..core.attention_sites import Branch, Controlled
from ..core.errors import MismatchError, ShapeError
from ..core.guidance import EditPrompts, constant_positive
from ..core.protocols import Context, Denoiser
from ..core.samplers import Predict
from ..core.trajectory import Trajectory
from .pair_batch import interleave, pair_context, pair_rows, separate
from .pair_control import PairControl

ABOVE = 1 + 3e-5  # just above a level of the grid, seen with the tolerance of `step_of_sigma`


@dataclass(frozen=True)
class PairPlan:
    """What an attention edit asks of a sampler.

    Attributes:
        make: the control of one run along a grid [N + 1].
        sigmas: the grid that the edit's parts are counted on; None = the sampler's own.
        tokens: how many text tokens the prompts were aligned on; None = any.
        share_noise: whether the target gets its source's noise, at the start and at every step.
        trajectory: where to get the source's trajectory, if it is a real picture: its rows are held to it.
    """

    make: Callable[[Tensor], PairControl]
    sigmas: Tensor | None = None
    tokens: int | None = None
    share_noise: bool = True
    trajectory: Callable[[], Trajectory] | None = None

    def check(self, denoiser: Denoiser, sampled: Tensor, latent: Tensor, positive: list[Tensor]) -> PairRun:
        """The run along the grid `sampled` on latents [2 B, C, h, w], whose positive prompt has the parts `positive`.

        Raises: ShapeError for an odd batch, MismatchError for a prompt or a trajectory that does not belong here.
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
        path = None if self.trajectory is None else self.trajectory().fitted(denoiser, sampled, latent[::2])
        return PairRun(self.make(sampled if self.sigmas is None else self.sigmas), path)


def check_pairs(latent: Tensor) -> int:
    """How many pairs a latent batch holds. Raises ShapeError for an odd one."""
    if len(latent) % 2:
        raise ShapeError(
            f"the sampler's latent batch has {len(latent)} rows but an attention edit needs pairs (source, target, source, "
            "target, ...): set batch_size to 2, or repeat the latent once"
        )
    return len(latent) // 2


class PairRun:
    """One run of a sampler."""

    def __init__(self, control: PairControl, path: Trajectory | None) -> None:
        self.control, self.trajectory = control, path
        self._predicted = False

    def controlled(self, rows: int, branches: tuple[Branch, ...]) -> Controlled:
        """The control for a call on `rows` latents, whose contexts are of these branches."""
        return Controlled(self.control, pair_rows(rows // 2, branches))

    def settle(self, z: Tensor, sigma: float) -> None:
        """Bring a sampler's state [2 B, C, h, w] at `sigma` to where it must be, in place."""
        if self.trajectory is not None:
            z[::2] = self.trajectory.at(sigma).to(z)
        if self._predicted:  # before the first prediction there is nothing to blend by
            source, target = separate(z)
            blended = self.control.blend(source, target, self.control.step(sigma * ABOVE))
            if blended is not target:
                target.copy_(blended)

    def after(self, clean: Tensor, sigma: float) -> Tensor:
        """The clean prediction [2 B, C, h, w] that the sampler goes on with."""
        self._predicted = True
        source, target = separate(clean)
        if self.trajectory is not None:
            source = self.trajectory.source.to(clean)
        blended = self.control.blend(source, target, self.control.step(sigma))
        return clean if blended is target and self.trajectory is None else interleave(source, blended)

    def finished(self, samples: Tensor) -> Tensor:
        """A clean, unscaled result [2 B, C, h, w], in which a real picture's rows are the picture, bit for bit."""
        return (
            samples
            if self.trajectory is None
            else interleave(self.trajectory.source_latent.to(samples), separate(samples)[1])
        )

    def release(self) -> None:
        """Forget what the run has collected."""
        self.control.reset()


def paired_predictor(denoiser: Denoiser, prompts: EditPrompts, run: PairRun) -> Predict:
    """The guided clean prediction of pairs [2 B, C, h, w] as a function of latent and level; writes into the latent.

    The positive prompt has a row for source and target (or one for each latent); the negative is as for plain sampling.
    """
    both = constant_positive(prompts.positive, "an attention edit")
    negative, scale = prompts.negative, prompts.guidance_scale
    repeated: dict[int, Context] = {}

    def predict(z: Tensor, sigma: float) -> Tensor:
        run.settle(z, sigma)
        rows = len(z)
        positive = repeated.setdefault(rows, _each(both, rows))
        if negative is None or not negative.guides(scale):
            clean = denoiser.denoise(z, sigma, [positive], run.controlled(rows, ("cond",)))[0]
            return run.after(denoiser.combine(z, sigma, clean, clean, 1.0, [positive]), sigma)
        contexts = [positive, negative.at_sigma(sigma)]
        cond, uncond = denoiser.denoise(z, sigma, contexts, run.controlled(rows, ("cond", "uncond")))
        return run.after(negative.combine(denoiser, z, sigma, cond, uncond, scale, contexts), sigma)

    return predict


def _each(context: Context, rows: int) -> Context:
    """A context of one row, or of two for source and target, for a batch of pairs."""
    if len(context.tokens) in (1, rows):
        return context
    pooled = None if context.pooled is None else context.pooled.repeat(rows // 2, 1)
    return Context(context.tokens.repeat(rows // 2, 1, 1), pooled, context.text, context.host)


def paired_context(source: Context, target: Context) -> Context:
    """One context with a row for source and target, [2, T, D].

    Prompts of different lengths are repeated to a common one, as hosts do: attention over repeated keys is the same.
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
    """Every target's noise is its source's, [2 B, ...]."""
    return noise[::2].repeat_interleave(2, dim=0)
