"""Each method as one node: subgraph blueprints for the page's node library, built of the step nodes.

Newer hosts list every file of `subgraphs/` by its name; ComfyUI 0.3.64 reads only those that a user saved, so there the files can
be copied into `user/default/subgraphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid5

from .attention import custom
from .blended import loop
from .elements import Fold, Node, Output
from .graph import Graph, inside
from .inversion import invert_image
from .layout import Box, fold_size
from .page_format import FRONTEND, NAMESPACE, Port, fold_id, input_ports, ui_fold, ui_subgraph
from .parts import Start, after, before, encode, negative

SOCKETS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "image": "IMAGE", "mask": "MASK"}
TARGET = "prompt"
Made = tuple[Fold, list[Output]]


def sockets_of(fold: Fold) -> Start:
    """What a blueprint takes from outside. The prompts are its own widgets."""
    info = {"output": list(SOCKETS.values()), "output_name": list(SOCKETS), "input": {}}
    outside = Node(0, "outside", "", info, {})
    return Start(*(Output(outside, slot) for slot in range(len(SOCKETS))), caption="", prompt="")


def _show(fold: Fold, node: Node, **labels: str) -> None:
    for name, label in labels.items():
        fold.show(node, name, label)


def _prompts(graph: Graph, fold: Fold, start: Start, *, pair: bool) -> tuple[Output, Output, Output]:
    """Source, target and negative CONDITIONING, with their texts on the outer node."""
    source = before(graph, start) if pair else None
    target, empty = after(graph, start), negative(graph, start)
    if source is not None:
        _show(fold, source.node, text="source prompt")
    _show(fold, target.node, text="target prompt" if pair else TARGET)
    _show(fold, empty.node, text="negative prompt")
    return source or target, target, empty


def _decode(graph: Graph, start: Start, latent: Output) -> Output:
    return graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out


def inpaint(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """Blended Latent Diffusion with an exact background."""
    blended = loop(graph, start, kernels="1")
    for name, label in (("positive", TARGET), ("negative", "negative prompt")):
        _show(fold, blended.inputs[name].node, text=label)
    _show(fold, blended.inputs["sigmas"].node, steps="steps", strength="strength")
    _show(fold, blended.inputs["latent"].node, seed="seed")
    _show(fold, blended, cfg="cfg")
    edited = _decode(graph, start, blended.out)
    whole = graph.add("EditKit_CompositeSource", edited=edited, source=start.image, mask=start.mask, feather=4)
    return [whole.out]


def differential_diffusion(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """A soft mask: every region changes as much as it is bright."""
    latent = encode(graph, start)
    soft = graph.add("EditKit_LatentMask", mask=start.mask, latent=latent, mode="area", threshold=0.0).out
    schedule = graph.add("EditKit_ReleaseSchedule", latent_mask=soft).out
    _, target, empty = _prompts(graph, fold, start, pair=False)
    sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0)
    noised = graph.add("EditKit_NoiseLatent", model=start.model, latent=latent, sigmas=sigmas.out)
    edited = graph.add(
        "EditKit_BlendedDenoise",
        model=start.model,
        positive=target,
        negative=empty,
        sigmas=sigmas.out,
        latent=noised.out,
        source_latent=latent,
        schedule=schedule,
        cfg=7.0,
    )
    _show(fold, sigmas, steps="steps", strength="strength")
    _show(fold, noised, seed="seed")
    _show(fold, edited, cfg="cfg")
    return [_decode(graph, start, edited.out)]


def diffedit(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """The mask is found from the two prompts."""
    source, target, empty = _prompts(graph, fold, start, pair=True)
    latent = encode(graph, start)
    edited = graph.add(
        "EditKit_DiffEdit", model=start.model, latent=latent, source=source, target=target, negative=empty
    )
    _show(fold, edited, encoding_ratio="encoding ratio", threshold="threshold", cfg="cfg", seed="seed")
    image = _decode(graph, start, edited.out)
    whole = graph.add("EditKit_CompositeSource", edited=image, source=start.image, mask=edited["mask"], feather=4)
    return [whole.out, edited["mask"]]


def sdedit(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """Noise and denoise the whole image."""
    latent = encode(graph, start)
    _, target, empty = _prompts(graph, fold, start, pair=False)
    edited = graph.add("EditKit_SDEdit", model=start.model, positive=target, negative=empty, latent=latent)
    _show(fold, edited, strength="strength", steps="steps", cfg="cfg", seed="seed")
    return [_decode(graph, start, edited.out)]


def _inverted(graph: Graph, start: Start, source: Output) -> tuple[Output, Node]:
    return invert_image(graph, start, encode(graph, start), source)


def prompt_to_prompt(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """A real image, inverted; the prompts differ in a word or more."""
    aligned = graph.add("EditKit_AlignPrompts", clip=start.clip)
    _show(fold, aligned, source_text="source prompt", target_text="target prompt", blend_words="blend words")
    text = graph.add("CLIPTextEncode", "Source prompt", clip=start.clip)
    _show(fold, text, text="source prompt")
    inversion = _inverted(graph, start, text.out)[1]
    empty = negative(graph, start)
    learned = graph.add(
        "EditKit_NegativePrompt", model=start.model, trajectory=inversion.out, positive=text.out, negative=empty
    )
    edited = graph.add(
        "EditKit_P2PlusEdit",
        model=start.model,
        edit=aligned.out,
        negative=learned.out,
        trajectory=inversion.out,
    )
    _show(fold, edited, cfg="cfg", tau_c="cross-attention", tau_s="self-attention")
    return [_decode(graph, start, edited["edited"])]


def _patched(kind: str, **shown: str) -> Callable[[Graph, Fold, Start], list[Output]]:
    """A real image under a model patch: the inverted image twice, of which the second is edited."""

    def build(graph: Graph, fold: Fold, start: Start) -> list[Output]:
        source, target, empty = _prompts(graph, fold, start, pair=True)
        sigmas, inversion = _inverted(graph, start, source)
        patched = graph.add(kind, model=start.model, source=source, target=target, trajectory=inversion.out)
        latent = graph.add("RepeatLatentBatch", samples=inversion["noised latent"], amount=2).out
        noise = graph.add("DisableNoise").out
        sampled = custom(graph, patched, empty, noise, "euler", sigmas, latent)
        _show(fold, patched, **shown)
        images = _decode(graph, start, sampled)
        return [graph.add("ImageFromBatch", "Edited image", image=images, batch_index=1).out]

    return build


def null_text(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """Embeddings that reconstruct the image under guidance, then another prompt."""
    source, target, empty = _prompts(graph, fold, start, pair=True)
    sigmas, inversion = _inverted(graph, start, source)
    learned = graph.add(
        "EditKit_NullText", model=start.model, trajectory=inversion.out, positive=source, negative=empty
    )
    guider = graph.add("EditKit_EmbeddingsGuider", model=start.model, positive=target, embeddings=learned.out)
    _show(fold, learned, inner_steps="inner steps")
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DisableNoise").out,
        guider=guider.out,
        sampler=graph.add("KSamplerSelect", sampler_name="euler").out,
        sigmas=sigmas,
        latent_image=inversion["noised latent"],
    ).out
    return [_decode(graph, start, sampled)]


def flow_edit(graph: Graph, fold: Fold, start: Start) -> list[Output]:
    """Two prompts without inversion and mask."""
    source, target, empty = _prompts(graph, fold, start, pair=True)
    sigmas = graph.add("EditKit_EditSigmas", model=start.model, steps=28, strength=1.0)
    edited = graph.add(
        "EditKit_FlowEdit",
        model=start.model,
        source=source,
        target=target,
        negative=empty,
        latent=encode(graph, start),
        sigmas=sigmas.out,
    )
    _show(fold, edited, source_cfg="source CFG", target_cfg="target CFG", n_max="steps that edit", seed="seed")
    return [_decode(graph, start, edited.out)]


BLUEPRINTS: dict[str, Callable[[Graph, Fold, Start], list[Output]]] = {
    "EditKit Inpaint (Blended Latent Diffusion)": inpaint,
    "EditKit Inpaint with Soft Mask (Differential Diffusion)": differential_diffusion,
    "EditKit Replace Object by Prompts (DiffEdit)": diffedit,
    "EditKit Image to Image (SDEdit)": sdedit,
    "EditKit Word Swap (Prompt-to-Prompt)": prompt_to_prompt,
    "EditKit Change Pose (MasaCtrl)": _patched("EditKit_MasaCtrl", from_step="from step", from_layer="from layer"),
    "EditKit Keep Structure (Plug-and-Play)": _patched(
        "EditKit_FeatureInjection", features_until="features until", attention_until="attention until"
    ),
    "EditKit Edit Real Image (Null-Text Inversion)": null_text,
    "EditKit Two Prompts (FlowEdit)": flow_edit,
}


def build(name: str) -> tuple[Graph, Fold, tuple[list[Port], list[Port]]]:
    """The flat graph of a blueprint, its subgraph, and the subgraph's inputs and outputs."""
    graph = Graph(name, "")
    with graph.group(""), graph.fold(name) as fold:
        given = BLUEPRINTS[name](graph, fold, sockets_of(fold))
    return graph, fold, (input_ports(fold), _named(given))


def _named(outputs: Sequence[Output]) -> list[Port]:
    names = [output.node.info["output_name"][output.slot].lower() for output in outputs]
    return [Port(name, output.kind, source=output) for name, output in zip(names, outputs, strict=True)]


def blueprint(name: str) -> dict[str, Any]:
    """The file: a workflow of one subgraph node."""
    _, fold, ports = build(name)
    kind = fold_id(name, fold)
    definition = ui_subgraph(fold, kind, inside(fold), ports, 1, fold.id + len(fold.nodes))
    doc = (BLUEPRINTS[name].__doc__ or "The edit of a real image.").strip()
    return {
        "id": str(uuid5(NAMESPACE, name)),
        "revision": 0,
        "last_node_id": max(node.id for node in fold.nodes),
        "last_link_id": definition["state"]["lastLinkId"],
        "nodes": [ui_fold(fold, kind, 0, Box(0, 0, *fold_size(fold, *ports)), ports, {}, {})],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [definition]},
        "config": {},
        "extra": {"frontendVersion": FRONTEND, "BlueprintDescription": doc},
        "version": 0.4,
    }
