"""What StyleDiffusion's learning costs against the passes that it needs, and against the published scheme, in one run.

`python -m editkit.benchmarks style-cost` prints it. All sides make the same updates on one scene.

    floor       the bare network: a forward and backward pass to the text per update, with a loss on its output, and the
                forward passes without gradients; no control, no mapping network, no optimiser
    published   the image encoder and the mapping network inside every cross-attention layer of every conditional pass, and
                gradients for the weights of U-Net and encoder, added up and never cleared (docs/methods.md, section 9)
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..headless.claims import trials as t
from ..headless.claims.diffedit import Scenes, scenes
from ..hosts.diffusers.open_clip_ranker import tower_tokens
from ..pipelines.attention.pair_batch import single_rows
from ..pipelines.core.attention_sites import Controlled, Site
from ..pipelines.core.sigmas import euler_step
from ..pipelines.core.trajectory import Trajectory
from ..pipelines.inversion.ddim import invert
from ..pipelines.learning.optimise import learning_mode
from ..pipelines.stylediffusion.inversion import StyleOptions, image_features, style_invert
from ..pipelines.stylediffusion.learning_control import LearningControl
from ..pipelines.stylediffusion.networks import NetworkShape, made_networks, value_embedding
from .cost import CountingUnet, alternating, clock_of, finished

FLOOR_LIMIT, GAIN_LIMIT = 1.15, 1.5
STEPS, UPDATES = 3, 30
OPTIONS = StyleOptions(inner=UPDATES, inner_decay=0.0, tolerance=0.0, tolerance_growth=0.0)  # every update is made
OTHERS = 3  # passes without gradients in every step: the maps' goal, the unconditional one, and the one to advance
NEEDED = STEPS * (UPDATES + OTHERS) + 1  # one more measures how much memory an update takes


class EveryLayer(LearningControl):
    """Value embeddings as published: encoder and network run again in every cross-attention layer."""

    def __init__(self, ranker: Any, image: Tensor, text: Tensor) -> None:
        super().__init__(1, text.device)
        self.tower = copy.deepcopy(ranker.model.visual).requires_grad_(True)
        self.pixels = ranker.prepare(image)
        self.text = text
        width = text.shape[2]
        tokens = self._tokens().shape[1:]
        self.frame = torch.linalg.qr(torch.randn(max(tokens[1], width), min(tokens[1], width)))[0]
        self.networks = made_networks(NetworkShape(tokens[0], text.shape[1]), [0], "published", text.device)

    def _tokens(self) -> Tensor:
        return tower_tokens(self.tower, self.pixels)

    def inputs(self, key: Tensor, value: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        if self.value is not None:
            features = self._tokens() @ self.frame
            self.value = value_embedding(*self.networks.split(self.networks(features)), self.text)
        return super().inputs(key, value, site)


def published(model: Any, work: Scenes, trajectory: Trajectory, ranker: Any) -> None:
    """The official loop, step by step."""
    denoiser = replace(model.denoiser, unet=copy.deepcopy(model.denoiser.unet).requires_grad_(True))
    with learning_mode():
        control = EveryLayer(ranker, work.images, work.source.tokens)
        rows = Controlled(control, single_rows(1, ("cond",), "source"))
        learned = [parameter.requires_grad_(True) for parameter in control.networks.parameters.values()]
        z = trajectory.latents[0]
        sigmas = trajectory.sigmas.tolist()
        for index in range(STEPS):
            sigma, target = sigmas[index], sigmas[index + 1]
            with torch.no_grad():
                control.collect_goals()
                denoiser.denoise(trajectory.latent(index), sigma, [work.source], rows)
                control.keep_goals()
                uncond = denoiser.denoise(z, sigma, [work.null])[0]
            adam = torch.optim.Adam(learned, lr=1e-2)
            for _ in range(UPDATES):
                reached = _step(denoiser, control, z, uncond, rows, work, sigma, target)
                loss = (reached - trajectory.latent(index + 1)).square().mean() + control.attention_loss.sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
            with torch.no_grad():
                z = _step(denoiser, control, z, uncond, rows, work, sigma, target)


def _step(
    denoiser: Any, control: EveryLayer, z: Tensor, uncond: Tensor, rows: Controlled, work: Scenes, *sigmas: float
) -> Tensor:
    control.begin(work.source.tokens)
    cond = denoiser.denoise(z, sigmas[0], [work.source], rows)[0]
    return euler_step(z, uncond + OPTIONS.guidance_scale * (cond - uncond), *sigmas)


def floor(model: Any, work: Scenes, trajectory: Trajectory) -> None:
    """The bare passes that the learning cannot do without."""
    unet, denoiser = model.denoiser.unet, model.denoiser
    with learning_mode():
        for index in range(STEPS):
            rows, time_ = trajectory.latents[index], denoiser.timestep(float(trajectory.sigmas[index]))
            for _ in range(UPDATES):
                tokens = work.source.tokens.clone().requires_grad_(True)
                loss = unet(rows, time_, tokens, return_dict=False)[0].square().mean()
                torch.autograd.grad(loss, tokens)
            with torch.no_grad():
                for _ in range(OTHERS):
                    unet(rows, time_, work.source.tokens, return_dict=False)


def main(rounds: int = 7) -> bool:
    """Print the table; True if forward passes and ratios (medians over the rounds) keep their limits."""
    from ..hosts.diffusers.loading import load_bundled
    from ..hosts.diffusers.open_clip_ranker import load_bundled_ranker

    model, ranker = load_bundled(), load_bundled_ranker()
    work = scenes(model, [t.recolour(0)])
    trajectory = invert(model.denoiser, work.latent, work.source, model.denoiser.schedule(STEPS))
    features = image_features(ranker, work.images, work.source.tokens.shape[2])

    def ours() -> None:
        style_invert(model.denoiser, trajectory, work.source, work.null, features, options=OPTIONS)

    counter = CountingUnet(model.denoiser.unet)
    ours()
    counter.remove()
    sides: dict[str, Callable[[], object]] = {
        "floor": lambda: floor(model, work, trajectory),
        "ours": ours,
        "published": lambda: published(model, work, trajectory, ranker),
    }
    device = model.denoiser.device
    runs = [finished(side, device) for side in sides.values()]
    found = dict(zip(sides, alternating(runs, rounds, clock_of(device)), strict=True))
    to_floor = statistics.median(a / b for a, b in zip(found["ours"], found["floor"], strict=True))
    gain = statistics.median(a / b for a, b in zip(found["published"], found["ours"], strict=True))
    print(
        f"{'learning':<10} {'seconds':>8}   ({STEPS} steps of {UPDATES} updates, {counter.passes} forward passes, needed {NEEDED})"
    )
    for name, seconds in found.items():
        print(f"{name:<10} {statistics.median(seconds):8.3f}")
    print(
        f"ours over floor {to_floor:.3f} (limit {FLOOR_LIMIT}), published over ours {gain:.2f} (at least {GAIN_LIMIT})"
    )
    return counter.passes == NEEDED and to_floor <= FLOOR_LIMIT and gain >= GAIN_LIMIT
