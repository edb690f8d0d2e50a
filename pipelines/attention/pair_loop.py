"""Editing beside the source: the loop of Prompt-to-Prompt, P2Plus, MasaCtrl and Plug-and-Play.

The source of a real image comes from its trajectory at every step. It runs beside the target only in the branches whose
attention the control reads, so a step and image take 4 forward passes (both branches), 3 (one branch) or 2 (none). From noise
the source samples itself, with 4 throughout (docs/methods.md, sections 7, 8, 11.6 and 11.7).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.attention_sites import Branch, Controlled, RowMap
from ..core.errors import ParameterError
from ..core.guidance import Negative, check_guidance
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser
from ..core.shapes import common_batch, match_batch
from ..core.sigmas import check_sigmas, euler_step
from ..core.trajectory import Trajectory, check_grid, context_digest
from .p2p import P2PControl, P2POptions
from .pair_batch import interleave, mergeable, pair_context, pair_rows, separate, single_rows, trio_context, trio_rows
from .pair_control import PairControl
from .prompts.prompt_edit import PromptEdit

log = logging.getLogger("editkit")


@dataclass(frozen=True)
class PairPrompts:
    """The prompts of source and target, of one row or one per image, their common negative and the guidance scale."""

    source: Context
    target: Context
    negative: Negative | None
    guidance_scale: float

    def __post_init__(self) -> None:
        check_guidance(self.negative, self.guidance_scale)

    @property
    def guides(self) -> bool:
        """Whether the unconditional branch is needed."""
        return self.negative is not None and self.negative.guides(self.guidance_scale)


@dataclass(frozen=True)
class PairResult:
    """Latents at the end of the grid, model scale, [B, C, h, w]; `source` is the trajectory's own where there is one."""

    source: Tensor
    edited: Tensor


def attention_edit(
    denoiser: Denoiser,
    edit: PromptEdit,
    negative: Negative | None,
    start: Trajectory | Tensor,
    *,
    sigmas: Tensor | None = None,
    guidance_scale: float = 7.5,
    options: P2POptions | None = None,
    progress: Progress = silent,
) -> PairResult:
    """Edit by Prompt-to-Prompt or P2Plus.

    Args:
        denoiser: the model.
        edit: the aligned prompts.
        negative: a prompt, or null-text or negative-prompt embeddings; None only at scale 1.
        start: see `pair_edit`.
        sigmas: the grid [N + 1] for a latent; a trajectory brings its own.
        guidance_scale: w, for source and target.
        options: step ranges and layers; None = the defaults of `P2POptions`.
        progress: called after each step.
    Returns: source and target at the end of the grid, [B, C, h, w] each, model scale.
    Raises: ParameterError for a latent without `sigmas`, or a scale other than 1 without a negative; else as `pair_edit`.
    Source: docs/methods.md, sections 7 and 8.
    """
    prompts = PairPrompts(edit.source, edit.target, negative, guidance_scale)
    if options is not None and options.uncond_self_until > 0 and not prompts.guides:
        log.warning(
            "tau_u has nothing to act on: there is no unconditional branch without a negative and a cfg above 1 (a model "
            "with distilled guidance, such as Flux, needs none)"
        )
    return pair_edit(denoiser, prompts, P2PControl(edit, _grid(start, sigmas), options), start, progress=progress)


@torch.no_grad()
def pair_edit(
    denoiser: Denoiser,
    prompts: PairPrompts,
    control: PairControl,
    start: Trajectory | Tensor,
    *,
    sigmas: Tensor | None = None,
    progress: Progress = silent,
) -> PairResult:
    """Sample the target with its source beside it, deterministically (DDIM, eta 0).

    Args:
        denoiser: the model.
        prompts: of source and target.
        control: made for this run's grid; its step ranges count on the whole grid, also where the run starts later.
        start: the trajectory of a real image, or a latent [B, C, h, w] at the first sigma, model scale, which source and
            target start from.
        sigmas: the grid for a latent; None = the control's own, or its last part. A trajectory brings its own.
        progress: called after each step with the target's denoised latent.
    Returns: source and target at the end of the grid, [B, C, h, w] each, model scale.
    Raises: MismatchError for a trajectory, control or negative of another model or grid; ShapeError for batch sizes that
        differ; ParameterError for sigmas that do not fall; FamilyError for attention that cannot be controlled.
    """
    trajectory = start if isinstance(start, Trajectory) else None
    grid = _checked_grid(denoiser, prompts, control, start, sigmas)
    latents = start.latents[0] if isinstance(start, Trajectory) else start.to(denoiser.device, torch.float32)
    images = common_batch(latent=latents, source=prompts.source.tokens, target=prompts.target.tokens)
    source = target = match_batch(latents, images, "latent", "prompts")
    if trajectory is not None:
        trajectory = trajectory.expanded(images).to(target.device)
    calls = _ModelCalls(
        denoiser, prompts, control, images, shared_source=trajectory is not None and control.shared_source
    )
    steps = len(grid) - 1
    control.reset()
    try:
        for i, (sigma, next_sigma) in enumerate(pairwise(grid.tolist())):
            step = control.steps - steps + i
            if trajectory is None:
                source_denoised, denoised = calls.source_and_target(source, target, sigma, step)
                source = euler_step(source, source_denoised, sigma, next_sigma)
            else:
                denoised = calls.target(trajectory.latents[i], target, sigma, step)
                source = trajectory.latents[i + 1]
            target = control.blend(source, euler_step(target, denoised, sigma, next_sigma), step)
            progress(i + 1, steps, denoised)
    finally:
        control.reset()
    return PairResult(source, target)


def _checked_grid(
    denoiser: Denoiser, prompts: PairPrompts, control: PairControl, start: Trajectory | Tensor, sigmas: Tensor | None
) -> Tensor:
    """The sigmas of this run, once everything that was made for a model or a grid is known to belong to it."""
    trajectory = start if isinstance(start, Trajectory) else None
    grid = check_sigmas(control.sigmas if sigmas is None and trajectory is None else _grid(start, sigmas))
    check_grid(control.sigmas, grid, "attention control")
    if trajectory is not None:
        trajectory.check(denoiser)
        if trajectory.prompt != context_digest(prompts.source):
            log.warning("the trajectory was made with another prompt than the source prompt of this edit")
        grid = grid[trajectory.first :]
    if prompts.negative is not None:
        prompts.negative.check(denoiser, grid)
    return grid


def _grid(start: Trajectory | Tensor, sigmas: Tensor | None) -> Tensor:
    if isinstance(start, Trajectory):
        if sigmas is not None:
            check_grid(start.sigmas, sigmas, "trajectory")
        return start.sigmas
    if sigmas is None:
        raise ParameterError("sigmas are missing: a start from noise needs them, a trajectory brings its own")
    return sigmas


class _ModelCalls:
    """The model calls of one run.

    Attributes:
        shared_source: the source runs on its own prompt only, and serves both branches of the target.
    """

    def __init__(
        self, denoiser: Denoiser, prompts: PairPrompts, control: PairControl, images: int, *, shared_source: bool
    ) -> None:
        self.denoiser = denoiser
        self.prompts = prompts
        self.control = control
        self.images = images
        self.shared_source = shared_source
        self._uncond: Context | None = None
        self._contexts: dict[str, Context] = {}

    def source_and_target(self, source: Tensor, target: Tensor, sigma: float, step: int) -> tuple[Tensor, Tensor]:
        """The denoised source and target, each with its guidance."""
        branches = self._branches(sigma)
        contexts = [self._pair(branch) for branch in branches]
        out = self._denoise(interleave(source, target), sigma, contexts, pair_rows(self.images, branches), step)
        sources, targets = zip(*(separate(rows) for rows in out), strict=True)
        return (
            self._guided(source, sigma, sources, self.prompts.source),
            self._guided(target, sigma, targets, self.prompts.target),
        )

    def target(self, source: Tensor, target: Tensor, sigma: float, step: int) -> Tensor:
        """The denoised target with its guidance, with the source beside it in the branches that the control reads.

        All contexts of a model call share its batch. Branches with the source and branches without it are therefore two
        calls, unless all rows can stand under one context. A shared source must be in every call that has a target.
        """
        branches = self._branches(sigma)
        paired = [branch for branch in branches if branch in self.control.needs(step)]
        if len(paired) == 1 and len(branches) == 2:
            prompts = self._source_prompt(paired[0]), self._target_prompt("cond"), self._target_prompt("uncond")
            if mergeable(*prompts):
                return self._guided(
                    target, sigma, self._trio(source, target, sigma, paired[0], step), self.prompts.target
                )
            if self.shared_source:
                paired = list(branches)
        out: dict[Branch, Tensor] = {}
        for group in (paired, [branch for branch in branches if branch not in paired]):
            if group:
                beside = source if group is paired else None
                out.update(zip(group, self._targets(beside, target, sigma, group, step), strict=True))
        return self._guided(target, sigma, [out[branch] for branch in branches], self.prompts.target)

    # ------------------------------------------------------------------------------------------------------ single calls
    def _targets(
        self, source: Tensor | None, target: Tensor, sigma: float, branches: Sequence[Branch], step: int
    ) -> Sequence[Tensor]:
        """The target's prediction in each of `branches`, in one call, with the source beside it if one is given."""
        if source is None:
            contexts = [self._target_prompt(branch) for branch in branches]
            return tuple(self._denoise(target, sigma, contexts, single_rows(self.images, branches), step))
        contexts = [self._pair(branch) for branch in branches]
        out = self._denoise(interleave(source, target), sigma, contexts, pair_rows(self.images, branches), step)
        return [separate(rows)[1] for rows in out]

    def _trio(self, source: Tensor, target: Tensor, sigma: float, source_branch: Branch, step: int) -> Sequence[Tensor]:
        """The target's prediction in both branches, in one call, with the source beside it in one of them."""
        context = self._made(
            f"trio {source_branch}",
            lambda: trio_context(
                self._source_prompt(source_branch),
                self._target_prompt("cond"),
                self._target_prompt("uncond"),
                self.images,
            ),
        )
        z = interleave(source, target, target)
        out = self._denoise(z, sigma, [context], trio_rows(self.images, source_branch), step)[0]
        return separate(out, 3)[1:]

    def _denoise(self, z: Tensor, sigma: float, contexts: Sequence[Context], rows: RowMap, step: int) -> Tensor:
        controlled = Controlled(self.control, rows) if self.control.active(step) else None
        return self.denoiser.denoise(z, sigma, contexts, controlled)

    def _guided(self, z: Tensor, sigma: float, out: Sequence[Tensor], positive: Context) -> Tensor:
        negative, scale = self.prompts.negative, self.prompts.guidance_scale
        if negative is None or self._uncond is None:
            return self.denoiser.combine(z, sigma, out[0], out[0], 1.0, [positive])
        return negative.combine(self.denoiser, z, sigma, out[0], out[1], scale, [positive, self._uncond])

    # -------------------------------------------------------------------------------------------------------- contexts
    def _branches(self, sigma: float) -> tuple[Branch, ...]:
        """The branches of this step. Contexts that were made with the negative of another step are dropped."""
        negative = self.prompts.negative if self.prompts.guides else None
        uncond = None if negative is None else negative.at_sigma(sigma)
        if uncond is not self._uncond:
            self._uncond = uncond
            self._contexts = {name: context for name, context in self._contexts.items() if name == "cond"}
        return ("cond",) if uncond is None else ("cond", "uncond")

    def _target_prompt(self, branch: Branch) -> Context:
        context = self.prompts.target if branch == "cond" else self._uncond
        if context is None:
            raise RuntimeError("an unconditional model call without a negative")
        return context

    def _source_prompt(self, branch: Branch) -> Context:
        return self.prompts.source if branch == "cond" or self.shared_source else self._target_prompt(branch)

    def _pair(self, branch: Branch) -> Context:
        return self._made(
            branch, lambda: pair_context(self._source_prompt(branch), self._target_prompt(branch), self.images)
        )

    def _made(self, name: str, make: Callable[[], Context]) -> Context:
        if name not in self._contexts:
            self._contexts[name] = make()
        return self._contexts[name]
