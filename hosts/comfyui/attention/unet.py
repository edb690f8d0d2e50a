"""Attention control in a native U-Net, for one network call at a time. (`joint.py`: in transformers.)

The MODEL itself is not patched. The options of one model call carry a wrapper around the network. During the call it adds
its hooks to the options, behind those that are there already (LoRA, IPAdapter, PAG, ...), and to the convolutional blocks
whose features are needed. After success, error and cancel alike, the hooks are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.patcher_extension
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from torch import Tensor, nn

from ....pipelines.core.attention_sites import AttentionControl, Controlled, FeatureSite, Grid, Place, Row, Site
from ....pipelines.core.errors import FamilyError, MismatchError, ParameterError
from ..patch_keys import ATTENTION_KEY
from .joint import JointLayers, joint_layers, joint_options

NETWORK = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
PLACES: dict[str, Place] = {"input": "down", "middle": "mid", "output": "up"}
Layer = tuple[str, int, int]  # ComfyUI's name of the place, the block's number, the transformer layer in the block
Hook = Callable[..., Any]


@dataclass(frozen=True)
class Layers:
    """The layers of a U-Net that can be controlled.

    Attributes:
        order: number of every transformer layer in order of execution.
        blocks: how many blocks each place has, by ComfyUI's name of the place.
        halvings: place of every transformer, and how often the latent's grid was halved there.
        residuals: the residual branch of every convolutional block, with its place, its number and the count of them.
    """

    order: dict[Layer, int]
    blocks: dict[str, int]
    halvings: frozenset[tuple[Place, int]]
    residuals: list[tuple[nn.Module, Place, int, int]]

    def cross_grids(self, latent_pixels: Grid) -> frozenset[tuple[Place, Grid]]:
        """Place and grid of every transformer, each of which has a cross-attention layer."""
        height, width = latent_pixels
        return frozenset((place, (-(-height // 2**n), -(-width // 2**n))) for place, n in self.halvings)


def attention_layers(model: Any) -> Layers | JointLayers:
    """The layers of a MODEL. Raises FamilyError for a network whose attention is not known."""
    joint = joint_layers(model)
    return _unet_layers(model) if joint is None else joint


def _unet_layers(model: Any) -> Layers:
    network = model.get_model_object("diffusion_model")
    parts = list(_parts(network)) if isinstance(network, UNetModel) else []
    counts = {place: 1 + max(number for where, number, _ in parts if where == place) for place, _, _ in parts}
    order: dict[Layer, int] = {}
    halved = 0
    halvings: set[tuple[Place, int]] = set()
    residuals: list[tuple[nn.Module, Place, int, int]] = []
    middle = [part for place, _, part in parts if place == "middle" and isinstance(part, ResBlock)]
    for place, number, part in parts:
        halved += isinstance(part, Downsample) - isinstance(part, Upsample)
        if isinstance(part, host_attention.SpatialTransformer):
            halvings.add((PLACES[place], halved))
            for depth in range(len(part.transformer_blocks)):
                order[place, number, depth] = len(order)
        elif isinstance(part, ResBlock):
            block, blocks = (middle.index(part), len(middle)) if part in middle else (number, counts[place])
            residuals.append((part.out_layers, PLACES[place], block, blocks))
    if not order or any(isinstance(part, host_attention.SpatialVideoTransformer) for _, _, part in parts):
        raise FamilyError(
            f"model is a {type(model.model).__name__}, whose attention cannot be controlled: P2P and MasaCtrl need an "
            "SD 1.x, SD 2.x, SDXL, SD3 or Flux model, PnP one of the first three. With this model, use inversion "
            "with another prompt, DiffEdit or a blended denoise instead"
        )
    return Layers(order, counts, frozenset(halvings), residuals)


def _parts(network: UNetModel) -> Iterator[tuple[str, int, nn.Module]]:
    """Every module of every block in order of execution."""
    named = [("input", network.input_blocks), ("middle", [network.middle_block]), ("output", network.output_blocks)]
    for place, blocks in named:
        for number, block in enumerate(blocks):
            yield from ((place, number, part) for part in block or ())


def controlled_options(options: dict, controlled: Controlled, layers: Layers | JointLayers, sigma: float) -> dict:
    """A copy of the options of one model call, with `controlled` in force.

    Args:
        options: model options of the run.
        controlled: its contexts are counted as the conditions of the model call.
        layers: of the MODEL.
        sigma: of the model call.
    Returns: the options for one model call; `options` does not change.
    Raises: FamilyError for a control that does not know the network's joint attention.
    """
    if isinstance(layers, JointLayers):
        return joint_options(options, controlled, layers, sigma)

    def network(
        executor: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **named: Any,
    ) -> Any:
        given = {} if transformer_options is None else transformer_options
        rows = tuple(row for chunk in given["cond_or_uncond"] for row in controlled.rows.chunk(chunk))
        call = NetworkCall(controlled.control, layers, rows, sigma)
        with call.residuals(x):
            return executor(x, timesteps, context, y, control, call.hooked(given), **named)

    to = options.get("transformer_options", {})
    wrappers = to.get("wrappers", {})
    wrappers = {**wrappers, NETWORK: {**wrappers.get(NETWORK, {}), ATTENTION_KEY: [network]}}
    return {**options, "transformer_options": {**to, "wrappers": wrappers}}


class NetworkCall:
    """The hooks of one network call; `rows` says what every row of its batch is."""

    def __init__(self, control: AttentionControl, layers: Layers, rows: tuple[Row, ...], sigma: float) -> None:
        self.control = control
        self.layers = layers
        self.rows = rows
        self.sigma = sigma

    def hooked(self, options: dict) -> dict:
        """The call's transformer options with our hooks after the existing ones."""
        patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
        inputs = {
            f"{kind}_patch": [*patches.get(f"{kind}_patch", []), self._inputs(kind)] for kind in ("attn1", "attn2")
        }
        hooks = {kind: self._replaced(kind, replaced.get(kind, {})) for kind in ("attn1", "attn2")}
        return {**options, "patches": {**patches, **inputs}, "patches_replace": {**replaced, **hooks}}

    def _replaced(self, kind: str, before: dict[tuple, Hook]) -> dict[tuple, Hook]:
        """One hook for every layer, which knows the hook that it replaces (a layer's own goes before its block's)."""
        own = {layer: self._attend(kind, before.get(layer) or before.get(layer[:2])) for layer in self.layers.order}
        return {**before, **own}

    def _inputs(self, kind: str) -> Hook:
        def hook(query: Tensor, key: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
            site = self._site(kind, extra)
            if not self.control.wants(site):
                return query, key, value
            self._check(site, query)
            return query, *self.control.inputs(key, value, site)

        return hook

    def _attend(self, kind: str, before: Hook | None) -> Hook:
        def hook(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
            site, heads = self._site(kind, extra), extra["n_heads"]
            result = None
            if self.control.wants(site):
                self._check(site, q)
                result = self.control.attend(_split(q, heads), _split(k, heads), _split(v, heads), site)
            if result is not None and before is not None:
                raise ParameterError(_taken(kind, site, before))
            if result is not None:
                return result.to(q.dtype).transpose(1, 2).flatten(2)
            if before is not None:
                return before(q, k, v, extra)
            return host_attention.optimized_attention(
                q, k, v, heads, attn_precision=extra.get("attn_precision"), transformer_options=extra
            )

        return hook

    def _site(self, kind: str, extra: dict) -> Site:
        (place, number), depth = extra["block"], extra["block_index"]
        return Site(
            place=PLACES[place],
            block=number,
            blocks=self.layers.blocks[place],
            depth=depth,
            order=self.layers.order[place, number, depth],
            layers=len(self.layers.order),
            grid=_sides(extra["activations_shape"]),
            latent_pixels=_sides(extra["original_shape"]),
            cross=kind == "attn2",
            sigma=self.sigma,
            rows=self.rows,
            cross_grids=self.layers.cross_grids(_sides(extra["original_shape"])),
        )

    def _check(self, site: Site, query: Tensor) -> None:
        if query.shape[0] != len(site.rows) or query.shape[1] != site.tokens:
            raise MismatchError(
                f"an attention layer has {query.shape[0]} rows of {query.shape[1]} tokens but the image has "
                f"{len(site.rows)} rows of {site.tokens} latent pixels: another node merges or tiles them (ToMe, HyperTile); "
                "connect the MODEL from before it"
            )

    @contextmanager
    def residuals(self, x: Tensor) -> Iterator[None]:
        """Hooks on the residual branches that the control needs; always removed at the end."""
        handles = []
        try:
            for branch, place, block, blocks in self.layers.residuals:
                if self.control.wants_features(place, block, blocks):
                    site = FeatureSite(place, block, blocks, _sides(x.shape), self.sigma, self.rows)
                    handles.append(branch.register_forward_hook(self._features(site)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _features(self, site: FeatureSite) -> Hook:
        return lambda module, inputs, output: self.control.features(output, site)


def _split(part: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads * d] as [rows, heads, tokens, d]."""
    return part.unflatten(2, (heads, -1)).transpose(1, 2)


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of [B, C, h, w]."""
    return int(shape[-2]), int(shape[-1])


def _taken(kind: str, site: Site, before: Hook) -> str:
    name = getattr(before, "__qualname__", type(before).__qualname__)
    which = "self-attention" if kind == "attn1" else "cross-attention"
    return (
        f"another node has replaced the {which} of the model's {site.place} block {site.block} ({name}), which attention "
        "control has to replace too: connect the MODEL from before that node, or leave these layers or steps out"
    )
