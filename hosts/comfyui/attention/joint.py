"""Attention control in native networks with joint attention: SD3 (MMDiT) and Flux, for one model call at a time.

Nothing is patched. The options of one model call carry a wrapper around it, which replaces every block by one that runs the
original with an attention override (`optimized_attention_override`) of its own. Block replacements and overrides that were
there before are called, and compute the attention that a control asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from torch import Tensor

from ....pipelines.core.attention_sites import Attention, AttentionControl, Controlled, Row, Site, check_joint, third
from ....pipelines.core.errors import FamilyError, MismatchError
from ..patch_keys import ATTENTION_KEY

MODEL_CALL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
OVERRIDE = "optimized_attention_override"
ARGUMENTS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of an attention function, after `heads`
Block = tuple[str, int]  # ComfyUI's name of the kind of a block, and its number
Hook = Callable[..., Any]


@dataclass(frozen=True)
class JointLayers:
    """The blocks of a network with joint attention, in order of execution.

    Attributes:
        network: ComfyUI's name of its family.
        blocks: as `patches_replace` names them.
        patch: latent pixels on a side of one image token.
    """

    network: str
    blocks: tuple[Block, ...]
    patch: int


def joint_layers(model: Any) -> JointLayers | None:
    """The blocks of a MODEL; None where its network is of another kind."""
    network = model.get_model_object("diffusion_model")
    counts: dict[str, int] = {}
    if isinstance(network, MMDiT):
        counts = {"double_block": len(network.joint_blocks)}
    elif type(network) is Flux:
        counts = {"double_block": len(network.double_blocks), "single_block": len(network.single_blocks)}
    if not counts:
        return None
    blocks = tuple((kind, number) for kind, count in counts.items() for number in range(count))
    return JointLayers(type(model.model).__name__, blocks, int(network.patch_size))


def joint_options(options: dict, controlled: Controlled, layers: JointLayers, sigma: float) -> dict:
    """A copy of the options of one model call, with `controlled` in force.

    Args:
        options: model options of the run.
        controlled: its contexts are counted as the conditions of the model call.
        layers: of the MODEL.
        sigma: of the model call.
    Returns: the options for one model call; `options` does not change.
    Raises: FamilyError for a control that does not know joint attention.
    """
    check_joint(controlled.control, layers.network)

    def apply_model(
        executor: Any,
        x: Tensor,
        t: Any,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **named: Any,
    ) -> Any:
        given = {} if transformer_options is None else transformer_options
        rows = tuple(row for chunk in given["cond_or_uncond"] for row in controlled.rows.chunk(chunk))
        call = JointCall(controlled.control, layers, rows, sigma, (int(x.shape[-2]), int(x.shape[-1])))
        return executor(x, t, c_concat, c_crossattn, control, call.hooked(given), **named)

    to = options.get("transformer_options", {})
    wrappers = to.get("wrappers", {})
    wrappers = {**wrappers, MODEL_CALL: {**wrappers.get(MODEL_CALL, {}), ATTENTION_KEY: [apply_model]}}
    return {**options, "transformer_options": {**to, "wrappers": wrappers}}


class JointCall:
    """The hooks of one network call; `rows` says what every row of its batch is."""

    def __init__(
        self,
        control: AttentionControl,
        layers: JointLayers,
        rows: tuple[Row, ...],
        sigma: float,
        latent_pixels: tuple[int, int],
    ) -> None:
        self.control = control
        self.layers = layers
        self.rows = rows
        self.sigma = sigma
        self.latent_pixels = latent_pixels
        self.text = 0
        """Text tokens; a single block has them before the image tokens and does not say how many."""

    def hooked(self, options: dict) -> dict:
        """The call's transformer options with every block replaced by ours, which runs what it replaces."""
        replaced = options.get("patches_replace", {})
        before = replaced.get("dit", {})
        own = {block: self._block(block, before.get(block)) for block in self.layers.blocks}
        return {**options, "patches_replace": {**replaced, "dit": {**before, **own}}}

    def _block(self, block: Block, before: Hook | None) -> Hook:
        def hook(args: dict, extra: dict) -> Any:
            if args.get("txt") is not None:
                self.text = args["txt"].shape[1]
            options = args["transformer_options"]
            override = _Override(self, block, options.get(OVERRIDE))
            args = {**args, "transformer_options": {**options, OVERRIDE: override}}
            return extra["original_block"](args) if before is None else before(args, extra)

        return hook

    def site(self, block: Block, depth: int, tokens: int, attention: Attention) -> Site:
        """The site of one attention of a block.

        Args:
            block: ComfyUI's name of the kind of the block, and its number.
            depth: 0 for the joint attention, 1 for a second one, among image tokens.
            tokens: of the attention.
            attention: the host's own function.
        Returns: the site, with the rows and the sigma of the call.
        Raises: MismatchError for another number of tokens than text and image have.
        """
        order, count = self.layers.blocks.index(block), len(self.layers.blocks)
        height, width = (-(-side // self.layers.patch) for side in self.latent_pixels)
        text = 0 if depth else self.text
        if tokens != text + height * width:
            raise MismatchError(
                f"{self.layers.network} has {tokens} tokens in a layer, not {text} of text and {height} x {width} of the "
                "image: another node adds tokens (reference images, IPAdapter); connect the MODEL and the prompts without it"
            )
        return Site(
            place=third(order, count),
            block=order,
            blocks=count,
            depth=depth,
            order=order,
            layers=count,
            grid=(height, width),
            latent_pixels=self.latent_pixels,
            cross=False,
            sigma=self.sigma,
            rows=self.rows,
            text=text,
            attention=attention,
        )


class _Override:
    """The attention of one block of one call; `before` is the override that was there."""

    def __init__(self, call: JointCall, block: Block, before: Hook | None) -> None:
        self.call = call
        self.block = block
        self.before = before
        self.calls = 0

    def __call__(self, func: Hook, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **named: Any) -> Tensor:
        """See `comfy.ldm.modules.attention.wrap_attn`: an attention function and its arguments."""
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **named}
        split = given.get("skip_reshape", False)
        depth, self.calls = self.calls, self.calls + 1

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._original(func, q, k, v, heads, **{**given, "skip_reshape": True, "skip_output_reshape": True})

        site = self.call.site(self.block, depth, q.shape[2 if split else 1], attention)
        if not self.call.control.wants(site):
            return self._original(func, q, k, v, heads, **given)
        self._check(q, given.get("mask"))
        queries, keys, values = (x if split else _split(x, heads) for x in (q, k, v))
        out = self.call.control.attend(queries, keys, values, site)
        if out is None:
            return self._original(func, q, k, v, heads, **given)
        out = out.to(q.dtype)
        return out if given.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    def _original(self, func: Hook, *args: Any, **named: Any) -> Tensor:
        return func(*args, **named) if self.before is None else self.before(func, *args, **named)

    def _check(self, q: Tensor, mask: Tensor | None) -> None:
        if len(q) != len(self.call.rows):
            raise MismatchError(
                f"a layer of {self.call.layers.network} has {len(q)} rows but the call has {len(self.call.rows)}: another "
                "node changes the batch; connect the MODEL from before it"
            )
        if mask is not None:
            raise FamilyError(
                f"{self.call.layers.network} runs with an attention mask, which attention control does not know: connect "
                "prompts without one"
            )


def _split(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads * d] as [rows, heads, tokens, d]; some networks have split the heads of the values before."""
    return x.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
