"""StyleDiffusion's mapping networks M_t: from image tokens to value embeddings (docs/methods.md, section 9).

One network per image and sampling step, with three 1 x 1 convolutions over the token axis:

    S tokens -> w -> w, normalise, leaky ReLU -> w tokens; every feature is treated alike

"direct" (Li et al. 2023, table 1): w is the text's token count T, and the output is the value embedding. "affine" (the
published checkpoints): w is 2 T, and the two halves scale and shift the text embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ParameterError, ShapeError
from ..core.noise import STEP_STRIDE, folded_seed

FORMS = ("affine", "direct")
INITS = ("published", "identity", "paper")
EPSILON, SLOPE = 1e-5, 0.01  # of the normalisation and the leaky ReLU


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of one network.

    Attributes:
        image_tokens, text_tokens: numbers of tokens, 197 and 77 as published.
        form: "affine" or "direct" (module docstring).
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
        """Tokens between the layers and at the output."""
        return self.text_tokens * (2 if self.form == "affine" else 1)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one network."""
        width = self.width
        return {
            "first.weight": (width, self.image_tokens),
            "first.bias": (width,),
            "middle.weight": (width, width),
            "middle.bias": (width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
            "last.weight": (width, width),
            "last.bias": (width,),
        }

    @property
    def count(self) -> int:
        """Parameters of one network: 78 540 affine and 27 412 direct for 197 and 77 tokens."""
        return sum(torch.Size(size).numel() for size in self.sizes.values())


class MappingNetworks:
    """The networks of a batch, one per image, so that no result depends on the rest of the batch.

    The normalisation is the published BatchNorm, which stays in training mode on a batch of one. Its statistics are then
    those of each token over the features, in learning and in use, and it has no running averages.

    Attributes:
        parameters: by name, float32 leaves [B, ...].
    """

    def __init__(self, shape: NetworkShape, parameters: dict[str, Tensor]) -> None:
        self.shape, self.parameters = shape, parameters

    def __call__(self, features: Tensor) -> Tensor:
        """Map image tokens [B, S, D] to [B, width, D]."""
        if features.shape[1] != self.shape.image_tokens:
            raise ShapeError(
                f"the image has {features.shape[1]} tokens but the network takes {self.shape.image_tokens}: "
                "use the image encoder that it was made for"
            )
        x = self._layer("middle", self._layer("first", features))
        x = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        x = self.parameters["norm.weight"][..., None] * x + self.parameters["norm.bias"][..., None]
        return self._layer("last", F.leaky_relu(x, SLOPE))

    def split(self, output: Tensor) -> tuple[Tensor | None, Tensor]:
        """An output as (scale, shift), [B, T, D] each; "direct" networks have no scale."""
        if self.shape.form == "direct":
            return None, output
        scale, shift = output.split(self.shape.text_tokens, dim=1)
        return scale, shift

    def _layer(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return torch.baddbmm(bias[..., None], weight, x)


def value_embedding(scale: Tensor | None, shift: Tensor, text: Tensor) -> Tensor:
    """The value embedding c~ = c S + B of a text embedding c (published code); B alone without a scale (the paper).

    Scale 1 and shift 0 return `text` bit for bit.

    Args:
        scale: S, [R or 1, T, D], or None.
        shift: B, [R or 1, T, D].
        text: c, [R, T, D].
    Returns: [R, T, D].
    """
    return shift.expand_as(text) if scale is None else text * scale + shift


def made_networks(
    shape: NetworkShape, seeds: Sequence[int], init: str = "published", device: torch.device | str = "cpu"
) -> MappingNetworks:
    """Networks with initial weights, one per seed. Call it in `learning_mode`.

    Args:
        shape: of every network.
        seeds: one per image.
        init: "published" (PyTorch's default for convolutions: uniform within 1 / sqrt(fan-in)); "paper" (weights normal with
            deviation 0.01, biases 0); "identity" (ours: as published, but the last layer gives scale 1 and shift 0, so that
            learning starts from plain guidance; affine only).
        device: of the parameters; they are drawn on the CPU.
    Returns: the networks, with float32 leaves [len(seeds), ...].
    Raises: ParameterError for an unknown init, and for "identity" with the direct form.
    """
    if init not in INITS:
        raise ParameterError(f"init is {init!r}: choose one of {', '.join(INITS)}")
    if init == "identity" and shape.form != "affine":
        raise ParameterError("init 'identity' needs the affine form: a direct network cannot pass the text on")
    drawn = [_initial(shape, seed, init) for seed in seeds]
    stacked = {name: torch.stack([one[name] for one in drawn]).to(device) for name in shape.sizes}
    return MappingNetworks(shape, stacked)


def _initial(shape: NetworkShape, seed: int, init: str) -> dict[str, Tensor]:
    """Initial parameters of one network, drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed((folded_seed(seed) ^ STEP_STRIDE) % 2**64)
    drawn: dict[str, Tensor] = {}
    for name, size in shape.sizes.items():
        layer, kind = name.split(".")
        if layer == "norm":
            drawn[name] = torch.full(size, 1.0 if kind == "weight" else 0.0)
        elif init == "paper":
            weight = torch.empty(size)
            drawn[name] = weight.normal_(0, 0.01, generator=generator) if kind == "weight" else weight.zero_()
        else:
            bound = shape.sizes[f"{layer}.weight"][1] ** -0.5
            drawn[name] = torch.empty(size).uniform_(-bound, bound, generator=generator)
    if init == "identity":
        drawn["last.weight"].zero_()
        drawn["last.bias"] = torch.cat([torch.ones(shape.text_tokens), torch.zeros(shape.text_tokens)])
    return drawn


__all__ = ["FORMS", "INITS", "MappingNetworks", "NetworkShape", "made_networks", "value_embedding"]
