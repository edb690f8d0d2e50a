"""A small convolutional VAE and a colour judge, for the laws of background reconstruction and ranking."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stage(nn.Module):
    """Upsample (or not), convolve, squash (or not); counts its calls and can fail at one of them."""

    def __init__(self, inputs: int, outputs: int, up: bool, squash: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.up, self.squash, self.calls = up, squash, 0
        self.fail_at: int | None = None
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == self.fail_at:
            raise self.error
        if self.up:
            x = F.interpolate(x, scale_factor=2.0)
        x = self.conv(x)
        return torch.tanh(x) if self.squash else x


class ToyClone:
    def __init__(self, codec: ToyCodec):
        self.codec, self.released = codec, False
        self.blocks: list[nn.Module] = list(copy.deepcopy(codec.decoder).float().requires_grad_(False))

    def prepare(self, latent: Tensor) -> Tensor:
        return latent.to(self.codec.device).float() * self.codec.scale

    def finish(self) -> ToyCodec:
        tuned = copy.copy(self.codec)
        tuned.decoder = nn.ModuleList(self.blocks)
        return tuned

    def release(self) -> None:
        assert not self.released, "released twice"
        self.released, self.blocks = True, []


class ToyCodec:
    """Factor 4, three latent channels: encodes by averaging, decodes by three convolutions."""

    factor, channels, scale = 4, 3, 0.5
    device = torch.device("cpu")

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        self.decoder = nn.ModuleList([Stage(3, 8, True, True), Stage(8, 8, True, True), Stage(8, 3, False, False)])
        generator = torch.Generator().manual_seed(seed)
        for weight in self.decoder.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
        self.decoder.to(dtype).requires_grad_(False)
        self.clones: list[ToyClone] = []

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(image.movedim(-1, 1) * 2 - 1, self.factor) / self.scale

    def decode(self, latent: Tensor, *, clamp: bool = True) -> Tensor:
        with torch.no_grad():
            x = latent.to(next(self.decoder.parameters()).dtype) * self.scale
            for stage in self.decoder:
                x = stage(x)
        image = x.float().movedim(1, -1) * 0.5 + 0.5
        return image.clamp(0, 1) if clamp else image

    def decoder_clone(self) -> ToyClone:
        self.clones.append(ToyClone(self))
        return self.clones[-1]

    def digest(self) -> str:
        """Every bit of the weights, and whether any may learn."""
        state = hashlib.sha256()
        for weight in self.decoder.parameters():
            state.update(
                weight.detach().float().numpy().tobytes() + bytes([weight.requires_grad, weight.grad is not None])
            )
        return state.hexdigest()


class ColourRanker:
    """A `Ranker` that knows three words and sees only the mean colour."""

    device = torch.device("cpu")
    words = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def __init__(self, dtype: torch.dtype = torch.float32, text_scale: float = 1.0):
        self.dtype, self.text_scale, self.seen = dtype, text_scale, []

    def embed_images(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        colour = images.mean((1, 2)) + torch.tensor([1e-3, 2e-3, 3e-3])
        return F.normalize(colour, dim=-1).to(self.dtype)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.words[text] for text in texts]).to(self.dtype) * self.text_scale


def random_image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed))


def smooth_image(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """A picture without noise: a few colours, bilinearly mixed."""
    coarse = torch.rand(batch, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True).movedim(1, -1)


def box(batch: int, height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    mask = torch.zeros(batch, height, width)
    mask[:, rows[0] : rows[1], columns[0] : columns[1]] = 1
    return mask
