"""A denoiser that listens to every token, and a picture inverted with it: for what learns or borrows embeddings."""

from __future__ import annotations

import torch

from editkit.pipelines.core.protocols import Context
from editkit.pipelines.inversion.ddim import InversionOptions, invert
from editkit.tests.toys import ToyDenoiser, random_latent

B, C, H, W, T, D = 2, 4, 3, 2, 2, 12
SOURCE, NULL = (
    Context(random_latent(1, T, D, seed=1) * 0.2, text="source"),
    Context(random_latent(1, T, D, seed=2) * 0.2),
)
EXACT = InversionOptions("implicit", iterations=60, tolerance=1e-7)


class TokenDenoiser(ToyDenoiser):
    """The derivative is 0.3 sin(z) plus a smooth function of the tokens [R, T, 12], one value per channel and row.

    `parameter` is its one weight.
    """

    def __init__(self, scale: float = 1.0, gain: float = 0.3):
        super().__init__(lambda z, sigma, value: z, scale=scale)
        self.parameter = torch.tensor(gain, requires_grad=True)
        self.log: list[tuple[int, int]] = []

    def denoise(self, z, sigma, contexts):
        self.forward_passes += len(contexts) * len(z)
        self.calls += 1
        self.log.append((len(contexts), sum(c.tokens.requires_grad for c in contexts)))
        return torch.stack([z - sigma * (0.3 * torch.sin(z) + self._pull(c.tokens)) for c in contexts])

    def _pull(self, tokens):
        rows = torch.tanh(tokens).sum(1) * self.parameter
        return rows.reshape(len(rows), C, H, 1)


def inverted(denoiser=None, batch: int = B, steps: int = 6, **kwargs):
    denoiser = denoiser or TokenDenoiser()
    latent = random_latent(batch, C, H, W, seed=3) * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1)
    with torch.no_grad():
        path = invert(denoiser, latent, SOURCE, torch.linspace(3, 0, steps + 1), options=EXACT, **kwargs)
    denoiser.forward_passes = denoiser.calls = 0
    denoiser.log.clear()
    return denoiser, path
