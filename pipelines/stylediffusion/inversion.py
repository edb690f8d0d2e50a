"""StyleDiffusion: learn the value inputs of cross-attention from a picture's own tokens (Li et al. 2023, section 3.3).

The keys stay the text's, so that attention maps stay editable; the values become the picture's, so that guided sampling
follows its inversion. One mapping network per step is trained on two losses: the distance of the guided step from the
trajectory, and that of the cross-attention maps from those of the inversion (methods.md, 9 and 17).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.pair_batch import single_rows
from ..core.attention_sites import Controlled
from ..core.errors import FamilyError, ParameterError, ShapeError
from ..core.progress import Progress, silent
from ..core.protocols import Context, Denoiser, ImageEncoder
from ..core.shapes import check_image, match_batch
from ..core.sigmas import euler_step
from ..core.trajectory import Trajectory
from ..learning.early_stopping import Held
from ..learning.memory import measured
from ..learning.optimise import learning_mode, optimise, own, own_context
from .networks import FORMS, INITS, MappingNetworks, NetworkShape, made_networks, values
from .value_embeddings import ValueEmbeddings
from .value_learner import GAIN, ValueLearner, amplified

TARGETS = ("aligned", "published")
LEAST_RATE = 0.1  # of the first learning rate: where a falling rate stops


@dataclass(frozen=True)
class StyleOptions:
    """How values are learned; see `PRESETS`. Step i counts from 0, the noisiest.

    Attributes:
        guidance_scale: the scale to reconstruct, and later edit, at.
        form, init: of the networks (`style_network`); each step starts from the weights of the one before.
        inner, inner_decay: step i makes ceil(inner exp(-inner_decay i)) updates.
        lr, lr_fall: Adam's step size is lr (1 - lr_fall i), and never less than a tenth of lr.
        betas: Adam's decay rates.
        attention_weight: of the maps' loss against the reconstruction's, 0 = without.
        targets: maps to hold to: "aligned" (the inverted latent at the step's own level) or "published" (the same latent as
            if it were one level noisier, as the official code's inversion left them; methods.md, section 16, row 21).
        tolerance, tolerance_growth: an image is done with step i when its loss is below tolerance + i tolerance_growth.
    """

    guidance_scale: float = 7.5
    form: str = "affine"
    init: str = "published"
    inner: int = 100
    inner_decay: float = 0.1
    lr: float = 1e-2
    lr_fall: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    attention_weight: float = 1.0
    targets: str = "aligned"
    tolerance: float = 1e-5
    tolerance_growth: float = 2e-5

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("network form", self.form, FORMS), ("init", self.init, INITS), ("targets", self.targets, TARGETS),
        ):  # fmt: skip
            if value not in choices:
                raise ParameterError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        if self.inner < 0:
            raise ParameterError(f"inner steps are {self.inner}: give 0 or more (100 as published)")
        if not self.lr > 0:
            raise ParameterError(f"lr is {self.lr}: give a learning rate above 0 (0.01 as published)")
        if min(self.attention_weight, self.inner_decay, self.lr_fall) < 0:
            raise ParameterError("attention_weight, inner_decay and lr_fall must be 0 or more")

    def updates(self, step: int) -> int:
        """Most updates of a step: 100, 91, 82, ... as the code was published, 1015 in 30 steps."""
        return math.ceil(self.inner * math.exp(-self.inner_decay * step))

    def rate(self, step: int) -> float:
        return self.lr * max(LEAST_RATE, 1 - self.lr_fall * step)

    def threshold(self, step: int) -> float:
        return self.tolerance + step * self.tolerance_growth


PRESETS = {
    "published": StyleOptions(),
    "paper": StyleOptions(form="direct", init="paper", lr=1e-4, lr_fall=0, betas=(0.0, 0.999), inner_decay=1.0),
    "even": StyleOptions(inner=20, inner_decay=0.0),
}
"""The official code's settings; those that the paper prints where they differ (methods.md, 9: table); and ours, "even": as
many updates late as early, 600 instead of 1015 in 30 steps, because the last steps decide how close the picture comes."""


@dataclass(frozen=True)
class StyleResult:
    """What was learned, and how well.

    Attributes:
        embeddings: value embeddings of every step.
        rebuilt: where guided sampling with them ends, [B, C, h, w] in model scale: the reconstruction, for free.
        losses: last measured loss of every step, mean over the batch; before the last update, as published.
        updates: updates made at every step.
        map_distance: with the final weights of every step, how far its cross-attention maps are from their goal: the mean
            squared difference, summed over layers; float32 [steps, B] on the CPU.
    """

    embeddings: ValueEmbeddings
    rebuilt: Tensor
    losses: list[float]
    updates: list[int]
    map_distance: Tensor


def image_features(encoder: ImageEncoder, image: Tensor, width: int) -> Tensor:
    """Tokens [B, S, width] of IMAGEs [B, H, W, 3], evaluated once per picture.

    The networks mix tokens and leave features alone, so tokens and text must have one width, as CLIP ViT-B/16 and Stable
    Diffusion 1 have. Where they differ (our extension), a fixed matrix with orthonormal rows or columns turns one into the
    other at the same size per feature. Raises: ShapeError.
    """
    tokens = encoder.image_tokens(check_image(image, "image")).float()
    own_width = tokens.shape[2]
    if own_width == width:
        return tokens
    long, short = max(own_width, width), min(own_width, width)
    generator = torch.Generator("cpu").manual_seed(0)
    frame = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64))[0].to(tokens)
    return tokens @ (frame if own_width == long else frame.mT) * max(1.0, width / own_width) ** 0.5


def style_invert(
    denoiser: Denoiser,
    trajectory: Trajectory,
    source: Context,
    null: Context,
    features: Tensor,
    *,
    seeds: list[int] | None = None,
    options: StyleOptions | None = None,
    progress: Progress = silent,
) -> StyleResult:
    """Learn value embeddings, so that guided sampling retraces the trajectory with the text's own attention maps.

    Per step and image: 1 row for the maps, 1 unconditional row, 1 conditional row per update, with gradients that end in
    the networks, and 1 to advance; 1 more before the first, which tells how much memory they take. Images do not influence
    each other.

    Args:
        source: the prompt of the inversion.    null: the negative, plain at every step.
        features: tokens of the pictures, [1 or B, S, D] with the text's width (`image_features`).
        seeds: one per image, for the networks' first weights; None = 0, 1, ...
    Raises: MismatchError, ShapeError, ParameterError, FamilyError for networks without such attention. Cancel by raising
        in `progress`, which is told after every update.
    """
    options = options or StyleOptions()
    trajectory.check(denoiser)
    trajectory.check_prompt(source, "positive")
    seeds = list(range(trajectory.batch)) if seeds is None else seeds
    if len(seeds) != trajectory.batch:
        raise ShapeError(f"there are {len(seeds)} seeds but {trajectory.batch} images: give one seed per image")
    if features.ndim != 3 or features.shape[2] != source.tokens.shape[2]:
        raise ShapeError(
            f"image features are {list(features.shape)} but the text has width {source.tokens.shape[2]}: "
            "make them with image_features for this width"
        )
    with learning_mode():
        run = _Run(denoiser, trajectory, own_context(source), own_context(null), features, seeds, options)
        for step in range(trajectory.first, trajectory.steps):
            run.step(step, progress)
        return run.result(source)


class _Run:
    """The state that one step hands to the next: the latent and the networks (warm start)."""

    def __init__(
        self, denoiser: Denoiser, path: Trajectory, source: Context, null: Context, features: Tensor,
        seeds: list[int], options: StyleOptions,
    ) -> None:  # fmt: skip
        self.denoiser, self.trajectory, self.source, self.null, self.options = denoiser, path, source, null, options
        self.z = own(path.latents[0])
        device = self.z.device
        self.text = own(match_batch(source.tokens, path.batch, "positive", "trajectory"), device)
        self.features = own(match_batch(features, path.batch, "image", "trajectory"), device)
        shape = NetworkShape(features.shape[1], self.text.shape[1], options.form)
        self.networks: MappingNetworks = made_networks(shape, seeds, options.init, device)
        self.control = ValueLearner(path.batch, device)
        self.rows = Controlled(self.control, single_rows(path.batch, ("cond",), "source"))
        self.levels = path.sigmas.tolist()
        self.learned: list[tuple[Tensor | None, Tensor]] = []
        self.losses: list[float] = []
        self.updates: list[int] = []
        self.distances: list[Tensor] = []
        counts = [options.updates(step) for step in range(path.first, path.steps)]
        self.done, self.total = 0, sum(counts) + len(counts)

    def step(self, index: int, progress: Progress) -> None:
        """Learn the values of sampling step `index`, then take the step with them."""
        options, parameters = self.options, list(self.networks.parameters.values())
        before = self.done
        fit = _Fit(self, index, Held(parameters, options.threshold(index)))
        if index == self.trajectory.first:
            fit.check_memory()
        result = optimise(
            parameters, fit, steps=options.updates(index), lr=options.rate(index), betas=options.betas,
            stop=fit.held.stop, progress=lambda done, _, preview=None: progress(before + done, self.total),
        )  # fmt: skip
        fit.held.hold()
        with torch.no_grad():
            scale, shift = self.networks.split(self.networks(self.features))
            clean = fit.guided(values(scale, shift, self.text))
            self.z = euler_step(self.z, clean, self.levels[index], self.levels[index + 1])
        self.learned.append((scale, shift))
        self.updates.append(result.steps)
        self.losses.append(result.losses[-1] / self.trajectory.batch if result.losses else 0.0)
        self.distances.append(self.control.distance)
        self.done += options.updates(index) + 1
        progress(self.done, self.total, clean)

    def result(self, source: Context) -> StyleResult:
        """What was learned in all steps; values [steps, B, T, D], distances [steps, B] on the CPU."""
        scales, shifts = zip(*self.learned, strict=True)
        scale = None if scales[0] is None else torch.stack(scales)
        learned = ValueEmbeddings(
            source,
            scale,
            torch.stack(shifts),
            self.trajectory,
            self.options.guidance_scale,
            self.trajectory.fingerprint,
        )
        return StyleResult(learned, self.z, self.losses, self.updates, torch.stack(self.distances).cpu())


class _Fit:
    """The loss of one step, image by image."""

    def __init__(self, run: _Run, index: int, held: Held) -> None:
        self.run, self.held = run, held
        self.sigma, self.target = run.levels[index], run.levels[index + 1]
        self.goal = own(run.trajectory.level(index + 1))
        # the published tolerances, and the balance of the losses, are meant for variance-preserving latents
        self.weight = 1.0 if run.denoiser.flow else 1 / (1 + self.target * self.target)
        with torch.no_grad():
            self._collect(index)
            self.uncond = None
            if run.options.guidance_scale != 1:
                self.uncond = run.denoiser.denoise(run.z, self.sigma, [run.null])[0]

    def _collect(self, index: int) -> None:
        """What the maps of this step should be: those of the inverted latent, under the text alone."""
        run, level = self.run, index
        sigma = self.sigma
        if run.options.targets == "published":
            level = max(index, run.trajectory.first + 1)
            sigma = run.levels[level - 1]
        z = own(run.trajectory.level(level))
        if not run.denoiser.flow:  # the latent of one level, as the network sees it at another
            z = z * ((1 + sigma * sigma) / (1 + run.levels[level] ** 2)) ** 0.5
        run.control.collect()
        run.denoiser.denoise(z, sigma, [run.source], run.rows)
        run.control.keep()
        if not run.control.goals and run.options.attention_weight > 0:
            raise FamilyError(
                f"no cross-attention layer of this model ({run.denoiser.family!r}) works on the grid whose maps are compared: "
                "set attention_weight to 0"
            )

    def guided(self, value: Tensor, compare: bool = True) -> Tensor:
        """The guided clean prediction under these values; their maps' distance is left in the control."""
        run = self.run
        run.control.begin(value, compare)
        cond = amplified(run.denoiser.denoise(run.z, self.sigma, [run.source], run.rows)[0], GAIN)
        if self.uncond is None:
            return run.denoiser.combine(run.z, self.sigma, cond, cond, 1.0, [run.source])
        contexts, scale = [run.source, run.null], run.options.guidance_scale
        return run.denoiser.combine(run.z, self.sigma, cond, self.uncond, scale, contexts)

    def __call__(self, step: int) -> Tensor:
        """Loss [B] of the networks as they are now."""
        self.held.hold()
        loss = self.loss()
        self.held.saw(loss)
        return loss

    def loss(self) -> Tensor:
        """The step's distance from the trajectory, plus that of its maps from theirs, [B]."""
        run, weight = self.run, self.run.options.attention_weight
        scale, shift = run.networks.split(run.networks(run.features))
        clean = self.guided(values(scale, shift, run.text), compare=weight > 0)
        reached = euler_step(run.z, clean, self.sigma, self.target)
        return (reached - self.goal).square().flatten(1).mean(1) * self.weight + weight * run.control.distance

    def check_memory(self) -> None:
        """Raises EditError before the first update if one does not fit; this evaluates the network once."""
        denoiser = self.run.denoiser
        with measured(self.held.parameters) as need:
            self.loss()
        need.check(denoiser.device, "StyleDiffusion's learning", getattr(denoiser, "make_room", None))


__all__ = ["PRESETS", "StyleOptions", "StyleResult", "image_features", "style_invert"]
