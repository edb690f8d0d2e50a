"""The workflows of Blended Latent Diffusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .elements import Node, Output
from .graph import RESULT, Graph
from .notes import note
from .parts import Start, begin, decode, finish, latent_and_mask, prompts, rank

NEW_OBJECT = "a yellow star on a sky background"  # the new object under the mask of `empty_side`


def blended_loop(graph: Graph, start: Start, title: str, **options: Any) -> Output:
    """The nodes of the blended loop in one group, see `loop`. Returns the finished LATENT."""
    with graph.group(title):
        return loop(graph, start, **options).out


def loop(
    graph: Graph,
    start: Start,
    *,
    strength: float = 1.0,
    mode: str = "max",
    kernels: str = "7,5,3,1",
    seed: int = 0,
    copies: int = 1,
) -> Node:
    """The nodes of the blended loop. Returns the last."""
    model = start.model
    latent, latent_pixels = latent_and_mask(graph, start, mode)
    sigmas = graph.add("EditKit_EditSigmas", model=model, strength=strength).out
    schedule = graph.add("EditKit_DilationSchedule", latent_mask=latent_pixels, kernels=kernels).out
    positive, negative = prompts(graph, start)
    noised = graph.add("EditKit_NoiseLatent", model=model, latent=latent, sigmas=sigmas, seed=seed, copies=copies)
    return graph.add(
        "EditKit_BlendedDenoise",
        model=model,
        positive=positive,
        negative=negative,
        sigmas=sigmas,
        latent=noised.out,
        source_latent=latent,
        schedule=schedule,
        seed=seed,
    )


def first_edit() -> Graph:
    graph = Graph("first_edit", note("first_edit"))
    start = begin(graph, "empty_side")
    with graph.group("2. Edit"):
        positive, negative = prompts(graph, start)
        edited = graph.add(
            "EditKit_BlendedEdit",
            "Blended Edit",
            model=start.model,
            positive=positive,
            negative=negative,
            vae=start.vae,
            image=start.image,
            mask=start.mask,
            cfg=5.0,
        ).out
    with graph.group("3. Result"):
        graph.add("SaveImage", images=edited, filename_prefix="editkit/first_edit")
    return graph


def blended_edit() -> Graph:
    graph = Graph("blended_edit", note("blended_edit", ranker=True))
    start = begin(graph, "empty_side")
    latent = blended_loop(graph, start, "2. Blended loop, four candidates", copies=4)
    ranked = rank(graph, start, latent, NEW_OBJECT)
    finish(graph, start, ranked["latent"], ranked["images"], title="4. Exact background", file="blended_edit")
    return graph


def blended_any_sampler() -> Graph:
    graph = Graph("blended_any_sampler", note("blended_any_sampler"))
    start = begin(graph, "empty_side")
    with graph.group("2. Latent mask"):
        latent, latent_pixels = latent_and_mask(graph, start)
        schedule = graph.add("EditKit_DilationSchedule", latent_mask=latent_pixels).out
    with graph.group("3. KSampler"):
        model = graph.add("EditKit_BlendedModel", model=start.model, schedule=schedule).out
        positive, negative = prompts(graph, start)
        sampled = graph.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            steps=50,
            cfg=5.0,
            sampler_name="dpmpp_2m",
            scheduler="ddim_uniform",
        ).out
        edited = graph.add("EditKit_DecodeLatent", latent=sampled, vae=start.vae).out
    finish(graph, start, sampled, edited, title="4. Exact background", file="blended_any_sampler")
    return graph


def thin_mask() -> Graph:
    graph = Graph("thin_mask", note("thin_mask"))
    start = begin(graph, "thin_stroke")
    with graph.group("2. Shared inputs"):
        latent, latent_pixels = latent_and_mask(graph, start)
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0).out
        positive, negative = prompts(graph, start)
        noised = graph.add("EditKit_NoiseLatent", model=start.model, latent=latent, sigmas=sigmas).out
    for name, kernels, title in (("plain", "1", "3. Plain loop"), ("shrinking", "7,5,3,1", "4. Shrinking mask")):
        with graph.group(title):
            schedule = graph.add(
                "EditKit_DilationSchedule", latent_mask=latent_pixels, kernels=kernels, parts="equal log-sigma"
            ).out
            edited = graph.add(
                "EditKit_BlendedDenoise",
                model=start.model,
                positive=positive,
                negative=negative,
                sigmas=sigmas,
                latent=noised,
                source_latent=latent,
                schedule=schedule,
            ).out
            image = graph.add("EditKit_DecodeLatent", latent=edited, vae=start.vae).out
            graph.add("SaveImage", images=image, filename_prefix=f"editkit/thin_mask_{name}")
    return graph


def background_replacement() -> Graph:
    graph = Graph("background_replacement", note("background_replacement"))
    start = begin(graph, "one_object")
    latent = blended_loop(graph, start, "2. Blended loop", mode="area", kernels="1", seed=4)
    edited = decode(graph, start, latent)
    finish(graph, start, latent, edited, title="4. Exact object", file="background_replacement")
    return graph


def scribble() -> Graph:
    graph = Graph("scribble", note("scribble"))
    start = begin(graph, "scribble")
    latent = blended_loop(graph, start, "2. Blended loop from the scribble", strength=0.7)
    edited = decode(graph, start, latent)
    finish(graph, start, latent, edited, title="4. Exact background", file="scribble")
    return graph


def ranked_batch_tuned_winner() -> Graph:
    graph = Graph("ranked_batch_tuned_winner", note("ranked_batch_tuned_winner", ranker=True))
    start = begin(graph, "empty_side")
    latent = blended_loop(graph, start, "2. Blended loop, eight candidates", copies=8)
    ranked = rank(graph, start, latent, NEW_OBJECT)
    file = "ranked_batch_tuned_winner"
    finish(graph, start, ranked["latent"], ranked["images"], title="4. Fine-tune the winner", file=file)
    return graph


def editing_session() -> Graph:
    graph = Graph("editing_session", note("editing_session"))
    start = begin(graph, "empty_side")
    left_prompt = "a purple cross left of a yellow star on a sky background"
    last_prompt = "a purple cross left of a green circle on a sky background"
    image = _edit(graph, start, 1)
    with graph.group("Inverted mask"):
        left = graph.add("InvertMask", mask=start.mask).out
    image = _edit(graph, replace(start, image=image, mask=left, prompt=left_prompt), 2)
    _edit(graph, replace(start, image=image, prompt=last_prompt), 3)
    return graph


def _edit(graph: Graph, start: Start, number: int) -> Output:
    """One edit of the session; returns the finished IMAGE."""
    with graph.group(f"Edit {number}"):
        with graph.fold(f"Blended loop {number}") as fold:
            blended = loop(graph, start, seed=number)
            fold.show(blended.inputs["positive"].node, "text", "prompt")
            image = graph.add("EditKit_DecodeLatent", latent=blended.out, vae=start.vae).out
            tuned = graph.add(
                "EditKit_TuneDecoder",
                vae=start.vae,
                latent=blended.out,
                source=start.image,
                mask=start.mask,
                edited=image,
            )
            whole = graph.add("EditKit_CompositeSource", edited=tuned["image"], source=start.image, mask=start.mask).out
        graph.add("SaveImage", f"{RESULT} {number}", images=whole, filename_prefix=f"editkit/editing_session_{number}")
    return whole


WORKFLOWS = (
    first_edit,
    blended_edit,
    blended_any_sampler,
    thin_mask,
    background_replacement,
    scribble,
    ranked_batch_tuned_winner,
    editing_session,
)
