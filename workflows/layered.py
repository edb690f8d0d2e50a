"""The workflows of LayerDiffusion and Imagic."""

from __future__ import annotations

from dataclasses import replace

from ..hosts.bundled.example_images import load_example
from .elements import Output
from .graph import Graph
from .notes import note
from .parts import Start, before, begin, encode, negative

OBJECT = "a black shape"  # the model learns from the image that it is a circle
BACKGROUND, PLAIN = "a striped sky background", "a cream background"
CFG = 5.0  # CFG, steps and candidates suit the bundled model
STEPS = 26
CANDIDATES = 4
FIT = {"steps": 100, "lr": 1e-2, "join": "average"}  # fewer and larger steps than published: the bundled model is small
TUNE = {"steps": 60, "lr": 2e-3, "rank": 8}


def _fit(graph: Graph, start: Start, reference: Output, mask: Output, text: str) -> tuple[Output, Output]:
    """Stage 1: the object's embedding and the mixed embedding."""
    with graph.group("3. Layered embeddings"):
        with graph.fold("Prompts of both layers") as fold:
            wanted = graph.add("CLIPTextEncode", "Object prompt", clip=start.clip, text=OBJECT)
            behind = graph.add("CLIPTextEncode", "Background prompt", clip=start.clip, text=text)
            fold.show(wanted, "text", "object prompt")
            fold.show(behind, "text", "background prompt")
        fitted = graph.add(
            "EditKit_LayeredEmbeddings",
            model=start.model,
            object=wanted.out,
            background=behind.out,
            latent=reference,
            mask=mask,
            **FIT,
        )
    return fitted.out, fitted["mixed"]


def _sample(graph: Graph, start: Start, guider: Output, sigmas: Output, text: str) -> None:
    """Sample candidates from noise and save the one with the best CLIP score."""
    with graph.fold("Sample candidates") as fold:
        noise = graph.add("RandomNoise")
        fold.show(noise, "noise_seed", "seed")
        sampler = graph.add("KSamplerSelect", sampler_name="euler").out
        empty = graph.add("EmptyLatentImage", width=96, height=96, batch_size=CANDIDATES)
        fold.show(empty, "batch_size", "candidates")
        made = graph.add(
            "SamplerCustomAdvanced",
            noise=noise.out,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=empty.out,
        ).out
        images = graph.add("EditKit_DecodeLatent", latent=made, vae=start.vae).out
    graph.add("PreviewImage", "All candidates", images=images)
    best = graph.add("EditKit_RankByText", images=images, ranker=graph.add("EditKit_LoadRanker").out, text=text, keep=1)
    graph.add("SaveImage", images=best.out, filename_prefix=f"editkit/{graph.name}")


def _tune_and_sample(
    graph: Graph, start: Start, latent: Output, mask: Output, reference: Output, *, background: str, save: bool
) -> None:
    """Both stages, and sampling with iterative guidance."""
    object_embedding, mixed = _fit(graph, start, reference, mask, background)
    with graph.group("4. Fine-tune the model"):
        tuned = graph.add(
            "EditKit_LayeredTune", model=start.model, mixed=mixed, latent=latent, mask=mask, reference=reference, **TUNE
        )
        if save:
            graph.add("EditKit_SaveLora", lora=tuned["lora"], filename_prefix="editkit/black_circle")
    with graph.group("5. Sample with iterative guidance"):
        sigmas = graph.add("EditKit_EditSigmas", model=tuned.out, steps=STEPS, strength=1.0).out
        guider = graph.add(
            "EditKit_IterativeGuidance",
            model=tuned.out,
            object=object_embedding,
            mixed=mixed,
            negative=negative(graph, start),
            cfg=CFG,
            sigmas=sigmas,
        ).out
        _sample(graph, start, guider, sigmas, f"{OBJECT.replace('shape', 'circle')} on {background}")


def layered_edit() -> Graph:
    graph = Graph("layered_edit", note("layered_edit", ranker=True))
    start = begin(graph, "red_circle")
    with graph.group("2. Reference background"):
        latent = encode(graph, start)
        with graph.fold("Reference background") as fold:
            behind = graph.add("CLIPTextEncode", "Background prompt", clip=start.clip, text=BACKGROUND)
            fold.show(behind, "text", "background prompt")
            reference = graph.add(
                "EditKit_LayeredReference",
                vae=start.vae,
                latent=latent,
                model=start.model,
                positive=behind.out,
                negative=negative(graph, start),
                steps=STEPS,
                cfg=CFG,
            )
        graph.add("PreviewImage", "Reference background", images=reference["image"])
    _tune_and_sample(graph, start, latent, start.mask, reference.out, background=BACKGROUND, save=True)
    return graph


def layered_edit_with_diffedit_mask() -> Graph:
    graph = Graph("layered_edit_with_diffedit_mask", note("layered_edit_with_diffedit_mask", mask=False, ranker=True))
    start = begin(graph, "red_circle")
    other = graph.add("EditKit_LoadExample", "Image of the new background", name="thin_stroke").out
    start = replace(start, prompt=start.prompt.replace("blue square", "black circle"))
    with graph.group("2. Mask from two prompts, background from an image"):
        latent = encode(graph, start)
        with graph.fold("Mask from two prompts") as fold:
            source = before(graph, start)
            target = graph.add("CLIPTextEncode", "Target prompt", clip=start.clip, text=start.prompt)
            fold.show(source.node, "text", "source prompt")
            fold.show(target, "text", "target prompt")
            found = graph.add(
                "EditKit_DiffEditMask", model=start.model, latent=latent, source=source, target=target.out
            ).out
        reference = graph.add("EditKit_LayeredReference", vae=start.vae, latent=latent, image=other).out
    _tune_and_sample(graph, start, latent, found, reference, background=PLAIN, save=False)
    return graph


def imagic() -> Graph:
    graph = Graph("imagic", note("imagic", mask=False, ranker=True))
    start = begin(graph, "red_circle")
    words = load_example("red_circle").caption.replace("red", "black")
    with graph.group("2. Imagic fine-tune"):
        latent = encode(graph, start)
        target = graph.add("CLIPTextEncode", "Target prompt", clip=start.clip, text=words).out
        tuned = graph.add(
            "EditKit_Imagic",
            model=start.model,
            latent=latent,
            target=target,
            eta=0.7,
            embedding_steps=100,
            embedding_lr=5e-3,
            **TUNE,
        )
    with graph.group("3. Sample"):
        sigmas = graph.add("EditKit_EditSigmas", model=tuned.out, steps=STEPS, strength=1.0).out
        guider = graph.add(
            "CFGGuider", model=tuned.out, positive=tuned["positive"], negative=negative(graph, start), cfg=CFG
        ).out
        _sample(graph, start, guider, sigmas, words)
    return graph


WORKFLOWS = (layered_edit, layered_edit_with_diffedit_mask, imagic)
