"""LATENTs that stay on the compute device between our nodes, and look like any other LATENT to native ones.

A noised latent follows the host's convention for leftover noise: samples = scale_out(z / signal(sigma)), where signal
is 1 for eps and v models and 1 - sigma for flow models.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any

import torch
from torch import Tensor

from ..pipelines.core.errors import MismatchError, ParameterError, ShapeError
from ..pipelines.core.shapes import check_latent, padded_length
from .sockets import held, intermediate_device

log = logging.getLogger("editkit")
SAMPLES = "samples"


class Held:
    """One latent tensor on the compute device and the ways to read it; immutable.

    Attributes:
        shape: [B, C, h, w].
        sigma: its noise level; 0 = clean.
        denoiser_fingerprint: of the model that made it; None for a clean, unscaled one.
    """

    def __init__(self, tensor: Tensor, sigma: float = 0.0, levels: Any = None) -> None:
        self.shape, self.sigma = tensor.shape, sigma
        self.denoiser_fingerprint: str | None = None if levels is None else levels.fingerprint
        self._levels = levels
        self._get: Callable[[], Tensor] = held(tensor)
        self._native: Tensor | None = None

    def z(self) -> Tensor | None:
        """Model-scaled, on the device; None where it was made without a model."""
        return None if self._levels is None else self._get()

    def samples(self) -> Tensor:
        """Unscaled, on the device."""
        tensor = self._get()
        if self._levels is None:
            return tensor
        signal = _signal(self._levels, self.sigma, tensor.device)
        return self._levels.scale_out(tensor if signal in (0, 1) else tensor / signal)

    def native(self) -> Tensor:
        """Unscaled, where the host keeps tensors between nodes; made when first asked for."""
        if self._native is None:
            if self._levels is not None and self._levels.flow and self.sigma >= 1:
                log.warning("a flow model's latent at level 1 is pure noise, which native nodes cannot take up again")
            self._native = self.samples().to(intermediate_device())
        return self._native

    def copied(self) -> Held:
        return Held(self._get().clone(), self.sigma, self._levels)


def _signal(levels: Any, sigma: float, device: torch.device) -> float:
    """The factor of the clean latent at a level; 0 at pure noise of a flow model, which no LATENT can hold unscaled."""
    one = torch.ones(1, device=device)
    return float(levels.noise(one, torch.zeros_like(one), sigma)) if levels.flow else 1.0


class DeviceLatent(dict):
    """A LATENT over a `Held`. Reading "samples", in whatever way a dict can be read, gives a tensor of the host's.

    Writing "samples" makes it an ordinary LATENT.
    """

    def __init__(self, rest: Mapping[str, Any], tensor: Held) -> None:
        super().__init__({key: rest[key] for key in rest if key != SAMPLES})
        super().__setitem__(SAMPLES, None)  # so that len, in and keys need nothing special
        self.held: Held | None = tensor

    @property
    def z(self) -> Tensor | None:
        """Model-scaled tensor on the compute device; None once "samples" was overwritten."""
        return None if self.held is None else self.held.z()

    @property
    def sigma(self) -> float | None:
        return None if self.held is None else self.held.sigma

    @property
    def denoiser_fingerprint(self) -> str | None:
        return None if self.held is None else self.held.denoiser_fingerprint

    def __getitem__(self, key: str) -> Any:
        if key == SAMPLES and self.held is not None:
            return self.held.native()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (it is what get is made of)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def items(self) -> ItemsView:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView:  # type: ignore[override]
        return ValuesView(self)

    def __iter__(self) -> Iterator[str]:
        # dict(d), {**d} and f(**d) read the storage itself unless iteration is overridden
        return super().__iter__()

    def __setitem__(self, key: str, value: Any) -> None:
        if key == SAMPLES:
            self.held = None
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        if key == SAMPLES:
            self.held = None

    def update(self, *others: Any, **named: Any) -> None:
        for key, value in dict(*others, **named).items():
            self[key] = value

    def __ior__(self, other: Any) -> DeviceLatent:
        self.update(other)
        return self

    def __or__(self, other: Any) -> dict:
        return {**self, **other}

    def __ror__(self, other: Any) -> dict:
        return {**other, **self}

    def pop(self, key: str, *default: Any) -> Any:
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        key = next(reversed(self.keys()))
        return key, self.pop(key)

    def clear(self) -> None:
        super().clear()
        self.held = None

    def copy(self) -> dict:
        """A copy that shares the tensor, as dict.copy does."""
        return {**self} if self.held is None else DeviceLatent(self, self.held)

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> dict:
        rest = copy.deepcopy({key: self[key] for key in self if key != SAMPLES}, memo)
        if self.held is not None:
            return DeviceLatent(rest, self.held.copied())
        return copy.deepcopy({**self}, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return dict, ({**self},)

    def __repr__(self) -> str:
        if self.held is None:
            return f"DeviceLatent({ {**self} })"
        return f"DeviceLatent(shape={list(self.held.shape)}, sigma={self.held.sigma:.4g}, keys={list(self)})"


def _rest(like: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The other entries of a LATENT; indices of another batch would number the wrong images."""
    rest = {key: like[key] for key in like if key != SAMPLES}
    if len(rest.get("batch_index", range(batch))) != batch:
        del rest["batch_index"]
    return rest


def samples(latent: Mapping[str, Any]) -> Tensor:
    """The unscaled tensor of a LATENT, where it lies. Raises ShapeError for something else."""
    if not isinstance(latent, Mapping) or SAMPLES not in latent:
        raise ShapeError(f"latent is a {type(latent).__name__} without samples: connect a LATENT")
    tensor = getattr(latent, "held", None)
    return latent[SAMPLES] if tensor is None else tensor.samples()


def unnoised_samples(latent: Mapping[str, Any], socket: str) -> Tensor:
    """The unscaled tensor [B, C, h, w] of a LATENT that must hold a picture, not a noised one.

    Raises: ShapeError; MismatchError where the LATENT is known to lie above level 0.
    """
    tensor: Held | None = getattr(latent, "held", None)
    if tensor is not None and tensor.sigma > 0:
        raise MismatchError(
            f"{socket} lies at noise level {tensor.sigma:.4g} but a clean picture is needed: connect the encoded picture"
        )
    return check_latent(samples(latent), socket)


def latent_out(z: Tensor, denoiser: Any, sigma: float, like: Mapping[str, Any]) -> DeviceLatent:
    """A LATENT of `z` (model scale, level `sigma`), with the other entries of `like`; nothing is copied to the host."""
    detached = getattr(denoiser, "without_weights", None)
    levels = denoiser if detached is None else detached()
    return DeviceLatent(_rest(like, z.shape[0]), Held(z, float(sigma), levels))


def finished_out(clean: Tensor, like: Mapping[str, Any]) -> DeviceLatent:
    """A LATENT of a clean, unscaled tensor."""
    return DeviceLatent(_rest(like, clean.shape[0]), Held(clean))


def reordered(latent: Mapping[str, Any], ranking: Any) -> DeviceLatent:
    """A clean LATENT in the order of a `Ranking`, with what belongs to its images (noise masks, batch indices)."""
    rest = {key: latent[key] for key in latent if key not in (SAMPLES, "batch_index")}
    mask = rest.get("noise_mask")
    if isinstance(mask, Tensor) and len(mask) == ranking.count > 1:
        rest["noise_mask"] = ranking.apply(mask)
    index = latent.get("batch_index")
    if index is not None and len(index) == ranking.count:
        rest["batch_index"] = [index[i] for i in ranking.order.tolist()]
    return DeviceLatent(rest, Held(ranking.apply(samples(latent))))


def latent_in(latent: Mapping[str, Any], denoiser: Any, sigma: float) -> Tensor:
    """Model-scaled z [B, C, h, w] of a LATENT that lies at level `sigma`.

    A LATENT that the same model left on the device comes back bit for bit; any other is scaled in.
    Raises: MismatchError where the LATENT is known to lie at another level.
    """
    tensor: Held | None = getattr(latent, "held", None)
    if tensor is not None:
        if abs(tensor.sigma - sigma) > 1e-4 * max(tensor.sigma, sigma):
            raise MismatchError(
                f"latent lies at noise level {tensor.sigma:.4g} but this step starts at {sigma:.4g}: "
                "use the same sigmas, and start where the step before ended"
            )
        if tensor.denoiser_fingerprint == denoiser.fingerprint:
            return tensor.z().to(denoiser.device)  # type: ignore[union-attr]
    if denoiser.flow and sigma >= 1:
        raise MismatchError(
            "a flow model's latent at level 1 is pure noise: take it from 'Noise latent' with this MODEL"
        )
    clean = denoiser.scale_in(samples(latent))
    return denoiser.noise(clean, torch.zeros_like(clean), sigma) if denoiser.flow else clean


def to_host(tensor: Tensor) -> Tensor:
    """A tensor for a native socket, where the host expects it."""
    return tensor.to(intermediate_device())


def latent_grid(mask: Tensor, latent: Mapping[str, Any] | None, codec: Any | None) -> tuple[int, int, int | None]:
    """Cells and pixels per cell (height, width, factor) of the latent grid that a pixel mask [B, H, W] belongs on.

    From the LATENT where there is one, else from the mask's size and the codec's factor; factor None = not known.
    """
    factor = None if codec is None else int(codec.factor)
    if latent is not None:
        tensor = getattr(latent, "held", None)
        shape = samples(latent).shape if tensor is None else tensor.shape
        return shape[-2], shape[-1], latent.get("editkit_factor", factor)
    if factor is None:
        raise ParameterError("the size of the latent grid is not known: connect latent or vae")
    return padded_length(mask.shape[1], factor) // factor, padded_length(mask.shape[2], factor) // factor, factor


def image_size(latent: Mapping[str, Any], codec: Any | None) -> tuple[int, int, int]:
    """Pixels per cell, height and width of the picture that a LATENT [B, C, h, w] was encoded from.

    Raises: ParameterError where neither the LATENT nor a codec tells the pixels of a cell.
    """
    height, width, factor = latent_grid(torch.zeros(1, 1, 1), latent, codec)
    if factor is None:
        raise ParameterError(
            "latent does not say how many pixels a cell has: connect vae, or encode with 'Encode picture, any size'"
        )
    return factor, *latent.get("editkit_size", (height * factor, width * factor))
