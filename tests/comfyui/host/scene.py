"""A model of a family, and what nodes upstream make with it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced
from torch import Tensor

import nodes as stock_nodes
from editkit.hosts.host import sampling_of, text_encoder_of
from editkit.hosts.sockets import conditioning_of
from editkit.tests.comfyui.host.families import Family, vae
from editkit.tests.nodes.graph import call

SIDE = 64  # of the image, in pixels; 8 latent pixels
SOURCE, TARGET = "a red cat on grass", "a red dog on grass"
CHOSEN = {"blend_words": "cat, dog"}


class Scene:
    """A model of a family, and what nodes upstream make with it, each made once when it is first asked for."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model, self.clip, self.vae = family.model(), family.clip(), vae(family.channels)
        self.image = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
        self.mask = torch.zeros(1, SIDE, SIDE)
        self.mask[:, 20:50, 12:45] = 1
        self.ranker = call("LoadRanker", weights="bundled")[0]

    def encode(self, text: str) -> list:
        return conditioning_of(text_encoder_of(self.clip).encode(text))

    @property
    def mode(self) -> dict[str, str]:
        """The default mode of an inversion needs a model with training timesteps."""
        return {"mode": "implicit"} if sampling_of(self.model).flow else {}

    @cached_property
    def positive(self) -> list:
        return self.encode(SOURCE)

    @cached_property
    def target(self) -> list:
        return self.encode(TARGET)

    @cached_property
    def negative(self) -> list:
        return self.encode("")

    @cached_property
    def latent(self) -> dict:
        return call("EncodeImage", image=self.image, vae=self.vae)[0]

    @cached_property
    def latent_mask(self) -> Tensor:
        return call("LatentMask", mask=self.mask, latent=self.latent)[0]

    @cached_property
    def sigmas(self) -> Tensor:
        return call("EditSigmas", model=self.model, steps=2, strength=1.0)[0]

    @cached_property
    def noised(self) -> dict:
        return call("NoiseLatent", model=self.model, latent=self.latent, sigmas=self.sigmas)[0]

    @cached_property
    def schedule(self) -> Any:
        return call("DilationSchedule", latent_mask=self.latent_mask)[0]

    @cached_property
    def inversion(self) -> tuple:
        given = {"positive": self.positive, "latent": self.latent, "sigmas": self.sigmas, **self.mode}
        return call("InvertDDIM", model=self.model, **given, vae=self.vae, image=self.image)

    @property
    def trajectory(self) -> Any:
        return self.inversion[0]

    @cached_property
    def edit(self) -> Any:
        return call("AlignPrompts", clip=self.clip, source_text=SOURCE, target_text=TARGET, **CHOSEN)[0]

    @cached_property
    def null_text(self) -> tuple:
        prompts = {"positive": self.positive, "negative": self.negative}
        return call("NullText", model=self.model, trajectory=self.trajectory, **prompts, inner_steps=1)

    @cached_property
    def learned(self) -> Any:
        """The embeddings of negative-prompt inversion."""
        given = {"trajectory": self.trajectory, "positive": self.positive, "prox": "hard"}
        return call("NegativePrompt", model=self.model, **given)[0]

    @cached_property
    def flow_inversion(self) -> tuple:
        given = {"positive": self.positive, "latent": self.latent, "sigmas": self.sigmas, "iterations": 2}
        return call("FlowInversion", model=self.model, **given)

    @cached_property
    def style(self) -> tuple:
        prompts = {"positive": self.positive, "negative": self.negative, "image_encoder": self.ranker}
        given = {"trajectory": self.trajectory, "image": self.image, "inner_steps": 1, "preset": "even"}
        return call("StyleInvert", model=self.model, **prompts, **given)

    @cached_property
    def layered(self) -> tuple:
        given = {"object": self.positive, "background": self.target, "latent": self.latent, "mask": self.mask}
        return call("LayeredEmbeddings", model=self.model, **given, steps=1)

    @cached_property
    def tuned(self) -> tuple:
        given = {"latent": self.latent, "mask": self.mask, "background_weight": 0.0, "rank": 2, "steps": 1}
        return call("LayeredTune", model=self.model, mixed=self.positive, **given)

    def a_latent(self, latent: dict, batch: int = 1) -> None:
        """A finite LATENT of the image's size."""
        assert latent["samples"].shape == (batch, self.family.channels, SIDE // 8, SIDE // 8)
        finite(latent["samples"])

    def sampled(self, model: Any, positive: list, start: dict, batch: int = 1) -> None:
        """KSampler with a patched MODEL."""
        sampled = stock_nodes.common_ksampler(
            model, 5, 2, 4.0, "euler", "normal", positive, self.negative, start, denoise=0.9
        )[0]
        self.a_latent(sampled, batch)

    def guided(self, guider: Any, start: dict) -> None:
        """SamplerCustomAdvanced with a GUIDER."""
        euler = comfy.samplers.sampler_object("euler")
        self.a_latent(SamplerCustomAdvanced().sample(Noise_RandomNoise(1), guider, euler, self.sigmas, start)[1])

    def pairs(self, node: str, prompts: dict[str, Any]) -> None:
        """A model patch of attention control, for two steps."""
        model, pair = call(node, model=self.model, **prompts)
        self.sampled(model, pair, {"samples": self.latent["samples"].repeat(2, 1, 1, 1)}, batch=2)


def finite(*values: Tensor) -> None:
    for value in values:
        assert value.numel() > 0 and value.isfinite().all()


def an_image(image: Tensor, batch: int = 1) -> None:
    assert image.shape == (batch, SIDE, SIDE, 3)
    finite(image)


def a_mask(mask: Tensor, side: int) -> None:
    assert mask.shape == (1, side, side)
    finite(mask)
