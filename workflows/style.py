"""The workflows of StyleDiffusion: an edit and a style transfer."""

from __future__ import annotations

from dataclasses import replace

from ..hosts.bundled.example_images import load_example
from .attention import align
from .elements import Node, Output
from .graph import RESULT, Graph
from .notes import note
from .parts import Start, before, begin, encode, negative, save

CFG = 7.5  # as published
STEPS, LEARNING = 20, {"preset": "even", "inner_steps": 15}  # enough for the bundled model


def _invert(graph: Graph, start: Start, sigmas: Output) -> tuple[Output, Node]:
    """The prompt of an image, and its inversion."""
    with graph.fold("Invert the image") as fold:
        latent, source = encode(graph, start), before(graph, start)
        fold.show(source.node, "text", "source prompt")
        inverted = graph.add("EditKit_InvertDDIM", model=start.model, positive=source, latent=latent, sigmas=sigmas)
    return source, inverted


def _learn(graph: Graph, start: Start, inversion: Node, source: Output, empty: Output) -> Node:
    """The value embeddings of an image, with the bundled ranker as image encoder."""
    ranker = graph.add("EditKit_LoadRanker").out
    learned = graph.add(
        "EditKit_StyleInvert",
        model=start.model,
        trajectory=inversion.out,
        positive=source,
        negative=empty,
        image=start.image,
        image_encoder=ranker,
        cfg=CFG,
        **LEARNING,
    )
    graph.add("PreviewAny", "Report", source=learned["report"])
    return learned


def style_inversion_edit() -> Graph:
    graph = Graph("style_inversion_edit", note("style_inversion_edit", mask=False, ranker=True))
    start = begin(graph, "red_circle")
    with graph.group("2. Invert the image"):
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, steps=STEPS, strength=1.0).out
        empty = negative(graph, start)
        source, inversion = _invert(graph, start, sigmas)
    with graph.group("3. Learn the value embeddings"):
        learned = _learn(graph, start, inversion, source, empty)
        graph.add("EditKit_SaveEmbeddings", embeddings=learned.out, filename_prefix="red_circle")
        save(graph, start, learned["reconstruction"], "style_inversion_edit_reconstructed")
    with graph.group("4. Edit"):
        edit = align(graph, start)
        for name, title, options in (
            ("edited", "Edit the inverted image", {}),
            ("sdedit", "Edit the noised image", {"sdedit_strength": 0.7}),
        ):
            with graph.fold(title) as fold:
                edited = graph.add(
                    "EditKit_StyleEdit",
                    model=start.model,
                    embeddings=learned.out,
                    edit=edit,
                    negative=empty,
                    cfg=CFG,
                    **options,
                )
                for shown in ("cfg", "tau_v", "tau_c", "tau_s"):
                    fold.show(edited, shown, shown)
                image = graph.add("EditKit_DecodeLatent", latent=edited["edited"], vae=start.vae).out
            file = f"style_inversion_edit_{name}"
            graph.add("SaveImage", f"{RESULT}: {name}", images=image, filename_prefix=f"editkit/{file}")
    return graph


def style_transfer() -> Graph:
    graph = Graph("style_transfer", note("style_transfer", mask=False, ranker=True))
    start, words = begin(graph, "empty_side"), load_example("one_object")
    with graph.group("2. Invert the content image"):
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, steps=STEPS, strength=1.0).out
        source, inversion = _invert(graph, start, sigmas)
    with graph.group("3. Learn the style"):
        image = graph.add("EditKit_LoadExample", "Style image", name="one_object")
        style = replace(start, image=image.out, mask=image["mask"], caption=words.caption)
        empty = negative(graph, start)
        shown, inverted = _invert(graph, style, sigmas)
        learned = _learn(graph, style, inverted, shown, empty)
    with graph.group("4. Style transfer"):
        text = words.caption.replace("circle", "ring")
        target = graph.add("CLIPTextEncode", "Target prompt", clip=start.clip, text=text).out
        styled = graph.add(
            "EditKit_StyleTransfer",
            model=start.model,
            embeddings=learned.out,
            trajectory=inversion.out,
            source=source,
            target=target,
            negative=empty,
            cfg=CFG,
        ).out
        save(graph, style, learned["reconstruction"], "style_transfer_style")
        save(graph, start, styled, "style_transfer_styled")
    return graph


WORKFLOWS = (style_inversion_edit, style_transfer)
