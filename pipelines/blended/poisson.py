"""Poisson blending in float: the edit's gradients, the source's values at the border (seamless cloning, Perez 2003).

Inside the mask the result has the Laplacian of the edited image; outside it is the source, exactly. At the frame, where
there is no source to meet, nothing is fixed (Neumann). The published code goes through OpenCV's 8-bit seamlessClone,
which moves or crashes on odd sizes and masks at the frame; here any size, batch and mask works. What is inherent stays:
colours of the surroundings flow into the edit (Blended Latent Diffusion, figure 4).

With u = result - edited, the equation is L u = 0 inside and u = source - edited around it. It is solved by conjugate
gradients, preconditioned by one multigrid cycle on 2 x 2 aggregates, on the tensors' device: ten to twenty iterations
for any size and shape of mask.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.shapes import check_image, check_mask, common_batch, match_batch, same_size

log = logging.getLogger("editkit")

TOLERANCE = 1e-5  # of the estimated error, in units of image values: 1/400 of an 8-bit level
RESTARTS, ITERATIONS = 4, 50
DAMPING, SWEEPS, OVERCORRECTION = 0.8, 2, 1.5  # flat aggregates underestimate smooth errors by almost two


def blend_poisson(edited: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Clone the gradients of `edited` into `source`.

    Args:
        edited, source: IMAGE [B, H, W, 3] in [0, 1].
        mask: MASK, 1 = edit; a pixel belongs to the edit from 0.5.
    Returns: IMAGE float32, clamped to [0, 1] inside the mask. Outside it is `source` bit for bit; a mask that covers a
        whole image meets no source and keeps `edited`; an empty one returns `source`.
    Raises: ShapeError.
    """
    edited, source, inside = _inputs(edited, source, mask)
    rows, columns = _bounds(inside)
    result = source.clone()
    if rows is None or columns is None:
        return result
    window = (slice(None), rows, columns)
    offset = _solve(inside[window][:, None], (source - edited)[window].movedim(-1, 1)).movedim(1, -1)
    cloned = (edited[window] + offset).clamp(0, 1)
    result[window] = torch.where(inside[window][..., None], cloned, source[window])
    return result


def _inputs(edited: Tensor, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    edited = check_image(edited, "edited")
    source, mask = check_image(source, "source").to(edited.device), check_mask(mask, "mask").to(edited.device)
    same_size(edited, source, "edited", "source")
    same_size(edited, mask, "edited", "mask")
    batch = common_batch(edited=edited, source=source, mask=mask)
    edited, source = match_batch(edited, batch, "edited", "source"), match_batch(source, batch, "source", "edited")
    return edited, source, match_batch(mask >= 0.5, batch, "mask", "edited")


def _bounds(inside: Tensor) -> tuple[slice | None, slice | None]:
    """Rows and columns that hold every masked pixel of the batch and the ring around it."""
    spans: list[slice | None] = []
    for axis in (1, 2):
        used = inside.any(dim=0).any(dim=2 - axis).nonzero()
        spans.append(slice(max(0, int(used.min()) - 1), int(used.max()) + 2) if len(used) else None)
    return spans[0], spans[1]


# -------------------------------------------------------------------------------------------------- the equation
@dataclass(frozen=True)
class _Laplacian:
    """A graph Laplacian on a grid: weights of the links to the right, down, and to fixed values; its diagonal."""

    right: Tensor  # [B, 1, h, w - 1]
    down: Tensor  # [B, 1, h - 1, w]
    fixed: Tensor  # [B, 1, h, w]
    inverse_diagonal: Tensor  # [B, 1, h, w]; 0 where there is no unknown

    @staticmethod
    def build(right: Tensor, down: Tensor, fixed: Tensor) -> _Laplacian:
        diagonal = fixed + _spread(right, down)
        return _Laplacian(right, down, fixed, torch.where(diagonal > 0, 1 / diagonal.clamp(min=0.5), 0))

    def __call__(self, u: Tensor) -> Tensor:
        flow_right, flow_down = self.right * u.diff(dim=-1), self.down * u.diff(dim=-2)
        outflow = F.pad(flow_right, (0, 1)) - F.pad(flow_right, (1, 0))
        outflow = outflow + F.pad(flow_down, (0, 0, 0, 1)) - F.pad(flow_down, (0, 0, 1, 0))
        return self.fixed * u - outflow

    def coarse(self) -> _Laplacian:
        """The Galerkin operator on 2 x 2 aggregates: links inside an aggregate vanish, links between two add up."""
        height, width = self.fixed.shape[-2:]
        odd = (0, width % 2, 0, height % 2)
        right, down = F.pad(self.right, odd)[..., 1::2], F.pad(self.down, odd)[..., 1::2, :]
        return _Laplacian.build(
            right[..., 0::2, :] + right[..., 1::2, :], down[..., 0::2] + down[..., 1::2], _restrict(self.fixed)
        )


def _spread(right: Tensor, down: Tensor) -> Tensor:
    """Sum of the link weights of every cell."""
    across = F.pad(right, (0, 1)) + F.pad(right, (1, 0))
    return across + F.pad(down, (0, 0, 0, 1)) + F.pad(down, (0, 0, 1, 0))


def _restrict(value: Tensor) -> Tensor:
    height, width = value.shape[-2:]
    return F.avg_pool2d(F.pad(value, (0, width % 2, 0, height % 2)), 2) * 4


def _prolong(value: Tensor, height: int, width: int) -> Tensor:
    return value.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width]


def _solve(inside: Tensor, border: Tensor) -> Tensor:
    """u [B, C, h, w] with L u = 0 where `inside` [B, 1, h, w] and u = `border` at its neighbours in the frame."""
    unknown = inside.to(border.dtype)
    known = F.pad(1 - unknown, (1, 1, 1, 1))
    fixed = known[..., 1:-1, 2:] + known[..., 1:-1, :-2] + known[..., 2:, 1:-1] + known[..., :-2, 1:-1]
    links = unknown[..., :-1] * unknown[..., 1:], unknown[..., :-1, :] * unknown[..., 1:, :]
    levels = [_Laplacian.build(*links, fixed * unknown)]
    while max(levels[-1].fixed.shape[-2:]) > 1:
        levels.append(levels[-1].coarse())
    outer = F.pad(border * (1 - unknown), (1, 1, 1, 1))
    right = outer[..., 1:-1, 2:] + outer[..., 1:-1, :-2] + outer[..., 2:, 1:-1] + outer[..., :-2, 1:-1]
    return _refine(levels, right * unknown)


def _refine(levels: list[_Laplacian], right: Tensor) -> Tensor:
    """Conjugate gradients, restarted on the true residual until single precision has given what it can."""
    u = torch.zeros_like(right)
    for _ in range(RESTARTS):
        u, error = _conjugate_gradients(levels, u, right)
        if error <= TOLERANCE:
            return u
    log.warning(
        "Poisson blending stopped with an estimated error of %.1e in image values (aim: %.0e)", error, TOLERANCE
    )
    return u


def _conjugate_gradients(levels: list[_Laplacian], u: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """Each image and channel is its own system, left alone once converged; returns the error at the start."""
    residual = right - levels[0](u)
    step = _cycle(levels, residual)
    start = float(step.abs().max())
    if start <= TOLERANCE:
        return u, start
    direction, product = step, _dot(residual, step)
    for _ in range(ITERATIONS):
        active = step.abs().amax((-2, -1), keepdim=True) > TOLERANCE / 2
        if not active.any():
            break
        image = levels[0](direction)
        length = torch.where(active, product / _dot(direction, image).clamp(min=1e-30), 0)
        u, residual = u + length * direction, residual - length * image
        step = _cycle(levels, residual)
        fresh = _dot(residual, step)
        direction = torch.where(active, step + fresh / product.clamp(min=1e-30) * direction, direction)
        product = torch.where(active, fresh, product)
    return u, start


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)


def _cycle(levels: list[_Laplacian], right: Tensor) -> Tensor:
    """One V-cycle from zero, symmetric and so a preconditioner: about the solution of L u = right."""
    operator = levels[0]
    u = operator.inverse_diagonal * right
    if len(levels) == 1:
        return u
    u = DAMPING * u
    for _ in range(SWEEPS - 1):
        u = u + DAMPING * operator.inverse_diagonal * (right - operator(u))
    coarse = _cycle(levels[1:], _restrict(right - operator(u)))
    u = u + OVERCORRECTION * _prolong(coarse, *u.shape[-2:])
    for _ in range(SWEEPS):
        u = u + DAMPING * operator.inverse_diagonal * (right - operator(u))
    return u
