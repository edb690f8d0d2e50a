"""The workflows of DiffEdit, Differential Diffusion, null-text inversion, SDEdit and the plain word swap."""

from __future__ import annotations

from dataclasses import replace

from .elements import Node, Output
from .graph import Graph
from .notes import note
from .parts import Start, after, before, begin, composite, decode, encode, finish, negative, save

CFG = 4.0  # suits the bundled model
GUIDED = 7.5  # as null-text inversion was published


def find_mask(graph: Graph, start: Start) -> tuple[Output, Node, Output, Output]:
    """The second group: the encoded image, the mask node, and both prompts."""
    with graph.group("2. Find the mask"):
        latent = encode(graph, start)
        source, target = before(graph, start), after(graph, start)
        found = graph.add("EditKit_DiffEditMask", model=start.model, latent=latent, source=source, target=target)
    return latent, found, source, target


def invert_image(graph: Graph, start: Start, latent: Output, source: Output, **options: object) -> tuple[Output, Node]:
    """The sigmas and the inversion."""
    sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0).out
    inverted = graph.add(
        "EditKit_InvertDDIM", model=start.model, positive=source, latent=latent, sigmas=sigmas, **options
    )
    return sigmas, inverted


def diffedit() -> Graph:
    graph = Graph("diffedit", note("diffedit", mask=False))
    start = begin(graph, "red_circle")
    latent, found, source, target = find_mask(graph, start)
    with graph.group("3. Invert the image"):
        _, inverted = invert_image(graph, start, latent, source, encoding_ratio=0.8)
    with graph.group("4. Decode under the mask"):
        graph.add("MaskPreview", "Mask", mask=found.out)
        empty = negative(graph, start)
        edited = graph.add(
            "EditKit_MaskedDecode",
            model=start.model,
            positive=target,
            negative=empty,
            cfg=CFG,
            trajectory=inverted.out,
            latent_mask=found["latent mask"],
        ).out
        image = graph.add("EditKit_DecodeLatent", latent=edited, vae=start.vae).out
    with graph.group("5. Exact background"):
        whole = composite(graph, replace(start, mask=found.out), image)
        graph.add("SaveImage", images=whole, filename_prefix="editkit/diffedit")
    return graph


def diffedit_into_blended() -> Graph:
    graph = Graph("diffedit_into_blended", note("diffedit_into_blended", mask=False))
    start = begin(graph, "red_circle")
    latent, found, source, target = find_mask(graph, start)
    with graph.group("3. Invert the image"):
        sigmas, inverted = invert_image(graph, start, latent, source)
    with graph.group("4. Blended loop on the trajectory"), graph.fold("Blended loop on the trajectory") as fold:
        latent_pixels = graph.add("EditKit_LatentMask", mask=found.out, latent=latent).out
        empty = negative(graph, start)
        kernels = graph.add("EditKit_DilationSchedule", latent_mask=latent_pixels, kernels="3,1")
        fold.show(kernels, "kernels", "kernels")
        schedule = kernels.out
        edited = graph.add(
            "EditKit_BlendedDenoise",
            model=start.model,
            positive=target,
            negative=empty,
            cfg=CFG,
            sigmas=sigmas,
            latent=inverted["noised latent"],
            source_latent=latent,
            schedule=schedule,
            trajectory=inverted.out,
        ).out
    image = decode(graph, start, edited, "5. Decode")
    masked = replace(start, mask=found.out)
    finish(graph, masked, edited, image, title="6. Exact background", file="diffedit_into_blended")
    return graph


def differential_diffusion() -> Graph:
    graph = Graph("differential_diffusion", note("differential_diffusion", mask=False))
    start = begin(graph, "red_circle")
    latent, found, _, target = find_mask(graph, start)
    with graph.group("3. Soft mask schedule"):
        schedule = graph.add("EditKit_ReleaseSchedule", latent_mask=found["soft map"]).out
        empty = negative(graph, start)
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0).out
        noised = graph.add("EditKit_NoiseLatent", model=start.model, latent=latent, sigmas=sigmas).out
        edited = graph.add(
            "EditKit_BlendedDenoise",
            model=start.model,
            positive=target,
            negative=empty,
            cfg=CFG,
            sigmas=sigmas,
            latent=noised,
            source_latent=latent,
            schedule=schedule,
        ).out
    with graph.group("4. Decode"):
        save(graph, start, edited, "differential_diffusion")
    return graph


def _plain_guidance(
    graph: Graph, start: Start, source: Output, empty: Output, sigmas: Output, inverted: Node
) -> Output:
    """Guided sampling without learned embeddings, saved for comparison. Returns the SAMPLER."""
    with graph.group("3. Plain guidance"):
        with graph.fold("Sample with plain guidance"):
            sampler = graph.add("KSamplerSelect", sampler_name="euler").out
            plain = graph.add(
                "SamplerCustom",
                model=start.model,
                add_noise=False,
                cfg=GUIDED,
                positive=source,
                negative=empty,
                sampler=sampler,
                sigmas=sigmas,
                latent_image=inverted["noised latent"],
            ).out
        save(graph, start, plain, "null_text_reconstruction_plain")
    return sampler


def null_text_reconstruction() -> Graph:
    graph = Graph("null_text_reconstruction", note("null_text_reconstruction", mask=False))
    start = begin(graph, "red_circle")
    start = replace(start, prompt=start.caption.replace("mint", "striped mint"))
    with graph.group("2. Invert the image"):
        with graph.fold("Prompts and latent") as fold:
            latent = encode(graph, start)
            source = before(graph, start)
            fold.show(source.node, "text", "source prompt")
            empty = negative(graph, start)
        sigmas, inverted = invert_image(graph, start, latent, source, vae=start.vae, image=start.image)
    sampler = _plain_guidance(graph, start, source, empty, sigmas, inverted)
    with graph.group("4. Null-text inversion"):
        learned = graph.add(
            "EditKit_NullText", model=start.model, trajectory=inverted.out, positive=source, negative=empty, cfg=GUIDED
        )
        graph.add("PreviewAny", "Report", source=learned["report"])
    for positive, title, file in (
        (source, "5. Reconstruct with guidance", "reconstructed"),
        (None, "6. Edit with another prompt", "edited"),
    ):
        with graph.group(title):
            with graph.fold(title.partition(". ")[2]) as fold:
                prompt = positive or after(graph, start)
                if positive is None:
                    fold.show(prompt.node, "text", "prompt")
                guider = graph.add(
                    "EditKit_EmbeddingsGuider", model=start.model, positive=prompt, embeddings=learned.out, cfg=GUIDED
                ).out
                noise = graph.add("DisableNoise").out
                sampled = graph.add(
                    "SamplerCustomAdvanced",
                    noise=noise,
                    guider=guider,
                    sampler=sampler,
                    sigmas=sigmas,
                    latent_image=inverted["noised latent"],
                ).out
            save(graph, start, sampled, f"null_text_reconstruction_{file}")
    return graph


def sdedit() -> Graph:
    graph = Graph("sdedit", note("sdedit", mask=False))
    start = begin(graph, "scribble")
    with graph.group("2. SDEdit"):
        latent = encode(graph, start)
        target, empty = after(graph, start), negative(graph, start)
        edited = graph.add(
            "EditKit_SDEdit", model=start.model, positive=target, negative=empty, latent=latent, cfg=CFG, strength=0.5
        ).out
    with graph.group("3. Decode"):
        save(graph, start, edited, "sdedit")
    return graph


def word_swap() -> Graph:
    graph = Graph("word_swap", note("word_swap", mask=False))
    start = begin(graph, "red_circle")
    start = replace(start, prompt=start.caption.replace("circle", "star"))
    with graph.group("2. Invert with the source prompt"):
        latent, source = encode(graph, start), before(graph, start)
        sigmas, inverted = invert_image(graph, start, latent, source, mode="implicit", vae=start.vae, image=start.image)
        graph.add("PreviewAny", "Reconstruction PSNR", source=inverted["report"])
    with graph.group("3. Sample with a swapped word"):
        target, empty = after(graph, start), negative(graph, start)
        sampler = graph.add("KSamplerSelect", sampler_name="euler").out
        sampled = graph.add(
            "SamplerCustom",
            model=start.model,
            add_noise=False,
            cfg=CFG,
            positive=target,
            negative=empty,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=inverted["noised latent"],
        ).out
    with graph.group("4. Decode"):
        save(graph, start, sampled, "word_swap")
    return graph


WORKFLOWS = (diffedit, diffedit_into_blended, differential_diffusion, null_text_reconstruction, sdedit, word_swap)
