"""What random calls connect: one valid value of every socket type, made by the nodes themselves, and altered ones."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from editkit.headless.run import Run
from editkit.headless.runner import _execute, node_classes
from editkit.hosts.diffusers.host import headless_run
from editkit.pipelines.core.errors import EditError, ShapeError
from editkit.pipelines.core.shapes import check_image, check_mask, refuse_nan
from editkit.tests.nodes.fuzz_changes import CHANGES, Value, stained, unchanged

log = logging.getLogger(__name__)
Pools = dict[str, list[Any]]

SIDE = 48  # pixels: 6 latent pixels of the bundled model
SOURCE, TARGET = "a red circle on a blue background", "a green square on a blue background"
# Widgets that cost time have their smallest useful value in a valid call.
SMALL = {
    "steps": 2,
    "inner_steps": 1,
    "embedding_steps": 1,
    "iterations": 2,
    "maps": 1,
    "copies": 2,
    "rank": 2,
    "patience": 0,
    "last_blocks": 1,
    "strength": 1.0,
    "sampler_name": "euler",
    "scheduler": "ddim_uniform",
    "text": SOURCE,
    "source_text": SOURCE,
    "target_text": TARGET,
    "filename_prefix": "fuzz",
    "image": "image.png",
    "channel": "red",
}  # fmt: skip
SEEDS = {"seed", "noise_seed"}
# Optional inputs without which a node refuses every call.
NEEDED = {"AttentionMaps": "trajectory", "P2PlusEdit": "trajectory", "LatentMask": "latent"}
ON_THE_LATENT_GRID = {"latent_mask"}
FIRST = (
    "EditKit_LoadExample", "EditKit_LoadModel", "EditKit_LoadRanker", "EditKit_EncodeImage", "EditKit_LatentMask",
    "CLIPTextEncode", "EditKit_EditSigmas", "EditKit_InvertDDIM", "EditKit_StyleInvert",
)  # fmt: skip
ATTEMPTS = 100
KEPT = 3  # values of one type in the pools
# Stock nodes that feed ours or take their results: the types of their sockets are not in a schema.
STOCK_SOCKETS = {
    "model": "MODEL", "clip": "CLIP", "vae": "VAE", "images": "IMAGE", "pixels": "IMAGE", "samples": "LATENT",
    "latent_image": "LATENT", "positive": "CONDITIONING", "negative": "CONDITIONING", "guider": "GUIDER", "sigmas": "SIGMAS",
    "mask": "MASK", "conditioning": "CONDITIONING", "noise": "NOISE",
}  # fmt: skip
STOCK = {
    "LoadImage": ("IMAGE", "MASK"), "LoadImageMask": ("MASK",), "SaveImage": (), "CLIPTextEncode": ("CONDITIONING",),
    "ConditioningZeroOut": ("CONDITIONING",), "VAEEncode": ("LATENT",), "VAEDecode": ("IMAGE",),
    "RepeatLatentBatch": ("LATENT",), "KSampler": ("LATENT",), "SamplerCustomAdvanced": ("LATENT", "LATENT"),
    "InvertMask": ("MASK",),
}  # fmt: skip
STOCK_WIDGETS: dict[str, dict[str, Any]] = {
    "LoadImageMask": {"channel": "red"},
    "RepeatLatentBatch": {"amount": 2},
    "KSampler": {"cfg": 4.0, "seed": 1, "denoise": 1.0},
    "SamplerCustomAdvanced": {"sampler": "euler"},
}
TEXTS = (
    "", " ", SOURCE, TARGET, "a\x00b", "\ud800", "ü" * 300, "(red:1.5), [x|y]", "red:nan", "1:0.2-0.9", "9" * 40, "0.1 0.2",
    "circle=3", "word " * 100,
)  # fmt: skip
NAMES = (
    "", ".", "..", "../out", "/x/y", "a/b", "a//b/", "portrait [v2]", "**", "nul\x00", "x" * 300, "\ud800", "con", "C:\\x",
    "~", "%date%", "u_²", " ", "-rf", "image.png", "missing.png", "a/../../image.png", "embeddings_00001_.safetensors",
)  # fmt: skip
FLOATS = (0.0, 1.0, 0.5, -0.1, 1.1, 1e-9, 1e9, math.nan, math.inf, -math.inf)


@dataclasses.dataclass
class Field:
    """An input of a node: its id, socket types or widget kind, and what its schema allows."""

    name: str
    types: tuple[str, ...]
    optional: bool = False
    default: Any = None
    lowest: float | None = None
    highest: float | None = None
    options: tuple[Any, ...] = ()


@dataclasses.dataclass
class Node:
    """A node class with its inputs and the types of its outputs."""

    name: str
    cls: Any
    fields: list[Field]
    outputs: tuple[str, ...]


def fuzzed_nodes() -> list[Node]:
    """Every node of ours but the loaders of models, and the stock nodes around them."""
    classes = node_classes()
    nodes = []
    for name, cls in classes.items():
        if name.startswith("EditKit_"):
            schema = cls.define_schema()
            fields = [_field(entry) for entry in schema.inputs]
            nodes.append(Node(name, cls, fields, tuple(entry.get_io_type() for entry in schema.outputs)))
        elif name in STOCK:
            nodes.append(Node(name, cls, _stock_fields(name, cls), STOCK[name]))
    return sorted(nodes, key=lambda node: node.name)


def _field(entry: Any) -> Field:
    return Field(
        entry.id,
        tuple(entry.get_io_type().split(",")),
        bool(getattr(entry, "optional", False)),
        getattr(entry, "default", None),
        getattr(entry, "min", None),
        getattr(entry, "max", None),
        tuple(getattr(entry, "options", None) or ()),
    )


def _stock_fields(name: str, cls: Any) -> list[Field]:
    import inspect

    fields = []
    for parameter in list(inspect.signature(cls).parameters.values())[1:]:
        socket = STOCK_SOCKETS.get(parameter.name)
        default = STOCK_WIDGETS.get(name, {}).get(parameter.name, SMALL.get(parameter.name))
        kind = {int: "INT", float: "FLOAT"}.get(type(default), "STRING")
        fields.append(Field(parameter.name, (socket or kind,), default=default))
    return fields


def harvested(run: Run, nodes: list[Node]) -> tuple[Pools, dict[str, dict[str, Value]]]:
    """Values of every socket type, and a valid call of every node: nodes run on each other's results."""
    pools: Pools = {"NOISE": [1, None]}
    calls: dict[str, dict[str, Value]] = {}
    random = Random(0)
    waiting = sorted(
        nodes, key=lambda node: (node.name not in FIRST, FIRST.index(node.name) if node.name in FIRST else 0)
    )
    for attempt in range(ATTEMPTS):
        optional = (0.0, 1.0, 0.0, 0.3)[min(attempt, 3)]
        for node in list(waiting):
            inputs = valid_inputs(node, pools, random, optional, first=attempt < 2)
            if inputs is None:
                continue
            try:
                results = execute(node, inputs, run)
            except EditError as error:
                log.debug("%s is not ready: %s", node.name, error)
                continue
            waiting.remove(node)
            calls[node.name] = inputs
            _keep(node, results, pools)
    return pools, calls


def _keep(node: Node, results: tuple[Any, ...], pools: Pools) -> None:
    """Add a node's results to the pools, under their types."""
    for kind, value in zip(node.outputs, results, strict=False):
        if node.name == "EditKit_SaveEmbeddings":
            pools["file"] = [value]
        kept = pools.setdefault(kind, [])
        grids = [entry.shape[-1] for entry in kept] if kind == "MASK" else []
        value = _small(kind, value)
        if value is not None and (len(kept) < KEPT or (kind == "MASK" and value.shape[-1] not in grids)):
            kept.append(value)
    if "EDITKIT_RANKER" in pools:
        pools["CLIP_VISION"] = pools["EDITKIT_RANKER"]


def _small(kind: str, value: Value) -> Value:
    """Images and masks of the examples cut to a few latent pixels: the source of everything else."""
    if kind == "IMAGE" and isinstance(value, Tensor) and min(value.shape[1:3]) > SIDE:
        return value[:, :SIDE, :SIDE].clone()
    if kind == "MASK" and isinstance(value, Tensor) and min(value.shape[1:]) > SIDE:
        return value[:, :SIDE, -SIDE:].clone()
    return value


def execute(node: Node, inputs: Mapping[str, Value], run: Run) -> tuple[Any, ...]:
    """Run a node as the headless runner does: widgets as JSON holds them, the rest as links."""
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    kinds = {field.name: field.types for field in node.fields}
    linked = [name for name in inputs if not widgets & set(kinds[name])]
    run.results["pool"] = tuple(inputs[name] for name in linked)
    entry = {name: ["pool", linked.index(name)] if name in linked else value for name, value in inputs.items()}
    with headless_run(run.output_folder):
        return _execute(node.cls, {"class_type": node.name, "inputs": entry}, "1", run)


def valid_inputs(
    node: Node, pools: Pools, random: Random, optional: float, *, first: bool = False
) -> dict[str, Value] | None:
    """Inputs from the schema's defaults and the pools; None while a type is missing.

    Args:
        node: the node to call.
        pools: values by socket type.
        random: chooses among them.
        optional: probability of each optional input, 0 to 1.
        first: whether to take the first value of a type.
    """
    inputs: dict[str, Value] = {}
    for field in node.fields:
        widget = field.default if field.default is not None else next(iter(field.options), None)
        if field.name in SMALL and (not field.options or SMALL[field.name] in field.options):
            widget = SMALL[field.name] if not {"IMAGE"} & set(field.types) else None
        if (
            field.optional
            and random.random() >= optional
            and NEEDED.get(node.name.removeprefix("EditKit_")) != field.name
        ):
            continue
        if widget is not None:
            inputs[field.name] = widget
            continue
        found = [value for kind in (*field.types, field.name) for value in pools.get(kind, [])]
        if "MASK" in field.types:
            grid = [
                value
                for value in found
                if not isinstance(value, Tensor) or (value.shape[-1] < SIDE) == (field.name in ON_THE_LATENT_GRID)
            ]
            found = grid or ([] if field.name in ON_THE_LATENT_GRID else found)
        if found:
            inputs[field.name] = found[0] if first else random.choice(found)
        elif "STRING" in field.types:
            inputs[field.name] = ""
        elif not field.optional:
            return None
    return inputs


def altered(value: Value, field: Field, pools: Pools, random: Random) -> Value:
    """Another value for an input: another one of its type, a changed one, or a widget at its ends and beyond."""
    if isinstance(value, bool):
        return random.choice([not value, "yes", 1, None])
    if "INT" in field.types:
        return _whole_number(field, random)
    if "FLOAT" in field.types:
        return random.choice([*FLOATS, *(x for x in (field.lowest, field.highest) if x is not None)])
    if field.options or {"STRING", "COMBO"} & set(field.types):
        texts = NAMES if field.name in {"filename_prefix", "image", "file", "model", "weights"} else TEXTS
        return random.choice([*field.options, *texts, 3, None])
    others = [other for kind in field.types for other in pools.get(kind, [])]
    value = random.choice([value, *others])
    return random.choice(CHANGES.get(field.types[0], [unchanged, stained]))(value, random)


def _whole_number(field: Field, random: Random) -> Any:
    if field.name in SEEDS:
        return random.choice([0, 7, 2**32 + 7, 2**63, 2**64 - 1, 2**64, -1, 1.5])
    low = 0 if field.lowest is None else int(field.lowest)
    wide = [low, low + 1, low + 2, low - 1, -(2**31), 1.5, True, None, "3"]
    if field.name not in SMALL and field.highest is not None:
        wide += [min(int(field.highest), 64)]
    return random.choice(wide)


def tensors(value: Value) -> list[Tensor]:
    """Every tensor in a result, also inside dictionaries and dataclasses, without those of networks."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [found for inner in value.values() for found in tensors(inner)]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in tensors(inner)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [found for field in dataclasses.fields(value) for found in tensors(getattr(value, field.name))]
    return []


def wrong_result(node: Node, results: tuple[Any, ...]) -> str:
    """What is wrong with a node's outputs; empty where every tensor is finite, and images, masks and latents are such."""
    checks = {"IMAGE": check_image, "MASK": check_mask}
    try:
        for kind, value in zip(node.outputs, results, strict=False):
            for tensor in tensors(value):
                refuse_nan(tensor, kind)
                if kind in checks:
                    checks[kind](tensor, kind)
    except ShapeError as error:
        return f"the result is refused: {error}"
    return ""


def shown(value: Value) -> str:
    """A value in a line of a report."""
    if isinstance(value, Tensor):
        finite = "" if not value.is_floating_point() or torch.isfinite(value).all() else " not finite"
        return f"{value.dtype}{list(value.shape)}{finite}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value[:4])) + "]"
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else type(value).__name__


def random_call(node: Node, valid: Mapping[str, Value], pools: Pools, random: Random) -> dict[str, Value]:
    """A valid call with one to three of its inputs altered, or with any values at all.

    Args:
        node: the node to call.
        valid: inputs that it accepts.
        pools: values by socket type.
        random: chooses.
    """
    inputs = dict(valid)
    if random.random() < 0.4 or not valid:
        others = valid_inputs(node, pools, random, optional=0.5) or {}
        inputs |= {name: value for name, value in others.items() if name not in inputs or random.random() < 0.3}
    by_name = {field.name: field for field in node.fields}
    count = min(len(inputs), random.choice([1, 1, 2, 3]))
    for name in random.sample(sorted(inputs), count):
        inputs[name] = altered(inputs[name], by_name[name], pools, random)
    return inputs


__all__ = ["execute", "fuzzed_nodes", "harvested", "random_call", "shown", "tensors", "wrong_result"]
