"""Guided reconstruction: negatives under which guided sampling follows a real picture's inversion.

Null-text inversion learns them (Mokady et al. 2023; methods.md, 11.3 and 17). Negative-prompt inversion borrows the source
prompt (Miyake et al. 2023; 11.4), with ProxNPI's options (11.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import match_batch
from ..core.sigmas import euler_step
from ..core.trajectory import Trajectory
from ..learning.early_stopping import Held
from ..learning.optimise import learning_mode, optimise, own, own_context
from .negative_embeddings import Embeddings
from .proximal import Proximal


@dataclass(frozen=True)
class NullTextOptions:
    """The published schedule.

    Attributes:
        guidance_scale: the scale to reconstruct, and later edit, at.
        inner: most updates per step.
        lr: Adam's step size at the first step; it falls linearly to half at the end (published: 1 - i / 100 of 50).
        tolerance, tolerance_growth: an image is done with step i when its loss, the mean squared distance to the
            trajectory in the variance-preserving scale, is below tolerance + i tolerance_growth.
    """

    guidance_scale: float = 7.5
    inner: int = 10
    lr: float = 1e-2
    tolerance: float = 1e-5
    tolerance_growth: float = 2e-5

    def __post_init__(self) -> None:
        if self.inner < 0:
            raise ParameterError(f"inner steps are {self.inner}: give 0 or more (10 as published)")
        if not self.lr > 0:
            raise ParameterError(f"lr is {self.lr}: give a learning rate above 0 (0.01 as published)")

    def rate(self, step: int, steps: int) -> float:
        """Adam's step size at `step` of a grid of `steps`."""
        return self.lr * (1 - step / (2 * steps))

    def threshold(self, step: int) -> float:
        """The loss below which `step` is done."""
        return self.tolerance + step * self.tolerance_growth


@dataclass(frozen=True)
class NullTextResult:
    """What null-text inversion found.

    Attributes:
        embeddings: one per step.
        rebuilt: where guided sampling with them ends, [B, C, h, w] in model scale: the reconstruction, for free.
        losses: last measured loss of every step, mean over the batch; before the last update, as published.
        updates: updates made at every step.
    """

    embeddings: Embeddings
    rebuilt: Tensor
    losses: list[float]
    updates: list[int]


def null_text(
    denoiser: Denoiser,
    trajectory: Trajectory,
    source: Context,
    null: Context,
    *,
    options: NullTextOptions | None = None,
    progress: Progress = silent,
) -> NullTextResult:
    """Learn one unconditional embedding per step, so that guided sampling retraces the trajectory.

    Per step and image: 1 conditional row, 1 unconditional row per update, and 1 to advance. Only the embeddings receive
    gradients; the model must let them through to its context. Images do not influence each other.

    Args:
        source: the prompt of the inversion.    null: where the embeddings start, the empty prompt.
    Raises: MismatchError, ShapeError, ParameterError. Cancel by raising in `progress`, which is told after every update.
    """
    options = options or NullTextOptions()
    trajectory.check(denoiser)
    trajectory.check_prompt(source, "positive")
    with learning_mode():
        run = _Run(denoiser, trajectory, source, own_context(null), options)
        for step in range(trajectory.first, trajectory.steps):
            run.step(step, progress)
        tokens = torch.stack(run.learned)
    embeddings = _made(trajectory, null, tokens, options.guidance_scale)
    return NullTextResult(embeddings, run.z, run.losses, run.updates)


class _Run:
    """The state that one step hands to the next: the latent and the embedding (warm start)."""

    def __init__(
        self, denoiser: Denoiser, path: Trajectory, source: Context, null: Context, options: NullTextOptions
    ) -> None:
        self.denoiser, self.trajectory, self.source, self.null, self.options = denoiser, path, source, null, options
        self.z = own(path.latents[0])
        rows = match_batch(null.tokens, path.batch, "negative", "trajectory")
        self.u = own(rows.contiguous(), self.z.device)
        self.learned: list[Tensor] = []
        self.losses: list[float] = []
        self.updates: list[int] = []

    def step(self, index: int, progress: Progress) -> None:
        """Learn the embedding of step `index` of the whole grid, and take the step with it."""
        options, levels = self.options, self.trajectory.sigmas.tolist()
        sigma, target = levels[index], levels[index + 1]
        with torch.no_grad():
            cond = self.denoiser.denoise(self.z, sigma, [self.source])[0]
        # at guidance 1 the unconditional prediction cancels out: there is nothing to learn
        inner = 0 if options.guidance_scale == 1 else options.inner
        fit = _Fit(self, cond, sigma, target, own(self.trajectory.level(index + 1)), options.threshold(index))
        total, before = len(self.trajectory.latents) - 1, index - self.trajectory.first
        result = optimise(
            [self.u], fit, steps=inner, lr=options.rate(index, self.trajectory.steps), stop=fit.held.stop,
            progress=lambda done, _, preview=None: progress(before * inner + done, total * inner),
        )  # fmt: skip
        fit.held.hold()
        with torch.no_grad():
            clean = fit.guided()
            self.z = euler_step(self.z, clean, sigma, target)
        self.learned.append(self.u.detach().clone())
        self.updates.append(result.steps)
        self.losses.append(result.losses[-1] / self.trajectory.batch if result.losses else 0.0)
        progress((before + 1) * max(1, inner), total * max(1, inner), clean)


class _Fit:
    """The loss of one step, image by image; an image that is done keeps its embedding while others go on."""

    def __init__(self, run: _Run, cond: Tensor, sigma: float, target: float, goal: Tensor, threshold: float) -> None:
        self.run, self.cond, self.sigma, self.target, self.goal = run, cond, sigma, target, goal
        # the published tolerances are meant for variance-preserving latents, which are smaller at high noise
        self.weight = 1.0 if run.denoiser.flow else 1 / (1 + target * target)
        self.held = Held([run.u], threshold)

    def guided(self) -> Tensor:
        """The guided clean prediction [B, C, h, w] with the embeddings as they are now; the conditional row is not run again."""
        run, scale = self.run, self.run.options.guidance_scale
        if scale == 1:
            return self.cond
        null = run.null.with_tokens(run.u)
        uncond = run.denoiser.denoise(run.z, self.sigma, [null])[0]
        return run.denoiser.combine(run.z, self.sigma, self.cond, uncond, scale, [run.source, null])

    def __call__(self, step: int) -> Tensor:
        """Loss [B] of the embeddings as they are now."""
        self.held.hold()
        reached = euler_step(self.run.z, self.guided(), self.sigma, self.target)
        loss = (reached - self.goal).square().flatten(1).mean(1) * self.weight
        self.held.saw(loss)
        return loss


def negative_prompt(
    denoiser: Denoiser,
    trajectory: Trajectory,
    source: Context,
    *,
    null: Context | None = None,
    interpolation: float = 0.0,
    proximal: Proximal | None = None,
) -> Embeddings:
    """Negative-prompt inversion: the source prompt itself as negative; nothing is learned and nothing evaluated.

    With the source prompt as positive too, guidance cancels at any scale and sampling equals the unguided inversion.

    Args:
        source: the prompt of the inversion.
        interpolation: 0 to 1, the way from it to `null` on the great circle (published `npi_interp`).
        proximal: ProxNPI's cut; None = plain NPI.
    Raises: MismatchError, ParameterError.
    """
    trajectory.check(denoiser)
    trajectory.check_prompt(source, "positive")
    if not 0 <= interpolation <= 1:
        raise ParameterError(f"interpolation is {interpolation}: give 0 (source prompt) to 1 (empty prompt)")
    base = source
    if interpolation > 0:
        if null is None:
            raise ParameterError(
                f"interpolation is {interpolation} but there is no negative prompt: connect an empty one"
            )
        base = source.with_tokens(slerp(source.tokens, null.tokens, interpolation))
    made = _made(trajectory, base, None, None)
    return replace(
        made, proximal=proximal, trajectory=trajectory if proximal is not None and proximal.pull > 0 else None
    )


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From `a` (0) to `b` (1), tensors [R, T, D], along the great circle of each row; parallel rows go straight."""
    if a.shape[1:] != b.shape[1:]:
        raise ShapeError(f"embeddings are {list(a.shape)} and {list(b.shape)}: both prompts need the same token count")
    b = b.to(a)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().view(-1, 1, 1)
    sine = angle.sin()
    curved = ((1 - share) * angle).sin() / sine * a + (share * angle).sin() / sine * b
    return torch.where(sine.abs() > 1e-4, curved, torch.lerp(a, b, share))


def _made(path: Trajectory, base: Context, tokens: Tensor | None, scale: float | None) -> Embeddings:
    return Embeddings(base, tokens, path.sigmas, path.family, path.fingerprint, path.prompt, scale)


__all__ = ["NullTextOptions", "NullTextResult", "negative_prompt", "null_text", "slerp"]
