"""The workflows that ship with EditKit, all on the bundled model, so that they run anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..pipelines.examples import load_example
from .graph import Graph, Node, Output
from .notes import note

NEW_OBJECT = "a yellow star on a sky background"  # what the mask of `empty_side` should hold


@dataclass(frozen=True)
class Start:
    """What an edit begins with. `prompt` describes the whole picture after it."""

    model: Output
    clip: Output
    vae: Output
    image: Output
    mask: Output
    prompt: str


def begin(graph: Graph, example: str) -> Start:
    """The first group: model and picture."""
    with graph.group("1. Model and picture"):
        model = graph.add("EditKit_LoadModel")
        picture = graph.add("EditKit_LoadExample", name=example)
    prompt = load_example(example).prompt
    return Start(model.out, model["clip"], model["vae"], picture.out, picture["mask"], prompt)


def prompts(graph: Graph, start: Start) -> tuple[Output, Output]:
    """Positive and negative CONDITIONING."""
    positive = graph.add("CLIPTextEncode", "Prompt: the picture after the edit", clip=start.clip, text=start.prompt)
    negative = graph.add("CLIPTextEncode", "Negative prompt", clip=start.clip, text="")
    return positive.out, negative.out


def latent_and_cells(graph: Graph, start: Start, mode: str = "max") -> tuple[Output, Output]:
    """The encoded picture and the mask on its grid."""
    latent = graph.add("EditKit_EncodeImage", image=start.image, vae=start.vae).out
    return latent, graph.add("EditKit_LatentMask", mask=start.mask, latent=latent, mode=mode).out


def blended_loop(
    graph: Graph,
    start: Start,
    title: str,
    *,
    strength: float = 1.0,
    mode: str = "max",
    kernels: str = "7,5,3,1",
    seed: int = 0,
    copies: int = 1,
) -> Output:
    """The steps of the blended loop, each its own node, in one group; returns the finished LATENT."""
    model = start.model
    with graph.group(title):
        latent, cells = latent_and_cells(graph, start, mode)
        sigmas = graph.add("EditKit_EditSigmas", model=model, strength=strength).out
        graph.column()
        schedule = graph.add("EditKit_DilationSchedule", latent_mask=cells, kernels=kernels).out
        graph.column()
        positive, negative = prompts(graph, start)
        noised = graph.add("EditKit_NoiseLatent", model=model, latent=latent, sigmas=sigmas, seed=seed, copies=copies)
        graph.column()
        return graph.add(
            "EditKit_BlendedDenoise", model=model, positive=positive, negative=negative, sigmas=sigmas,
            latent=noised.out, source_latent=latent, schedule=schedule, seed=seed,
        ).out  # fmt: skip


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
        whole = graph.add("EditKit_CompositeSource", edited=tuned["image"], source=source, mask=mask)
        graph.add("PreviewAny", "Largest change outside the mask", source=whole["largest change outside"])
        graph.column()
        graph.add("SaveImage", images=whole.out, filename_prefix=f"editkit/{file}")
        graph.add("PreviewAny", "What the tuned decoder gained", source=tuned["report"])
    return whole.out


def decode(graph: Graph, start: Start, latent: Output, title: str = "3. Decode") -> Output:
    """The plain decode, shown."""
    with graph.group(title):
        edited = graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out
        graph.add("PreviewImage", "Plain decode", images=edited)
    return edited


def blended_edit() -> Graph:
    graph = Graph("blended_edit", note("blended_edit", ranker=True))
    start = begin(graph, "empty_side")
    latent = blended_loop(graph, start, "2. Blended loop, four candidates", copies=4)
    graph.row()
    ranked = rank(graph, start, latent, NEW_OBJECT)
    finish(graph, start, ranked["latent"], ranked["images"], title="4. The background, exactly", file="blended_edit")
    return graph


def blended_any_sampler() -> Graph:
    graph = Graph("blended_any_sampler", note("blended_any_sampler"))
    start = begin(graph, "empty_side")
    with graph.group("2. The mask, on the latent grid"):
        latent, cells = latent_and_cells(graph, start)
        graph.column()
        schedule = graph.add("EditKit_DilationSchedule", latent_mask=cells).out
    graph.row()
    with graph.group("3. A native sampler"):
        model = graph.add("EditKit_BlendedModel", model=start.model, schedule=schedule).out
        positive, negative = prompts(graph, start)
        graph.column()
        sampled = graph.add(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, steps=50, cfg=5.0,
            sampler_name="dpmpp_2m", scheduler="ddim_uniform",
        ).out  # fmt: skip
        edited = graph.add("EditKit_DecodeLatent", latent=sampled, vae=start.vae).out
    finish(graph, start, sampled, edited, title="4. The background, exactly", file="blended_any_sampler")
    return graph


def thin_mask() -> Graph:
    graph = Graph("thin_mask", note("thin_mask"))
    start = begin(graph, "thin_stroke")
    with graph.group("2. What both loops share"):
        latent, cells = latent_and_cells(graph, start)
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0).out
        graph.column()
        positive, negative = prompts(graph, start)
        noised = graph.add("EditKit_NoiseLatent", model=start.model, latent=latent, sigmas=sigmas).out
    graph.row()
    for name, kernels, title in (("plain", "1", "3. Plain loop"), ("shrinking", "7,5,3,1", "4. Shrinking mask")):
        with graph.group(title):
            schedule = graph.add("EditKit_DilationSchedule", latent_mask=cells, kernels=kernels).out
            graph.column()
            edited = graph.add(
                "EditKit_BlendedDenoise", model=start.model, positive=positive, negative=negative, sigmas=sigmas,
                latent=noised, source_latent=latent, schedule=schedule,
            ).out  # fmt: skip
            graph.column()
            image = graph.add("EditKit_DecodeLatent", latent=edited, vae=start.vae).out
            graph.add("SaveImage", images=image, filename_prefix=f"editkit/thin_mask_{name}")
    return graph


def background_replacement() -> Graph:
    graph = Graph("background_replacement", note("background_replacement"))
    start = begin(graph, "one_object")
    latent = blended_loop(graph, start, "2. Blended loop", mode="area", kernels="1", seed=4)
    graph.row()
    edited = decode(graph, start, latent)
    finish(graph, start, latent, edited, title="4. The object, exactly", file="background_replacement")
    return graph


def scribble() -> Graph:
    graph = Graph("scribble", note("scribble"))
    start = begin(graph, "scribble")
    latent = blended_loop(graph, start, "2. Blended loop from a part of the noise", strength=0.7)
    graph.row()
    edited = decode(graph, start, latent)
    finish(graph, start, latent, edited, title="4. The background, exactly", file="scribble")
    return graph


def ranked_batch_tuned_winner() -> Graph:
    graph = Graph("ranked_batch_tuned_winner", note("ranked_batch_tuned_winner", ranker=True))
    start = begin(graph, "empty_side")
    latent = blended_loop(graph, start, "2. Blended loop, eight candidates", copies=8)
    graph.row()
    ranked = rank(graph, start, latent, NEW_OBJECT)
    file = "ranked_batch_tuned_winner"
    finish(graph, start, ranked["latent"], ranked["images"], title="4. Only the winner", file=file)
    return graph


def editing_session() -> Graph:
    graph = Graph("editing_session", note("editing_session"))
    start = begin(graph, "empty_side")
    left_prompt = "a purple cross left of a yellow star on a sky background"
    last_prompt = "a purple cross left of a green circle on a sky background"
    image = _edit(graph, start, 1)
    graph.row()
    with graph.group("The other side"):
        left = graph.add("InvertMask", mask=start.mask).out
    image = _edit(graph, replace(start, image=image, mask=left, prompt=left_prompt), 2)
    graph.row()
    _edit(graph, replace(start, image=image, prompt=last_prompt), 3)
    return graph


def _edit(graph: Graph, start: Start, number: int) -> Output:
    """One edit of the session; returns the finished IMAGE."""
    latent = blended_loop(graph, start, f"Edit {number}: blended loop", seed=number)
    edited = decode(graph, start, latent, f"Edit {number}: decode")
    return finish(
        graph, start, latent, edited, title=f"Edit {number}: the rest, exactly", file=f"editing_session_{number}"
    )


WORKFLOWS: dict[str, Callable[[], Graph]] = {
    make.__name__: make
    for make in (
        blended_edit,
        blended_any_sampler,
        thin_mask,
        background_replacement,
        scribble,
        ranked_batch_tuned_winner,
        editing_session,
    )
}
