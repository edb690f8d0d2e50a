"""What the workflows are put together from: the groups that they share."""

from __future__ import annotations

from dataclasses import dataclass

from ..hosts.bundled.example_images import load_example
from .elements import Node, Output
from .graph import Graph


@dataclass(frozen=True)
class Start:
    """What an edit begins with. `caption` describes the picture, `prompt` the whole picture after the edit."""

    model: Output
    clip: Output
    vae: Output
    image: Output
    mask: Output
    caption: str
    prompt: str


def begin(graph: Graph, example: str) -> Start:
    """The first group: model and picture."""
    with graph.group("1. Model and picture"):
        model = graph.add("EditKit_LoadModel")
        image = graph.add("EditKit_LoadExample", name=example)
    words = load_example(example)
    return Start(
        model.out, model["clip"], model["vae"], image.out, image["mask"], words.caption, words.prompt
    )  # fmt: skip


def prompts(graph: Graph, start: Start) -> tuple[Output, Output]:
    """Positive and negative CONDITIONING."""
    return after(graph, start), negative(graph, start)


def before(graph: Graph, start: Start) -> Output:
    """CONDITIONING of the picture as it is."""
    return graph.add("CLIPTextEncode", "Prompt: the picture as it is", clip=start.clip, text=start.caption).out


def after(graph: Graph, start: Start) -> Output:
    """CONDITIONING of the picture as it shall be."""
    return graph.add("CLIPTextEncode", "Prompt: the picture after the edit", clip=start.clip, text=start.prompt).out


def negative(graph: Graph, start: Start) -> Output:
    """CONDITIONING to move away from."""
    return graph.add("CLIPTextEncode", "Negative prompt", clip=start.clip, text="").out


def encode(graph: Graph, start: Start) -> Output:
    """The encoded picture."""
    return graph.add("EditKit_EncodeImage", image=start.image, vae=start.vae).out


def latent_and_mask(graph: Graph, start: Start, mode: str = "max") -> tuple[Output, Output]:
    """The encoded picture and the mask on its grid."""
    latent = encode(graph, start)
    return latent, graph.add("EditKit_LatentMask", mask=start.mask, latent=latent, mode=mode).out


def rank(graph: Graph, start: Start, latent: Output, text: str) -> Node:
    """Decode the candidates and keep the one that, under the mask, agrees best with a text."""
    with graph.group("3. Rank the candidates"):
        candidates = graph.add("EditKit_DecodeLatent", "Decode every candidate", latent=latent, vae=start.vae).out
        ranker = graph.add("EditKit_LoadRanker").out
        graph.add("PreviewImage", "All candidates, as drawn", images=candidates)
        graph.column()
        ranked = graph.add(
            "EditKit_RankByText", images=candidates, ranker=ranker, text=text, keep=1, mask=start.mask,
            latent=latent,
        )  # fmt: skip
        graph.add("PreviewAny", "Its score", source=ranked["scores"])
    return ranked


def finish(graph: Graph, start: Start, latent: Output, edited: Output, *, title: str, file: str) -> Output:
    """Tune the decoder to this picture, put the source back outside the mask, save; returns the finished IMAGE."""
    source, mask = start.image, start.mask
    with graph.group(title):
        tuned = graph.add("EditKit_TuneDecoder", vae=start.vae, latent=latent, source=source, mask=mask, edited=edited)
        graph.column()
        whole = composite(graph, start, tuned["image"])
        graph.column()
        graph.add("SaveImage", images=whole, filename_prefix=f"editkit/{file}")
        graph.add("PreviewAny", "What the tuned decoder gained", source=tuned["report"])
    return whole


def composite(graph: Graph, start: Start, edited: Output) -> Output:
    """The source back outside the mask, and the proof of it; returns the finished IMAGE."""
    whole = graph.add("EditKit_CompositeSource", edited=edited, source=start.image, mask=start.mask)
    graph.add("PreviewAny", "Largest change outside the mask", source=whole["largest change outside"])
    return whole.out


def decode(graph: Graph, start: Start, latent: Output, title: str = "3. Decode") -> Output:
    """The plain decode, shown."""
    with graph.group(title):
        edited = graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out
        graph.add("PreviewImage", "Plain decode", images=edited)
    return edited


def save(graph: Graph, start: Start, latent: Output, file: str) -> None:
    """The plain decode, saved."""
    image = graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out
    graph.add("SaveImage", images=image, filename_prefix=f"editkit/{file}")
