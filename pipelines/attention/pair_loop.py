"""Editing beside the source: the loop of Prompt-to-Prompt, P2Plus, MasaCtrl and Plug-and-Play (methods.md, 7, 8, 11.6, 11.7).

A real picture's source is put back from its trajectory at every step, and evaluated only in the branches that the control
reads: 3 rows per step and image while that is one branch, 4 while it is both, 2 when nothing is read any more. From noise
the source samples itself, which takes 4 rows throughout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """What source and target are denoised towards; contexts of one row, or one per image."""

    source: Context
    target: Context
    negative: Negative | None
    guidance_scale: float

    def __post_init__(self) -> None:
        check_guidance(self.negative, self.guidance_scale)

    @property
    def guides(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.negative is not None and self.negative.guides(self.guidance_scale)


@dataclass(frozen=True)
class PairResult:
    """Latents at the end of the grid, model scale, [B, C, h, w]; from a trajectory, `source` is its own source."""

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
    """Prompt-to-Prompt or P2Plus. See `pair_edit`; null-text and negative-prompt embeddings stand where a negative does."""
    prompts = PairPrompts(edit.source, edit.target, negative, guidance_scale)
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
    """Sample the target with its source beside it, deterministically.

    Args:
        control: made for this run's grid; gates are counted on the whole of it, also where the run starts later.
        start: the inverted picture; or a latent [B, C, h, w] at the first level, model scale, that both begin with.
        sigmas: the grid for a latent; None = the control's own, or its last part. A trajectory brings its own.
    Raises: MismatchError, ShapeError, ParameterError, FamilyError (no attention layers that can be controlled).
    """
    path = start if isinstance(start, Trajectory) else None
    grid = check_sigmas(control.sigmas if sigmas is None and path is None else _grid(start, sigmas))
    check_grid(control.sigmas, grid, "attention control")
    if path is not None:
        path.check(denoiser)
        if path.prompt != context_digest(prompts.source):
            log.warning("the trajectory was made with another prompt than the source prompt of this edit")
        grid = grid[path.first :]
    if prompts.negative is not None:
        prompts.negative.check(denoiser, grid)
    latents = start.latents[0] if isinstance(start, Trajectory) else start.to(denoiser.device, torch.float32)
    images = common_batch(latent=latents, source=prompts.source.tokens, target=prompts.target.tokens)
    source = target = match_batch(latents, images, "latent", "prompts")
    path = None if path is None else path.expanded(images).to(target.device)
    run, levels = _Run(denoiser, prompts, control, images), grid.tolist()
    first = control.steps + 1 - len(levels)
    control.reset()
    try:
        for i, (sigma, level) in enumerate(zip(levels, levels[1:], strict=False)):
            if path is None:
                source, clean = run.both(source, target, sigma, level, first + i)
            else:
                source, clean = path.latents[i + 1], run.beside(path.latents[i], target, sigma, first + i)
            target = control.blend(source, euler_step(target, clean, sigma, level), first + i)
            progress(i + 1, len(levels) - 1, clean)
    finally:
        control.reset()
    return PairResult(source, target)


def _grid(start: Trajectory | Tensor, sigmas: Tensor | None) -> Tensor:
    if isinstance(start, Trajectory):
        if sigmas is not None:
            check_grid(start.sigmas, sigmas, "trajectory")
        return start.sigmas
    if sigmas is None:
        raise ParameterError("sigmas are missing: a start from noise needs them, a trajectory brings its own")
    return sigmas


class _Run:
    """Model calls of one run: which rows a step needs, and in what arrangement."""

    def __init__(self, denoiser: Denoiser, prompts: PairPrompts, control: PairControl, images: int) -> None:
        self.denoiser, self.prompts, self.control, self.images = denoiser, prompts, control, images
        self._uncond: Context | None = None
        self._made: dict[str, Context] = {}

    def both(self, source: Tensor, target: Tensor, sigma: float, level: float, step: int) -> tuple[Tensor, Tensor]:
        """The source one step on, by its own guidance, and the target's clean prediction."""
        uncond = self._negative(sigma)
        contexts = [self._pair("cond"), *([] if uncond is None else [self._pair("uncond")])]
        out = self._denoise(interleave(source, target), sigma, contexts, self._pairs(uncond), step)
        sources, targets = zip(*(separate(rows) for rows in out), strict=True)
        source_clean = self._guided(source, sigma, sources, self.prompts.source)
        return euler_step(source, source_clean, sigma, level), self._guided(target, sigma, targets, self.prompts.target)

    def beside(self, source: Tensor, target: Tensor, sigma: float, step: int) -> Tensor:
        """The target's clean prediction, with the source in as many rows as the control reads."""
        uncond = self._negative(sigma)
        branches: tuple[Branch, ...] = ("cond",) if uncond is None else ("cond", "uncond")
        needed = [branch for branch in branches if branch in self.control.needs(step)]
        out: Sequence[Tensor]
        if not needed:
            contexts = [self.prompts.target, *([] if uncond is None else [uncond])]
            out = tuple(self._denoise(target, sigma, contexts, single_rows(self.images, branches), step))
        elif len(needed) == len(branches):
            contexts = [self._pair(branch) for branch in branches]
            rows = self._denoise(interleave(source, target), sigma, contexts, self._pairs(uncond), step)
            out = [separate(part)[1] for part in rows]
        else:
            out = self._one_branch(source, target, sigma, needed[0], step)
        return self._guided(target, sigma, out, self.prompts.target)

    def _one_branch(self, source: Tensor, target: Tensor, sigma: float, shared: Branch, step: int) -> Sequence[Tensor]:
        """Both branches of the target, and the source in one of them."""
        uncond, prompts = self._uncond, self.prompts
        if uncond is None:
            raise RuntimeError("one branch of two without a negative")
        own = prompts.source if shared == "cond" else uncond
        if mergeable(own, prompts.target, uncond):
            trio = self._kept(f"trio {shared}", lambda: trio_context(own, prompts.target, uncond, self.images))
            z = interleave(source, target, target)
            out = self._denoise(z, sigma, [trio], trio_rows(self.images, shared), step)[0]
            return separate(out, 3)[1:]
        z = interleave(source, target)
        if self.control.shared_source:
            # the host keeps the prompts apart, so the source travels with each of them
            second = self._kept("shared", lambda: pair_context(prompts.source, uncond, self.images))
            rows = self._denoise(z, sigma, [self._pair("cond"), second], self._pairs(uncond), step)
            return [separate(part)[1] for part in rows]
        pair = separate(self._denoise(z, sigma, [self._pair(shared)], pair_rows(self.images, (shared,)), step)[0])[1]
        other: Branch = "uncond" if shared == "cond" else "cond"
        alone = uncond if other == "uncond" else prompts.target
        single = self._denoise(target, sigma, [alone], single_rows(self.images, (other,)), step)[0]
        return [pair, single] if shared == "cond" else [single, pair]

    # -------------------------------------------------------------------------------------------------------- one call
    def _denoise(self, z: Tensor, sigma: float, contexts: Sequence[Context], rows: RowMap, step: int) -> Tensor:
        controlled = Controlled(self.control, rows) if self.control.active(step) else None
        return self.denoiser.denoise(z, sigma, contexts, controlled)

    def _guided(self, z: Tensor, sigma: float, out: Sequence[Tensor], positive: Context) -> Tensor:
        negative, scale = self.prompts.negative, self.prompts.guidance_scale
        if negative is None or self._uncond is None:
            return self.denoiser.combine(z, sigma, out[0], out[0], 1.0, [positive])
        return negative.combine(self.denoiser, z, sigma, out[0], out[1], scale, [positive, self._uncond])

    # -------------------------------------------------------------------------------------------------------- contexts
    def _negative(self, sigma: float) -> Context | None:
        """The negative in force; what was made of another one is forgotten."""
        negative = self.prompts.negative if self.prompts.guides else None
        uncond = None if negative is None else negative.at_sigma(sigma)
        if uncond is not self._uncond:
            self._uncond = uncond
            self._made = {name: context for name, context in self._made.items() if name == "cond"}
        return uncond

    def _pair(self, branch: Branch) -> Context:
        source, target = (
            (self.prompts.source, self.prompts.target) if branch == "cond" else (self._uncond, self._uncond)
        )
        if source is None or target is None:
            raise RuntimeError("an unconditional pair without a negative")
        return self._kept(branch, lambda: pair_context(source, target, self.images))

    def _kept(self, name: str, make: Callable[[], Context]) -> Context:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _pairs(self, uncond: Context | None) -> RowMap:
        return pair_rows(self.images, ("cond",) if uncond is None else ("cond", "uncond"))
