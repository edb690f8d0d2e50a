"""A denoiser made of attention, whose output is linear in the value inputs of its last layer; a scene inverted with it."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from editkit.pipelines.core.attention_sites import Site
from editkit.pipelines.core.protocols import Context
from editkit.pipelines.inversion.ddim import InversionOptions, invert
from editkit.pipelines.stylediffusion.inversion import StyleOptions, StyleResult, style_invert
from editkit.tests.toys import ToyDenoiser, random_latent

B, C, H, W = 2, 4, 6, 7
T, D, HEADS, WIDTH = 5, 12, 2, 6
S = 6
FEATURES = random_latent(B, S, D, seed=21)
SHORT = StyleOptions(inner=3, inner_decay=0.0)
PLACES = (("down", False), ("down", True), ("mid", True), ("up", False), ("up", True))
EXACT = InversionOptions("implicit", iterations=60, tolerance=1e-7)


def text(seed: int, rows: int = 1) -> Context:
    return Context(random_latent(rows, T, D, seed=seed), text=f"prompt {seed}")


SOURCE, TARGET, NULL = text(11), text(12), text(13)


class AttentionDenoiser(ToyDenoiser):
    """Self- and cross-attention on the latent's own grid, cut into calls of `max_rows` rows.

    Its weights ask for gradients, as a careless user's do; `log` has (sigma, contexts, latent) of every call.
    """

    def __init__(self, max_rows: int | None = None, seed: int = 0):
        super().__init__(lambda z, sigma, value: z)
        self.weights = [
            torch.nn.ParameterDict({
                name: random_latent(inputs, outputs, seed=seed + 10 * index + number) * 0.4
                for number, (name, inputs, outputs) in enumerate(
                    (("q", C, WIDTH), ("k", D if cross else C, WIDTH), ("v", D if cross else C, WIDTH), ("out", WIDTH, C))
                )
            })
            for index, (_, cross) in enumerate(PLACES)
        ]  # fmt: skip
        self.max_rows, self.log, self.fail_at, self.error = max_rows, [], None, None

    def denoise(self, z, sigma, contexts, control=None):
        self.forward_passes += len(contexts) * len(z)
        self.calls += 1
        self.log.append((float(sigma), len(contexts), z))
        if self.error is not None and self.calls == self.fail_at:
            raise self.error
        out = []
        for number, context in enumerate(contexts):
            tokens = context.tokens.expand(len(z), -1, -1)
            rows = control.rows.chunk(number) if control else ()
            size = self.max_rows or len(z)
            parts = [
                self._network(z[i : i + size], tokens[i : i + size], float(sigma), control, rows[i : i + size])
                for i in range(0, len(z), size)
            ]
            out.append(torch.cat(parts))
        return torch.stack(out)

    def _network(self, z: Tensor, tokens: Tensor, sigma: float, control, rows) -> Tensor:
        x = (z / (1 + sigma * sigma) ** 0.5).flatten(2).transpose(1, 2)
        for index, (place, cross) in enumerate(PLACES):
            site = Site(place, 0, 1, 0, index, len(PLACES), (H, W), (H, W), cross, sigma, rows)
            x = x + self._attention(self.weights[index], x, tokens if cross else x, site, control)
        return z - 0.4 * sigma * x.transpose(1, 2).reshape(z.shape)

    def _attention(self, weights, x: Tensor, source: Tensor, site: Site, control) -> Tensor:
        key = value = source
        asked = control is not None and control.control.wants(site)
        if asked:
            key, value = control.control.inputs(key, value, site)
        q, k, v = (
            (part @ weights[name]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, part in (("q", x), ("k", key), ("v", value))
        )
        out = control.control.attend(q, k, v, site) if asked else None
        out = F.scaled_dot_product_attention(q, k, v) if out is None else out
        return out.transpose(1, 2).flatten(2) @ weights["out"]

    def parameters(self) -> list[Tensor]:
        return [value for layer in self.weights for value in layer.values()]

    def digest(self) -> str:
        state = hashlib.sha256()
        for weight in self.parameters():
            state.update(weight.detach().numpy().tobytes() + bytes([weight.requires_grad, weight.grad is not None]))
        return state.hexdigest()


def inverted(denoiser: AttentionDenoiser, batch: int = B, steps: int = 4, source: Context = SOURCE, **kwargs):
    """A trajectory; the denoiser has forgotten the calls that it took."""
    latent = random_latent(batch, C, H, W, seed=3) * torch.linspace(0.5, 1, batch).view(-1, 1, 1, 1)
    with torch.no_grad():
        path = invert(denoiser, latent, source, torch.linspace(3, 0, steps + 1), options=EXACT, **kwargs)
    denoiser.forward_passes = denoiser.calls = 0
    denoiser.log.clear()
    return path


def learned(
    denoiser: AttentionDenoiser, path, options: StyleOptions = SHORT, features: Tensor = FEATURES, **kwargs
) -> StyleResult:
    return style_invert(denoiser, path, SOURCE, NULL, features[: path.batch], options=options, **kwargs)
