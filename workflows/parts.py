"""Groups of nodes that several workflows share."""

from __future__ import annotations

from dataclasses import dataclass

from ..hosts.bundled import BUNDLED
from ..hosts.bundled.example_images import load_example
from .elements import Node, Output
from .graph import RESULT, Graph


@dataclass(frozen=True)
class Start:
    """The inputs of an edit. `caption` describes the image, `prompt` the whole image after the edit."""

    model: Output
    clip: Output
    vae: Output
    image: Output
    mask: Output
    caption: str
    prompt: str


def begin(graph: Graph, example: str, model_name: str = BUNDLED) -> Start:
    """The first group: model and image."""
    with graph.group("1. Model and image"):
        model = graph.add("EditKit_LoadModel", model=model_name)
        image = graph.add("EditKit_LoadExample", name=example)
    words = load_example(example)
    return Start(model.out, model["clip"], model["vae"], image.out, image["mask"], words.caption, words.prompt)


def prompts(graph: Graph, start: Start) -> tuple[Output, Output]:
    """Positive and negative CONDITIONING."""
    return after(graph, start), negative(graph, start)


def before(graph: Graph, start: Start) -> Output:
    """CONDITIONING of the source prompt."""
    return graph.add("CLIPTextEncode", "Source prompt", clip=start.clip, text=start.caption).out


def after(graph: Graph, start: Start) -> Output:
    """CONDITIONING of the target prompt."""
    return graph.add("CLIPTextEncode", "Target prompt", clip=start.clip, text=start.prompt).out


def negative(graph: Graph, start: Start) -> Output:
    """CONDITIONING of the negative prompt."""
    return graph.add("CLIPTextEncode", "Negative prompt", clip=start.clip, text="").out


def encode(graph: Graph, start: Start) -> Output:
    """The encoded image."""
    return graph.add("EditKit_EncodeImage", image=start.image, vae=start.vae).out


def latent_and_mask(graph: Graph, start: Start, mode: str = "max") -> tuple[Output, Output]:
    """The encoded image and its latent mask."""
    latent = encode(graph, start)
    return latent, graph.add("EditKit_LatentMask", mask=start.mask, latent=latent, mode=mode).out


def rank(graph: Graph, start: Start, latent: Output, text: str) -> Node:
    """Decode the candidates and keep the one with the best CLIP score under the mask."""
    with graph.group("3. Rank the candidates"):
        candidates = graph.add("EditKit_DecodeLatent", "Decode all candidates", latent=latent, vae=start.vae).out
        ranker = graph.add("EditKit_LoadRanker").out
        graph.add("PreviewImage", "All candidates", images=candidates)
        ranked = graph.add(
            "EditKit_RankByText",
            images=candidates,
            ranker=ranker,
            text=text,
            keep=1,
            mask=start.mask,
            latent=latent,
        )
        graph.add("PreviewAny", "CLIP score", source=ranked["scores"])
    return ranked


def finish(graph: Graph, start: Start, latent: Output, edited: Output, *, title: str, file: str) -> Output:
    """Fine-tune the decoder, composite over the source and save. Returns the finished IMAGE."""
    source, mask = start.image, start.mask
    with graph.group(title):
        tuned = graph.add("EditKit_TuneDecoder", vae=start.vae, latent=latent, source=source, mask=mask, edited=edited)
        whole = composite(graph, start, tuned["image"])
        graph.add("SaveImage", images=whole, filename_prefix=f"editkit/{file}")
        graph.add("PreviewAny", "PSNR before and after", source=tuned["report"])
    return whole


def composite(graph: Graph, start: Start, edited: Output) -> Output:
    """Composite over the source and show the largest change outside. Returns the finished IMAGE."""
    whole = graph.add("EditKit_CompositeSource", edited=edited, source=start.image, mask=start.mask)
    graph.add("PreviewAny", "Largest change outside the mask", source=whole["largest change outside"])
    return whole.out


def decode(graph: Graph, start: Start, latent: Output, title: str = "3. Decode") -> Output:
    """The plain decode, shown."""
    with graph.group(title):
        edited = graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out
        graph.add("PreviewImage", "Plain VAE decode", images=edited)
    return edited


def save(graph: Graph, start: Start, latent: Output, file: str) -> None:
    """The plain decode, saved."""
    image = graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out
    label = file.removeprefix(graph.name).strip("_")
    graph.add("SaveImage", f"{RESULT}: {label}" if label else None, images=image, filename_prefix=f"editkit/{file}")
