"""Negative-prompt inversion (NPI): the source prompt as negative (Miyake et al. 2023; docs/methods.md, section 11.4).

Null-text inversion learns its unconditional embeddings; NPI takes the source prompt instead. ProxNPI adds a proximal step
to guidance (Han et al. 2024; section 11.5).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.protocols import Context, Denoiser
from ..core.trajectory import Trajectory
from .negative_embeddings import Embeddings
from .proximal import Proximal


def negative_prompt(
    denoiser: Denoiser,
    trajectory: Trajectory,
    source: Context,
    *,
    null: Context | None = None,
    interpolation: float = 0.0,
    proximal: Proximal | None = None,
) -> Embeddings:
    """Use the source prompt as negative prompt. Nothing is learned and no forward pass is needed.

    With the source prompt as positive too, CFG cancels out at any scale, and sampling equals the unguided inversion.

    Args:
        denoiser: the model that made the trajectory.
        trajectory: the inversion.
        source: the prompt of the inversion, [1 or B, T, D].
        null: the empty prompt, [1 or B, T, D]; needed for an interpolation above 0.
        interpolation: from the source prompt (0) to `null` (1) along a great circle (`npi_interp` in the published
            code); SDXL's pooled vector moves with the tokens.
        proximal: the proximal step of ProxNPI; None = plain NPI.
    Returns: embeddings that serve every step.
    Raises: MismatchError for another model or prompt than the trajectory's; ParameterError; ShapeError.
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
        base = _between(source, null, interpolation)
    return Embeddings(
        base,
        None,
        trajectory.sigmas,
        trajectory.family,
        trajectory.fingerprint,
        trajectory.prompt,
        proximal=proximal,
        trajectory=trajectory if proximal is not None and proximal.inversion_guidance > 0 else None,
    )


def _between(source: Context, null: Context, share: float) -> Context:
    """`source` with tokens and pooled vector moved towards `null`; share 1 is the empty prompt's."""
    pooled = source.pooled
    if pooled is not None and null.pooled is not None:
        pooled = slerp(pooled[:, None], null.pooled[:, None], share)[:, 0]
    return replace(source, tokens=slerp(source.tokens, null.tokens, share), pooled=pooled)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation from `a` (share 0) to `b` (share 1), [R, T, D] each; linear for parallel entries."""
    if a.shape[1:] != b.shape[1:]:
        raise ShapeError(f"embeddings are {list(a.shape)} and {list(b.shape)}: both prompts need the same token count")
    b = b.to(a)
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().view(-1, 1, 1)
    sine = angle.sin()
    curved = ((1 - share) * angle).sin() / sine * a + (share * angle).sin() / sine * b
    return torch.where(sine.abs() > 1e-4, curved, torch.lerp(a, b, share))


__all__ = ["negative_prompt", "slerp"]
