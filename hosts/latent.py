"""LATENTs that stay on the compute device between our nodes and look like any other LATENT to native nodes.

A noised latent follows ComfyUI's convention for leftover noise: samples = scale_out(z / signal(sigma)). The signal is 1
for eps and v models and 1 - sigma for flow models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pipelines.blended.candidates import Candidates
from ..pipelines.core.errors import MismatchError, ParameterError, ShapeError
from ..pipelines.core.shapes import Sources, check_latent, checked_sources, padded_length, refuse_nan
from .host import intermediate_device, keep_on_device

log = logging.getLogger("editkit")
SAMPLES = "samples"
SOURCES = "editkit_source"  # for every candidate the index of its source image
IMAGES = "editkit_images"  # the number of source images
SEED = "editkit_seed"  # the seed of the noise in a noised LATENT


class DeviceTensor:
    """One latent tensor on the compute device, and the ways to read it; immutable.

    Attributes:
        shape: [B, C, h, w].
        sigma: 0 = noise-free.
        denoiser_fingerprint: of the model that made it; None for a noise-free, unscaled latent.
    """

    def __init__(self, tensor: Tensor, sigma: float = 0.0, sampling: Any = None) -> None:
        self.shape = tensor.shape
        self.sigma = sigma
        self.denoiser_fingerprint: str | None = None if sampling is None else sampling.fingerprint
        self._sampling = sampling
        self._get: Callable[[], Tensor] = keep_on_device(tensor)
        self._on_host: Tensor | None = None

    def z(self) -> Tensor | None:
        """Model-scaled, on the device; None for a latent that was made without a model."""
        return None if self._sampling is None else self._get()

    def samples(self) -> Tensor:
        """Unscaled, on the device."""
        tensor = self._get()
        if self._sampling is None:
            return tensor
        signal = _signal(self._sampling, self.sigma, tensor.device)
        return self._sampling.scale_out(tensor if signal in (0, 1) else tensor / signal)

    def on_host(self) -> Tensor:
        """Unscaled, where the host keeps tensors between nodes; copied at the first call."""
        if self._on_host is None:
            if self._sampling is not None and self._sampling.flow and self.sigma >= 1:
                log.warning("a flow model's latent at sigma 1 is pure noise, which native nodes cannot continue from")
            self._on_host = self.samples().to(intermediate_device())
        return self._on_host

    def __repr__(self) -> str:
        return f"DeviceTensor(shape={list(self.shape)}, sigma={self.sigma:.4g})"


def _signal(sampling: Any, sigma: float, device: torch.device) -> float:
    """The factor of the clean latent at `sigma`; 0 at pure noise of a flow model, which no LATENT can hold unscaled."""
    one = torch.ones(1, device=device)
    return float(sampling.noise(one, torch.zeros_like(one), sigma)) if sampling.flow else 1.0


if TYPE_CHECKING:
    _ReadByItem = dict[str, Any]
else:

    class _ReadByItem(MutableMapping, dict):
        """A dict of which every method reads through `__getitem__`: those of `dict` itself do not.

        CPython reads `{**d}`, `dict(d)` and `f(**d)` through `__getitem__` too, because `__iter__` is overridden.
        """

        def __iter__(self):
            return dict.__iter__(self)

        __getitem__ = dict.__getitem__
        __setitem__ = dict.__setitem__
        __delitem__ = dict.__delitem__
        __len__ = dict.__len__
        __contains__ = dict.__contains__
        __reversed__ = dict.__reversed__
        __ne__ = object.__ne__
        clear = dict.clear

        def popitem(self):
            if not self:
                raise KeyError("popitem(): dictionary is empty")
            key = next(reversed(self))
            return key, self.pop(key)


class DeviceLatent(_ReadByItem):
    """A LATENT whose "samples" may lie on the compute device; a `dict`, as the nodes of other packs expect.

    It stores a `DeviceTensor` under "samples". Every reading gives an ordinary tensor on the host's intermediate device.
    Writing "samples" replaces the `DeviceTensor`, as in any dict. Copies share the `DeviceTensor`; deep copies and
    pickles are ordinary dicts.
    """

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        return value.on_host() if isinstance(value, DeviceTensor) else value

    def copy(self) -> DeviceLatent:
        return DeviceLatent(dict.items(self))

    __copy__ = copy

    def __or__(self, other: Any) -> Any:
        return DeviceLatent([*dict.items(self), *other.items()]) if isinstance(other, Mapping) else NotImplemented

    def __reduce__(self) -> tuple:
        return dict, ({**self},)

    @property
    def device_tensor(self) -> DeviceTensor | None:
        """None once "samples" was overwritten."""
        value = dict.get(self, SAMPLES)
        return value if isinstance(value, DeviceTensor) else None

    @property
    def z(self) -> Tensor | None:
        """The model-scaled tensor on the compute device; None once "samples" was overwritten."""
        return None if self.device_tensor is None else self.device_tensor.z()


def _device_tensor(latent: Mapping[str, Any]) -> DeviceTensor | None:
    return latent.device_tensor if isinstance(latent, DeviceLatent) else None


def _device_latent(tensor: DeviceTensor, like: Mapping[str, Any]) -> DeviceLatent:
    """A LATENT with the other entries of `like`. Indices of another batch would number the wrong images."""
    rest = {key: like[key] for key in like if key != SAMPLES}
    batch = tensor.shape[0]
    if len(rest.get("batch_index", range(batch))) != batch:
        del rest["batch_index"]
    return DeviceLatent({SAMPLES: tensor, **rest})


def samples_of(latent: Mapping[str, Any]) -> Tensor:
    """The unscaled tensor of a LATENT, on the device where it lies. Raises ShapeError for something else."""
    if not isinstance(latent, Mapping) or SAMPLES not in latent:
        raise ShapeError(f"latent is a {type(latent).__name__} without samples: connect a LATENT")
    tensor = _device_tensor(latent)
    return latent[SAMPLES] if tensor is None else tensor.samples()


def unnoised_samples(latent: Mapping[str, Any], socket: str) -> Tensor:
    """The unscaled tensor [B, C, h, w] of a LATENT that must hold an image without noise.

    Raises: ShapeError; MismatchError for a LATENT that is known to have a sigma above 0.
    """
    tensor = _device_tensor(latent)
    if tensor is not None and tensor.sigma > 0:
        raise MismatchError(
            f"{socket} has sigma {tensor.sigma:.4g} but a latent without noise is needed: connect the encoded image"
        )
    return check_latent(samples_of(latent), socket)


def latent_out(z: Tensor, denoiser: Any, sigma: float, like: Mapping[str, Any]) -> DeviceLatent:
    """A LATENT of a noised tensor; nothing is copied to the host.

    Args:
        z: model-scaled [B, C, h, w].
        denoiser: the denoiser that made `z`, or its `sampling_of`.
        sigma: of `z`, 0 or above.
        like: a LATENT whose other entries the result inherits.
    Returns: a LATENT that reads as `z` unscaled, and for EditKit's own nodes as `z` itself.
    Raises: ShapeError for NaN or infinity in `z`.
    """
    refuse_nan(z, "the result")
    without_weights = getattr(denoiser, "without_weights", None)
    sampling = denoiser if without_weights is None else without_weights()
    return _device_latent(DeviceTensor(z, float(sigma), sampling), like)


def finished_out(latent: Tensor, like: Mapping[str, Any]) -> DeviceLatent:
    """A LATENT of a noise-free, unscaled tensor [B, C, h, w], with the other entries of `like` but the seed of its noise.

    Raises: ShapeError for NaN or infinity: a model overflowed.
    """
    refuse_nan(latent, "the result")
    return _device_latent(DeviceTensor(latent), {key: like[key] for key in like if key not in (SAMPLES, SEED)})


def candidates_out(found: Candidates, denoiser: Any, sigma: float, seed: int, like: Mapping[str, Any]) -> DeviceLatent:
    """A LATENT of noised candidates, which carries the sources of its entries and the seed of their noise.

    Args:
        found: the candidates at `sigma`.
        denoiser: the denoiser that made them, or its `sampling_of`.
        sigma: of the candidates, 0 or above.
        seed: that their noise was made from.
        like: a LATENT whose other entries the result inherits; its batch indices give way to those of `found`.
    Returns: a LATENT [images x copies, C, h, w].
    """
    rest = {key: like[key] for key in like if key not in (SAMPLES, "batch_index")}
    if found.batch_index is not None:
        rest["batch_index"] = found.batch_index
    return latent_out(
        found.z, denoiser, sigma, like={**rest, SOURCES: found.sources.index, IMAGES: found.sources.images, SEED: seed}
    )


def noise_seed(latent: Mapping[str, Any], seed: int) -> int:
    """The seed of the noise in a LATENT from 'Noise Latent to Sigma'; `seed` for any other LATENT."""
    return int(latent.get(SEED, seed))


def sources_of(latent: Mapping[str, Any], socket: str) -> Sources | None:
    """The sources of a LATENT's candidates; None if it carries none.

    Raises: ShapeError where a node changed the batch after 'Noise Latent to Sigma'.
    """
    tensor, index = _device_tensor(latent), latent.get(SOURCES)
    if not index:
        return None
    batch = (samples_of(latent) if tensor is None else tensor).shape[0]
    return checked_sources(Sources(list(index), latent.get(IMAGES, max(index) + 1)), batch, socket)


def without_sources(latent: Mapping[str, Any]) -> dict[str, Any]:
    """The other entries of a LATENT that becomes the source of new edits itself."""
    return {key: latent[key] for key in latent if key not in (SAMPLES, SOURCES, IMAGES, SEED)}


def reordered(latent: Mapping[str, Any], ranking: Any) -> DeviceLatent:
    """A noise-free LATENT in the order of a `Ranking`, with the noise masks, batch indices and sources of its images."""
    rest = {key: latent[key] for key in latent if key not in (SAMPLES, "batch_index")}
    mask = rest.get("noise_mask")
    if isinstance(mask, Tensor) and len(mask) == ranking.count > 1:
        rest["noise_mask"] = ranking.apply(mask)
    for key in ("batch_index", SOURCES):
        index = latent.get(key)
        if index is not None and len(index) == ranking.count:
            rest[key] = [index[i] for i in ranking.order.tolist()]
    return DeviceLatent({SAMPLES: DeviceTensor(ranking.apply(samples_of(latent))), **rest})


def latent_in(latent: Mapping[str, Any], denoiser: Any, sigma: float) -> Tensor:
    """The model-scaled z [B, C, h, w] of a LATENT at `sigma`.

    A LATENT that the same model left on the device comes back bit for bit; any other is scaled in.
    Raises: MismatchError for a LATENT that is known to have another sigma.
    """
    tensor = _device_tensor(latent)
    if tensor is not None:
        if abs(tensor.sigma - sigma) > 1e-4 * max(tensor.sigma, sigma):
            raise MismatchError(
                f"latent has sigma {tensor.sigma:.4g} but this step starts at {sigma:.4g}: "
                + (
                    "connect the output of 'Noise Latent to Sigma'"
                    if tensor.sigma == 0
                    else "use the same sigmas, and start where the step before ended"
                )
            )
        z = tensor.z()
        if z is not None and tensor.denoiser_fingerprint == denoiser.fingerprint:
            return z.to(denoiser.device)
    if denoiser.flow and sigma >= 1:
        raise MismatchError(
            "a flow model's latent at sigma 1 is pure noise: take it from 'Noise Latent to Sigma' with this MODEL"
        )
    clean = denoiser.scale_in(samples_of(latent))
    return denoiser.noise(clean, torch.zeros_like(clean), sigma) if denoiser.flow else clean


def latent_grid(mask: Tensor, latent: Mapping[str, Any] | None, codec: Any | None) -> tuple[int, int, int | None]:
    """Height and width in latent pixels, and image pixels per latent pixel, of the grid for a mask [B, H, W].

    From the LATENT if there is one, else from the mask's size and the codec's factor. The factor is None if not known.
    """
    factor = None if codec is None else int(codec.factor)
    if latent is not None:
        tensor = _device_tensor(latent)
        shape = samples_of(latent).shape if tensor is None else tensor.shape
        return shape[-2], shape[-1], latent.get("editkit_factor", factor)
    if factor is None:
        raise ParameterError("the size of the latent grid is not known: connect latent or vae")
    return padded_length(mask.shape[1], factor) // factor, padded_length(mask.shape[2], factor) // factor, factor


def image_size(latent: Mapping[str, Any], codec: Any | None) -> tuple[int, int, int]:
    """Image pixels per latent pixel, and height and width of the image that a LATENT [B, C, h, w] was encoded from.

    Raises: ParameterError if neither the LATENT nor a codec gives the pixels per latent pixel.
    """
    height, width, factor = latent_grid(torch.zeros(1, 1, 1), latent, codec)
    if factor is None:
        raise ParameterError(
            "latent does not say how many pixels a latent pixel has: connect vae, or encode with "
            "'VAE Encode (Any Size)'"
        )
    return factor, *latent.get("editkit_size", (height * factor, width * factor))
