"""StyleDiffusion's mapping networks: from a picture's tokens to the value inputs of cross-attention (methods.md, 9).

One network per picture and noise level, of three 1 x 1 convolutions over the token axis:

    S tokens -> w -> w, normalise, leaky ReLU -> w tokens, every feature by itself

"direct" (Li et al. 2023, table 1): w is the text's token count and the output is the value input itself. "affine" (the
published checkpoints): w is twice that, and the halves scale and shift the text embedding of the row they serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.noise import STEP_STRIDE

FORMS = ("affine", "direct")
INITS = ("published", "identity", "paper")
EPSILON, SLOPE = 1e-5, 0.01  # of the normalisation and the leaky ReLU


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of one network.

    Attributes:
        image_tokens, text_tokens: counts of tokens, 197 and 77 as published.
        form: "affine" or "direct" (module text).
    """

    image_tokens: int
    text_tokens: int
    form: str = "affine"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ParameterError(f"network form is {self.form!r}: choose one of {', '.join(FORMS)}")
        if min(self.image_tokens, self.text_tokens) < 1:
            raise ShapeError(f"there are {self.image_tokens} image and {self.text_tokens} text tokens: give at least 1")

    @property
    def width(self) -> int:
        return self.text_tokens * (2 if self.form == "affine" else 1)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one picture's network."""
        s, w = self.image_tokens, self.width
        return {
            "first.weight": (w, s), "first.bias": (w,), "middle.weight": (w, w), "middle.bias": (w,),
            "norm.weight": (w,), "norm.bias": (w,), "last.weight": (w, w), "last.bias": (w,),
        }  # fmt: skip

    @property
    def count(self) -> int:
        """Numbers that one network learns: 78 540 affine and 27 412 direct at 197 -> 77."""
        return sum(torch.Size(size).numel() for size in self.sizes.values())


class MappingNetworks:
    """The networks of a batch, each picture its own: no picture's result depends on the batch it is in.

    The normalisation is the published BatchNorm in training mode over a batch of one, whose statistics are those of one
    token over its features, at learning and at use alike; there are no running averages.

    Attributes:
        parameters: by name, float32 leaves [B, ...].
    """

    def __init__(self, shape: NetworkShape, parameters: dict[str, Tensor]) -> None:
        self.shape, self.parameters = shape, parameters

    def __call__(self, features: Tensor) -> Tensor:
        """[B, image tokens, D] to [B, width, D]."""
        if features.shape[1] != self.shape.image_tokens:
            raise ShapeError(
                f"the picture has {features.shape[1]} tokens but the network takes {self.shape.image_tokens}: "
                "use the image encoder that it was made for"
            )
        x = self._layer("middle", self._layer("first", features))
        x = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        x = self.parameters["norm.weight"][..., None] * x + self.parameters["norm.bias"][..., None]
        return self._layer("last", F.leaky_relu(x, SLOPE))

    def split(self, output: Tensor) -> tuple[Tensor | None, Tensor]:
        """What a network gives as (scale, shift), [B, text tokens, D] each; "direct" has no scale."""
        if self.shape.form == "direct":
            return None, output
        scale, shift = output.split(self.shape.text_tokens, dim=1)
        return scale, shift

    def _layer(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return torch.baddbmm(bias[..., None], weight, x)


def values(scale: Tensor | None, shift: Tensor, text: Tensor) -> Tensor:
    """The value input [R, T, D] of rows whose text embedding is `text` (published: c S + B; "direct": the shift alone).

    Scale 1 and shift 0 give the bits of `text`.
    """
    return shift.expand_as(text) if scale is None else text * scale + shift


def made_networks(
    shape: NetworkShape, seeds: Sequence[int], init: str = "published", device: torch.device | str = "cpu"
) -> MappingNetworks:
    """Fresh networks, one per seed; call it in `learning_mode`.

    Args:
        init: "published" (PyTorch's own for convolutions: uniform within 1 / sqrt(fan-in)); "paper" (weights of
            deviation 0.01, biases 0); "identity" (published, but the last layer is 0 and its bias makes scale 1, shift 0,
            so that learning starts at plain guidance instead of erasing the text; affine only).
    Raises: ParameterError.
    """
    if init not in INITS:
        raise ParameterError(f"init is {init!r}: choose one of {', '.join(INITS)}")
    if init == "identity" and shape.form != "affine":
        raise ParameterError("init 'identity' needs the affine form: a direct network cannot pass the text on")
    rows = [_row(shape, seed, init) for seed in seeds]
    stacked = {name: torch.stack([row[name] for row in rows]).to(device) for name in shape.sizes}
    return MappingNetworks(shape, stacked)


def _row(shape: NetworkShape, seed: int, init: str) -> dict[str, Tensor]:
    """Parameters of one picture, drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed((int(seed) ^ STEP_STRIDE) % 2**64)
    row: dict[str, Tensor] = {}
    for name, size in shape.sizes.items():
        layer, kind = name.split(".")
        if layer == "norm":
            row[name] = torch.full(size, 1.0 if kind == "weight" else 0.0)
        elif init == "paper":
            weight = torch.empty(size)
            row[name] = weight.normal_(0, 0.01, generator=generator) if kind == "weight" else weight.zero_()
        else:
            bound = shape.sizes[f"{layer}.weight"][1] ** -0.5
            row[name] = torch.empty(size).uniform_(-bound, bound, generator=generator)
    if init == "identity":
        row["last.weight"].zero_()
        row["last.bias"] = torch.cat([torch.ones(shape.text_tokens), torch.zeros(shape.text_tokens)])
    return row


__all__ = ["FORMS", "INITS", "MappingNetworks", "NetworkShape", "made_networks", "values"]
