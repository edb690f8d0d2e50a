"""Poisson blending in float32: gradients of the edit, border values of the source (seamless cloning, Perez et al. 2003).

Inside the mask the result has the Laplacian of the edited image; outside it is the source, exactly. At the frame of the
image, where there is no source to meet, nothing is fixed (Neumann condition). The published code calls OpenCV's 8-bit
seamlessClone, which moves the edit or crashes on odd sizes and on masks at the frame; here any size, batch and mask
works. Poisson blending lets the colours of the surroundings flow into the edit (Blended Latent Diffusion, figure 4).

With u = result - edited, the equation is L u = 0 inside the mask and u = source - edited around it. Conjugate gradients
solve it on the device of the tensors. The multilevel preconditioner of Bramble, Pasciak and Xu (1990) keeps the number
of iterations near twenty for any size and shape of mask.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.shapes import check_image, check_mask, common_batch, match_batch, same_size

log = logging.getLogger("editkit")

TOLERANCE = 1e-5  # of the estimated error, in units of image values: 1/400 of an 8-bit level
RESTARTS = 4
ITERATIONS = 100
COARSE_DIAGONAL = 1.1  # of the Laplacian of a quadratic B-spline, on every grid: 2 * integral(b'^2) * integral(b^2)


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
    result = source.clone()
    if not inside.any():
        return result
    window = _window(inside)
    offset = _solve(inside[window][:, None], (source - edited)[window].movedim(-1, 1)).movedim(1, -1)
    cloned = (edited[window] + offset).clamp(0, 1)
    result[window] = torch.where(inside[window][..., None], cloned, source[window])
    return result


def _inputs(edited: Tensor, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    edited = check_image(edited, "edited")
    source = check_image(source, "source").to(edited.device)
    mask = check_mask(mask, "mask").to(edited.device)
    same_size(edited, source, "edited", "source")
    same_size(edited, mask, "edited", "mask")
    batch = common_batch(edited=edited, source=source, mask=mask)
    edited = match_batch(edited, batch, "edited", "source")
    source = match_batch(source, batch, "source", "edited")
    return edited, source, match_batch(mask >= 0.5, batch, "mask", "edited")


def _window(inside: Tensor) -> tuple[slice, slice, slice]:
    """The part of the batch [B, H, W] that holds every masked pixel and the ring around it."""
    rows = inside.any(dim=2).any(dim=0).nonzero()
    columns = inside.any(dim=1).any(dim=0).nonzero()
    return (slice(None), _with_ring(rows), _with_ring(columns))


def _with_ring(used: Tensor) -> slice:
    return slice(max(0, int(used.min()) - 1), int(used.max()) + 2)


# -------------------------------------------------------------------------------------------------- the equation
def _solve(inside: Tensor, border: Tensor) -> Tensor:
    """u [B, C, h, w] with L u = 0 where `inside` [B, 1, h, w] and u = `border` around it.

    Conjugate gradients are restarted on the true residual until the error is as small as single precision allows.
    """
    laplacian = _Laplacian(inside.to(border.dtype))
    right = laplacian.unknown * _neighbours(border * (1 - laplacian.unknown))
    u = torch.zeros_like(right)
    for _ in range(RESTARTS):
        u, error = _conjugate_gradients(laplacian, u, right)
        if error <= TOLERANCE:
            return u
    log.warning(
        "Poisson blending stopped with an estimated error of %.1e in image values (aim: %.0e)", error, TOLERANCE
    )
    return u


def _neighbours(u: Tensor) -> Tensor:
    """Sum of the four neighbours of every pixel; 0 beyond the frame."""
    u = F.pad(u, (1, 1, 1, 1))
    return u[..., 1:-1, 2:] + u[..., 1:-1, :-2] + u[..., 2:, 1:-1] + u[..., :-2, 1:-1]


class _Laplacian:
    """The five-point Laplacian of the masked pixels, and its preconditioner."""

    def __init__(self, unknown: Tensor) -> None:
        """`unknown` [B, 1, h, w] is 1 in the mask and 0 where the values are fixed."""
        self.unknown = unknown
        self.degree = _neighbours(torch.ones_like(unknown))
        fixed = unknown * _neighbours(1 - unknown)
        self.inverse_diagonals = [1 / self.degree.clamp(min=1)]
        while max(fixed.shape[-2:]) > 1:
            fixed = _restrict(fixed)
            self.inverse_diagonals.append(1 / (COARSE_DIAGONAL + fixed))

    def __call__(self, u: Tensor) -> Tensor:
        return self.unknown * (self.degree * u - _neighbours(u))

    def precondition(self, residual: Tensor) -> Tensor:
        """An estimate of the error behind `residual`: on every grid, the residual over the operator's diagonal."""
        return self.unknown * self._all_grids(residual, 0)

    def _all_grids(self, residual: Tensor, grid: int) -> Tensor:
        error = self.inverse_diagonals[grid] * residual
        if grid + 1 < len(self.inverse_diagonals):
            coarse = self._all_grids(_restrict(residual), grid + 1)
            error = error + _prolong(coarse, *residual.shape[-2:])
        return error


def _prolong(coarse: Tensor, height: int, width: int) -> Tensor:
    """The quadratic spline with these coefficients on a grid twice as fine."""
    return _smooth(coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width])


def _restrict(fine: Tensor) -> Tensor:
    """The transpose of `_prolong`, as conjugate gradients need it."""
    height, width = fine.shape[-2:]
    return 4 * F.avg_pool2d(F.pad(_smooth(fine), (0, width % 2, 0, height % 2)), 2)


def _smooth(u: Tensor) -> Tensor:
    """Weights 1/4, 1/2, 1/4 along both axes; the frame is repeated."""
    return F.avg_pool2d(F.avg_pool2d(F.pad(u, (1, 1, 1, 1), mode="replicate"), 2, stride=1), 2, stride=1)


def _conjugate_gradients(laplacian: _Laplacian, u: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """Solve from `u`; returns the solution and the estimated error of the start.

    Each channel of each image is a system by itself and is frozen once it has converged.
    """
    residual = right - laplacian(u)
    error = laplacian.precondition(residual)
    start = float(error.abs().max())
    if start <= TOLERANCE:
        return u, start
    direction = error
    product = _dot(residual, error)
    for _ in range(ITERATIONS):
        active = error.abs().amax((-2, -1), keepdim=True) > TOLERANCE / 2
        if not active.any():
            break
        image = laplacian(direction)
        length = torch.where(active, product / _dot(direction, image).clamp(min=1e-30), 0)
        u = u + length * direction
        residual = residual - length * image
        error = laplacian.precondition(residual)
        new_product = _dot(residual, error)
        direction = torch.where(active, error + new_product / product.clamp(min=1e-30) * direction, direction)
        product = torch.where(active, new_product, product)
    return u, start


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)
