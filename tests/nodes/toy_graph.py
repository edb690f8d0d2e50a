"""Sockets over toys, and the first nodes of a graph on them."""

from __future__ import annotations

from editkit.hosts.sockets import HeadlessModel, HeadlessVae, conditioning_of
from editkit.tests.nodes.graph import call
from editkit.tests.toy_codec import ToyCodec, random_image
from editkit.tests.toys import ToyDenoiser, pointwise, prompt

STEPS = 6


def model(rule=None, **options):
    """A MODEL over a toy denoiser (it counts its forward passes), with the toy VAE's channels."""
    return HeadlessModel(ToyDenoiser(rule or pointwise(), channels=3, **options))


def text(value: float = 0.0):
    """CONDITIONING of a number."""
    return conditioning_of(prompt(value))


def encoded(batch: int = 1, height: int = 24, width: int = 20, seed: int = 0):
    """An image of its own size, and its LATENT."""
    image = random_image(batch, height, width, seed=seed)
    return image, call("EncodeImage", image=image, vae=HeadlessVae(ToyCodec()))[0]


def sigmas(host, steps: int = STEPS, strength: float = 1.0):
    """SIGMAS of a MODEL."""
    return call("EditSigmas", model=host, steps=steps, strength=strength)[0]


def inverted(host, latent, **options):
    """The outputs of `InvertDDIM` with the prompt 1; `grid` takes the place of `sigmas(host)`."""
    grid = options.pop("grid", None)
    return call(
        "InvertDDIM", model=host, positive=text(1.0), latent=latent, sigmas=sigmas(host) if grid is None else grid,
        **options,
    )  # fmt: skip
