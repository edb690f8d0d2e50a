"""What an attention edit costs, on a U-Net of Stable Diffusion 1.5's size with random weights, in one run on one machine.

`python -m editkit.benchmarks attention-cost` prints it. Memory is the largest amount that is held beyond the model by a
P2Plus edit with LocalBlend, by plain sampling of the same batch, and by the published loop, which keeps whole maps. Time is
that of an edit of a real image, against the bare model calls that it needs: 4 forward passes a step up to tau_u, 3 while
only the source's conditional branch is read, 2 after the last fraction of the steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..hosts.diffusers.denoiser import DiffusersDenoiser
from ..hosts.diffusers.schedules import sigma_table
from ..pipelines.attention.local_blend import LocalBlendOptions
from ..pipelines.attention.p2p import P2PControl, P2POptions
from ..pipelines.attention.pair_control import PairControl
from ..pipelines.attention.pair_loop import PairPrompts, pair_edit
from ..pipelines.attention.prompts.prompt_edit import PromptEdit
from ..pipelines.core.attention_sites import Site
from ..pipelines.core.noise import seeded_noise
from ..pipelines.core.protocols import Context
from ..pipelines.core.trajectory import Trajectory, context_digest
from .cost import CountingUnet, alternating, clock_of, wait
from .memory import peak_bytes

LIMIT = 1.10
STEPS = 5
OPTIONS = P2POptions(0.8, 0.4, 0.2)
TOKENS = 77
WIDTH = 768
WORD = 5
COND: tuple[Literal["cond"]] = ("cond",)


class PublishedLoop(PairControl):
    """The published loop: whole maps in every layer; those of at most 32 x 32 tokens are added up over the steps."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        self.store: dict[tuple[int, bool], Tensor] = {}

    def needs(self, step: int) -> frozenset:
        return frozenset({"cond", "uncond"})

    def wants(self, site: Site) -> bool:
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor | None:
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        if site.tokens <= 1024:
            key = site.order, site.cross
            self.store[key] = maps.clone() if key not in self.store else self.store[key] + maps
        partners = self.partners(site.rows, COND, q.device)
        if partners is not None and (site.cross or site.tokens <= 1024):
            maps = maps.index_copy(0, partners.targets, maps.index_select(0, partners.sources))
        return maps @ v


@dataclass(frozen=True)
class Work:
    """A network and one edit for it."""

    denoiser: DiffusersDenoiser
    edit: PromptEdit
    negative: Context
    sigmas: Tensor
    start: Tensor
    trajectory: Trajectory

    @property
    def prompts(self) -> PairPrompts:
        return PairPrompts(self.edit.source, self.edit.target, self.negative, 7.5)


def large_network() -> Any:
    """Stable Diffusion 1.5's U-Net, as it is initialised."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=WIDTH, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    )


def work_on(unet: Any, latent_pixels: int, batch: int = 1, width: int = WIDTH) -> Work:
    """A word swap on latents of `latent_pixels` x `latent_pixels`, on the network's device."""
    unet = unet.eval().requires_grad_(False)
    schedule = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    denoiser = DiffusersDenoiser(unet, sigma_table(schedule), "epsilon", "sd1", 0.18215, 8)
    device, sigmas = denoiser.device, denoiser.schedule(STEPS)
    source, target, negative = (
        Context(seeded_noise((TOKENS, width), [seed], device), text=str(seed)) for seed in (1, 2, 3)
    )
    whole, ones = torch.eye(TOKENS), torch.ones(TOKENS)
    edit = PromptEdit(source, target, whole, ones, ones, {}, blend_source=(WORD,), blend_target=(WORD,))
    noise = seeded_noise((4, latent_pixels, latent_pixels), range(batch), device)
    latents = torch.stack([noise * float(sigma) for sigma in sigmas])
    trajectory = Trajectory(sigmas, latents, noise, denoiser.family, denoiser.fingerprint, context_digest(source))
    return Work(denoiser, edit, negative, sigmas, latents[0], trajectory)


# --------------------------------------------------------------------------------------------------------------- memory
def peaks(work: Work) -> dict[str, int]:
    """Bytes that plain sampling of the same batch, our edit and the published loop hold over two steps from noise."""
    sigmas = work.denoiser.schedule(2)
    options = P2POptions(1.0, 1.0, 1.0, local_blend=LocalBlendOptions(start=0.0))
    controls = {
        "plain sampling": PairControl(sigmas),
        "P2Plus": P2PControl(work.edit, sigmas, options),
        "published loop": PublishedLoop(sigmas),
    }
    return {name: peak_bytes(_run(work, control), work.denoiser.device) for name, control in controls.items()}


def _run(work: Work, control: PairControl) -> Callable[[], object]:
    return lambda: pair_edit(work.denoiser, work.prompts, control, work.start)


# ----------------------------------------------------------------------------------------------------------------- time
def passes_per_call(work: Work, run: Callable[[], object]) -> list[int]:
    counter = CountingUnet(work.denoiser.unet)
    try:
        run()
        return counter.calls
    finally:
        counter.remove()


def bare(work: Work, calls: Sequence[int]) -> Callable[[], None]:
    """Model calls with `calls[i]` latents at step i, and nothing else."""
    denoiser = work.denoiser
    x = work.start[:1].repeat(max(calls), 1, 1, 1).to(denoiser.dtype)
    tokens = work.edit.target.tokens.to(denoiser.dtype).expand(max(calls), -1, -1).contiguous()
    timesteps = [denoiser.timestep(float(sigma)) for sigma in work.sigmas[:-1]]

    @torch.no_grad()
    def run() -> None:
        for count, timestep in zip(calls, timesteps, strict=True):
            denoiser.unet(x[:count], timestep, tokens[:count], return_dict=False)
        wait(denoiser.device)

    return run


def seconds(work: Work, rounds: int) -> tuple[list[int], float, float]:
    """Forward passes of every step, and median seconds of the edit and of these passes alone."""
    words = replace(work.edit, blend_source=(), blend_target=())  # LocalBlend would read the source to the end

    def edit() -> None:
        pair_edit(work.denoiser, work.prompts, P2PControl(words, work.sigmas, OPTIONS), work.trajectory)
        wait(work.denoiser.device)

    calls = passes_per_call(work, edit)
    runs = alternating([edit, bare(work, calls)], rounds, clock_of(work.denoiser.device))
    ours, floor = (statistics.median(times) for times in runs)
    return calls, ours, floor


def main(rounds: int = 3) -> bool:
    """Print both tables; True if both limits are kept. Without a GPU the image has half the side."""
    from ..pipelines.blended.pipeline import best_device

    device = best_device()
    cuda = device.type == "cuda"
    unet = large_network().to(device)
    work = work_on(unet.half() if cuda else unet, 64 if cuda else 32)
    found = peaks(work)
    for name, size in found.items():
        print(f"{name:<16} {size / 2**20:8.1f} MiB {size / found['plain sampling']:6.3f}")
    memory = found["P2Plus"] / found["plain sampling"]
    calls, ours, floor = seconds(work, rounds)
    print(f"forward passes per step {calls}: {ours:.3f} s against {floor:.3f} s for these alone, {ours / floor:.3f}")
    good = memory <= LIMIT and ours / floor <= LIMIT
    print(f"{'PASS' if good else 'FAIL'} memory {memory:.3f} and time {ours / floor:.3f}, both at most {LIMIT}")
    return good
