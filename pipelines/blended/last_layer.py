"""The decoder's last convolution, solved instead of learned.

The image is linear in the last convolution's weights, and the loss of background reconstruction is a sum of squares. So its
minimum over these weights is the solution of one linear system (docs/methods.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .background_loss import BackgroundLoss

RIDGE = 1e-6  # added to the diagonal, relative to its mean: keeps weights that the image does not decide
CHUNK = 2**19  # numbers of unfolded features at a time


@dataclass(frozen=True)
class LastLayer:
    """The convolution that makes the image, and its input [B, C, H', W']."""

    convolution: nn.Conv2d
    features: Tensor


def last_layer(block: nn.Module, decode: Callable[[], Tensor]) -> LastLayer | None:
    """The last convolution of a decoder's last block and what it receives; None where the image is not its output.

    Args:
        block: the decoder's last block.
        decode: runs the decoder, without gradients, and returns the image.
    """
    found = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    if not found or not _plain(found[-1]):
        return None
    seen: list[tuple[Tensor, Tensor]] = []
    handle = found[-1].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        image = decode()
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][1] is not image:
        return None
    return LastLayer(found[-1], seen[0][0])


def _plain(convolution: nn.Conv2d) -> bool:
    """Stride 1, zero padding to the same size, one group."""
    kept = all(2 * pad == size - 1 for pad, size in zip(_padding(convolution), convolution.kernel_size, strict=True))
    steps = (*convolution.stride, *convolution.dilation, convolution.groups)
    return kept and set(steps) == {1} and convolution.padding_mode == "zeros"


def _padding(convolution: nn.Conv2d) -> tuple[int, ...]:
    return (-1, -1) if isinstance(convolution.padding, str) else tuple(convolution.padding)


@torch.no_grad()
def solve_last_layer(layer: LastLayer, loss: BackgroundLoss) -> None:
    """Set the convolution to the weights of least loss, in place, and change nothing where the loss is 0 already.

    Args:
        layer: from `last_layer`.
        loss: prepared, so that it knows the edit.
    """
    convolution = layer.convolution
    weight = convolution.weight.flatten(1)
    bias = convolution.bias if convolution.bias is not None else weight.new_zeros(len(weight))
    now = torch.cat([weight, bias[:, None]], 1)
    device = torch.device("cpu") if now.device.type == "mps" else now.device  # mps has no float64
    now = now.to(device, torch.float64)
    size = now.shape[1]
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    missing = torch.zeros(len(now), size, dtype=torch.float64, device=device)
    for patches, weights, targets in _chunks(layer, loss):
        patches, weights, targets = (part.to(device, torch.float64) for part in (patches, weights, targets))
        matrix += (patches * weights) @ patches.T
        missing += (targets - weights * (now @ patches)) @ patches.T
    mean = matrix.diagonal().mean()
    if mean == 0:  # no weight on any pixel
        return
    matrix += RIDGE * mean * torch.eye(size, dtype=torch.float64, device=device)
    solved = (now + torch.linalg.solve(matrix, missing.T).T).to(weight)
    convolution.weight.copy_(solved[:, :-1].view_as(convolution.weight))
    if convolution.bias is not None:
        convolution.bias.copy_(solved[:, -1])


def _chunks(layer: LastLayer, loss: BackgroundLoss) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Patches [size, n] with a row of ones, weights [1, n], and weighted targets [3, n], some rows of pixels at a time."""
    convolution = layer.convolution
    height, width = loss.mask.shape[-2:]
    down, across = _padding(convolution)
    padded = F.pad(layer.features, (across, across, down, down))
    size = convolution.weight[0].numel()
    rows = max(1, CHUNK // (size * width * len(padded)))
    for top in range(0, height, rows):
        count = min(rows, height - top)
        patches = F.unfold(padded[:, :, top : top + count + 2 * down], convolution.kernel_size)
        patches = patches.unflatten(2, (count, -1))[..., :width].transpose(0, 1).flatten(1)
        ones = patches.new_full((1, patches.shape[1]), float(convolution.bias is not None))
        weights, targets = loss.squares(slice(top, top + count))
        yield torch.cat([patches, ones]), weights.transpose(0, 1).flatten(1), targets.transpose(0, 1).flatten(1)
