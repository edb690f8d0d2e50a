"""StyleDiffusion inversion: learn the value inputs of cross-attention from the image's tokens (Li et al. 2023, section 3.3).

Keys stay those of the text, so that cross-attention maps remain editable. Values become value embeddings of the image, so
that guided sampling follows the inversion. One mapping network M_t per sampling step learns them with the loss

    L = |z~_{t-1} - z*_{t-1}|^2 + |a~_t - a_t|^2

of the guided step's distance from the trajectory and of the cross-attention maps' distance from those of the inversion
(L_att). The loop over steps is `learning.per_step`; docs/methods.md, section 9.
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
from ..core.trajectory import Trajectory
from ..learning.optimise import learning_mode, own, own_context
from ..learning.per_step import PerStepResult, StepSettings, TrajectoryStep, learn_per_step
from .learning_control import LearningControl
from .networks import FORMS, INITS, NetworkShape, made_networks, value_embedding
from .value_embeddings import ValueEmbeddings

TARGETS = ("aligned", "published")
LEAST_RATE = 0.1  # the least step size, as a fraction of the first


@dataclass(frozen=True)
class StyleOptions:
    """How value embeddings are learned; see `PRESETS`. Step i counts from 0, the noisiest.

    Attributes:
        guidance_scale: the scale of the reconstruction and of later edits.
        form, init: of the mapping networks (`networks`); each step starts from the weights of the step before.
        inner, inner_decay: step i makes at most ceil(inner exp(-inner_decay i)) updates.
        lr, lr_fall: Adam's step size is lr (1 - lr_fall i), and at least a tenth of lr.
        betas: Adam's decay rates.
        attention_weight: of L_att against the distance from the trajectory; 0 = without L_att.
        targets: the maps that L_att compares with. "aligned": those of the inverted latent at the step's sigma.
            "published": those of the same latent as if its sigma were one step larger, as the official code's inversion
            stored them (docs/methods.md, section 16, row 21).
        tolerance, tolerance_growth: an image stops learning in step i when its loss is below
            tolerance + i tolerance_growth.
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
        _check_choice("network form", self.form, FORMS)
        _check_choice("init", self.init, INITS)
        _check_choice("targets", self.targets, TARGETS)
        if self.inner < 0:
            raise ParameterError(f"inner steps are {self.inner}: give 0 or more (100 as published)")
        if not self.lr > 0:
            raise ParameterError(f"lr is {self.lr}: give a learning rate above 0 (0.01 as published)")
        if min(self.attention_weight, self.inner_decay, self.lr_fall) < 0:
            raise ParameterError("attention_weight, inner_decay and lr_fall must be 0 or more")

    def updates(self, step: int) -> int:
        """Most updates in a step: 100, 91, 82, ... in the published code, 1015 in 30 steps."""
        return math.ceil(self.inner * math.exp(-self.inner_decay * step))

    def rate(self, step: int) -> float:
        """Adam's step size in a step."""
        return self.lr * max(LEAST_RATE, 1 - self.lr_fall * step)

    def threshold(self, step: int) -> float:
        """The loss below which an image stops learning in a step."""
        return self.tolerance + step * self.tolerance_growth


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ParameterError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


PRESETS = {
    "published": StyleOptions(),
    "paper": StyleOptions(form="direct", init="paper", lr=1e-4, lr_fall=0, betas=(0.0, 0.999), inner_decay=1.0),
    "even": StyleOptions(inner=20, inner_decay=0.0),
}
"""published: the settings of the official code. paper: the settings that the paper prints, where they differ
(docs/methods.md, section 9, table). even: ours, with 20 updates in every step, 600 instead of 1015 in 30 steps: the last
steps matter most for the reconstruction."""


@dataclass(frozen=True)
class StyleResult:
    """The learned value embeddings and their quality.

    Attributes:
        embeddings: value embeddings of every step.
        rebuilt: the reconstruction: where guided sampling with them ends, [B, C, h, w] in model scale.
        losses: last measured loss of each step, mean over the batch; before the last update, as published.
        updates: updates made in each step.
        map_distance: L_att with the final weights of each step: the mean squared difference of its cross-attention maps from
            those of the inversion, summed over layers; float32 [steps, B] on the CPU.
    """

    embeddings: ValueEmbeddings
    rebuilt: Tensor
    losses: list[float]
    updates: list[int]
    map_distance: Tensor


def image_features(encoder: ImageEncoder, image: Tensor, width: int) -> Tensor:
    """Tokens [B, S, width] of images, evaluated once per image.

    The mapping networks mix tokens and treat every feature alike, so image tokens and text need the same width, as those of
    CLIP ViT-B/16 and Stable Diffusion 1. Our extension for other models: a fixed matrix with orthonormal rows or columns maps
    one width to the other and keeps the size of a feature.

    Args:
        encoder: an image encoder without its pooling and projection (the paper uses CLIP ViT-B/16).
        image: [B, H, W, 3] in [0, 1].
        width: of the text embedding, 768 for Stable Diffusion 1.
    Raises: ShapeError.
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
    """Learn value embeddings, so that guided sampling follows the trajectory and keeps the inversion's attention maps.

    Forward passes per step and image: 1 for the maps of the inversion, 1 unconditional, 1 conditional per update (with
    gradients, which end in the mapping networks) and 1 to take the step. One more in the first step estimates the memory.
    Images do not influence each other.

    Args:
        denoiser: the model that made the trajectory.
        trajectory: the inversion, [N + 1 - first, B, C, h, w].
        source: the prompt of the inversion, [1 or B, T, D].
        null: the negative prompt, [1 or B, T, D]; its keys and values stay those of the text in every step.
        features: tokens of the images, [1 or B, S, D] with the text's width (`image_features`).
        seeds: one per image, for the networks' initial weights; None = 0, 1, ...
        options: see `StyleOptions`.
        progress: called after every update; raising there cancels.
    Returns: the value embeddings, and the reconstruction that the loop arrives at.
    Raises: MismatchError for another model or prompt than the trajectory's; ShapeError; ParameterError; FamilyError for a
        network without cross-attention maps to compare; EditError where an update does not fit into memory.
    Source: Li et al. 2023, "StyleDiffusion", section 3.3 and algorithm 1. Forms, initial weights and the number of updates
        are those of the official code, which differs from the paper (docs/methods.md, section 9, table).
    """
    options = options or StyleOptions()
    trajectory.check(denoiser)
    trajectory.check_prompt(source, "positive")
    seeds = list(range(trajectory.batch)) if seeds is None else seeds
    _check_inputs(trajectory, source, features, seeds)
    with learning_mode():
        learner = _NetworkLearner(
            denoiser, trajectory, own_context(source), own_context(null), features, seeds, options
        )
        result = learn_per_step(
            learner, denoiser, trajectory, memory_name="StyleDiffusion's learning", progress=progress
        )
        return learner.result(source, result)


def _check_inputs(trajectory: Trajectory, source: Context, features: Tensor, seeds: list[int]) -> None:
    """Raises ShapeError unless there is a seed per image and features of the text's width."""
    if len(seeds) != trajectory.batch:
        raise ShapeError(f"there are {len(seeds)} seeds but {trajectory.batch} images: give one seed per image")
    if features.ndim != 3 or features.shape[2] != source.tokens.shape[2]:
        raise ShapeError(
            f"image features are {list(features.shape)} but the text has width {source.tokens.shape[2]}: "
            "make them with image_features for this width"
        )


class _NetworkLearner:
    """The mapping networks of the current step, one per image (a `StepLearner`)."""

    def __init__(
        self,
        denoiser: Denoiser,
        trajectory: Trajectory,
        source: Context,
        null: Context,
        features: Tensor,
        seeds: list[int],
        options: StyleOptions,
    ) -> None:
        self.denoiser = denoiser
        self.trajectory = trajectory
        self.options = options
        self.source, self.null = source, null
        batch, device = trajectory.batch, trajectory.latents.device
        self.text = own(match_batch(source.tokens, batch, "positive", "trajectory"), device)
        self.features = own(match_batch(features, batch, "image", "trajectory"), device)
        shape = NetworkShape(features.shape[1], self.text.shape[1], options.form)
        self.networks = made_networks(shape, seeds, options.init, device)
        self.control = LearningControl(batch, device)
        self.controlled = Controlled(self.control, single_rows(batch, ("cond",), "source"))
        self.learned: list[tuple[Tensor | None, Tensor]] = []
        self.map_distances: list[Tensor] = []

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.networks.parameters.values())

    def settings(self, index: int) -> StepSettings:
        options = self.options
        return StepSettings(options.updates(index), options.rate(index), options.threshold(index), options.betas)

    def begin(self, step: TrajectoryStep) -> None:
        """Collect the goal of L_att, and predict under the negative prompt once: neither depends on the networks."""
        self.step = step
        self._collect_goals(step)
        self.uncond = None
        if self.options.guidance_scale != 1:
            self.uncond = self.denoiser.denoise(step.z, step.sigma, [self.null])[0]

    def loss(self) -> Tensor:
        """The distance [B] of the guided step from the trajectory, plus L_att."""
        weight = self.options.attention_weight
        denoised = self._guided(*self._scale_and_shift(), compare=weight > 0)
        return self.step.distance(denoised) + weight * self.control.attention_loss

    def finish(self) -> Tensor:
        scale, shift = self._scale_and_shift()
        denoised = self._guided(scale, shift)
        self.learned.append((scale, shift))
        self.map_distances.append(self.control.attention_loss)
        return denoised

    def result(self, source: Context, result: PerStepResult) -> StyleResult:
        """What was learned in all steps; the source prompt comes with what its host attached."""
        scales, shifts = zip(*self.learned, strict=True)
        embeddings = ValueEmbeddings(
            source,
            None if scales[0] is None else torch.stack(scales),
            torch.stack(shifts),
            self.trajectory,
            self.options.guidance_scale,
            self.trajectory.fingerprint,
        )
        map_distance = torch.stack(self.map_distances).cpu()
        return StyleResult(embeddings, result.reconstruction, result.losses, result.updates, map_distance)

    def _scale_and_shift(self) -> tuple[Tensor | None, Tensor]:
        """What the networks make of the image's tokens, [B, T, D] each."""
        return self.networks.split(self.networks(self.features))

    def _guided(self, scale: Tensor | None, shift: Tensor, compare: bool = True) -> Tensor:
        """The guided denoised prediction [B, C, h, w] with value embeddings in the conditional pass (equation 6)."""
        step = self.step
        control = self.control
        guidance_scale = self.options.guidance_scale
        control.begin(value_embedding(scale, shift, self.text), compare)
        cond = self.denoiser.denoise(step.z, step.sigma, [self.source], self.controlled)[0]
        cond = control.scaling.leave(cond)
        if self.uncond is None:
            return self.denoiser.combine(step.z, step.sigma, cond, cond, 1.0, [self.source])
        contexts = [self.source, self.null]
        return self.denoiser.combine(step.z, step.sigma, cond, self.uncond, guidance_scale, contexts)

    def _collect_goals(self, step: TrajectoryStep) -> None:
        """Store the inversion's cross-attention maps, under the text alone."""
        trajectory, options = self.trajectory, self.options
        index, sigma = step.index, step.sigma
        if options.targets == "published":
            index = max(step.index, trajectory.first + 1)
            sigma = float(trajectory.sigmas[index - 1])
        z = own(trajectory.latent(index))
        if not self.denoiser.flow:  # scale the latent of one sigma as the network expects it at another
            z = z * ((1 + sigma * sigma) / (1 + float(trajectory.sigmas[index]) ** 2)) ** 0.5
        self.control.collect_goals()
        self.denoiser.denoise(z, sigma, [self.source], self.controlled)
        self.control.keep_goals()
        if not self.control.goals and options.attention_weight > 0:
            raise FamilyError(
                f"this model ({self.denoiser.family!r}) has no cross-attention layer on the grid whose maps are compared: "
                "set attention_weight to 0"
            )


__all__ = ["PRESETS", "StyleOptions", "StyleResult", "image_features", "style_invert"]
