"""The workflows of attention control: Prompt-to-Prompt, P2Plus, MasaCtrl and Plug-and-Play."""

from __future__ import annotations

from dataclasses import replace

from .elements import Node, Output
from .graph import RESULT, Graph
from .inversion import CFG, invert_image
from .notes import note
from .parts import Start, after, before, begin, encode, negative

SIZE = 96  # pixels of the bundled model's images
CIRCLE = "a red circle on a mint background"
STRIPED = "a red circle on a striped mint background"


def drawn(graph: Graph) -> Start:
    """The first group of a workflow that generates its source."""
    with graph.group("1. Model"):
        model = graph.add("EditKit_LoadModel")
    return Start(model.out, model["clip"], model["vae"], model.out, model.out, CIRCLE, CIRCLE)


def align(graph: Graph, start: Start, **words: str) -> Output:
    """The aligned prompts."""
    return graph.add(
        "EditKit_AlignPrompts", clip=start.clip, source_text=start.caption, target_text=start.prompt, **words
    ).out


def save_pair(graph: Graph, start: Start, latent: Output, *, source: bool = True) -> None:
    """Show both images. Save the edited one, and the source if it was generated."""
    images = graph.add("EditKit_DecodeLatent", latent=latent, vae=start.vae).out
    graph.add("PreviewImage", "Source and edited image", images=images)
    if source:
        _save(graph, "source", graph.add("ImageFromBatch", "Source image", image=images, batch_index=0).out)
    _save(graph, "edited", graph.add("ImageFromBatch", "Edited image", image=images, batch_index=1).out)


def _save(graph: Graph, label: str, images: Output) -> None:
    graph.add("SaveImage", f"{RESULT}: {label}", images=images, filename_prefix=f"editkit/{graph.name}_{label}")


def p2p_replace() -> Graph:
    graph = Graph("p2p_replace", note("p2p_replace", drawn=True))
    start = replace(drawn(graph), prompt=CIRCLE.replace("red", "green"))
    with graph.group("2. Swap a word"):
        edit = align(graph, start, mode="replace")
        patched = graph.add("EditKit_P2Plus", model=start.model, edit=edit)
    with graph.group("3. KSampler on pairs"):
        empty = negative(graph, start)
        latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=2).out
        sampled = graph.add(
            "KSampler",
            model=patched.out,
            positive=patched["conditioning"],
            negative=empty,
            latent_image=latent,
            steps=50,
            cfg=CFG,
            sampler_name="euler",
            scheduler="ddim_uniform",
            seed=1,
        ).out
    with graph.group("4. Decode"):
        save_pair(graph, start, sampled)
    return graph


def p2p_refine() -> Graph:
    graph = Graph("p2p_refine", note("p2p_refine", drawn=True))
    start = replace(drawn(graph), prompt=STRIPED)
    with graph.group("2. Add a word"):
        edit = align(graph, start, mode="refine")
        patched = graph.add("EditKit_P2Plus", model=start.model, edit=edit)
    with graph.group("3. SamplerCustomAdvanced on pairs"):
        empty = negative(graph, start)
        latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=2).out
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0).out
        sampled = custom(graph, patched, empty, graph.add("RandomNoise", noise_seed=3).out, "dpmpp_2m", sigmas, latent)
    with graph.group("4. Decode"):
        save_pair(graph, start, sampled)
    return graph


def custom(
    graph: Graph, patched: Node, empty: Output, noise: Output, sampler: str, sigmas: Output, latent: Output
) -> Output:
    """Guider, sampler and SamplerCustomAdvanced; returns the LATENT."""
    guider = graph.add("CFGGuider", model=patched.out, positive=patched["conditioning"], negative=empty, cfg=CFG).out
    chosen = graph.add("KSamplerSelect", sampler_name=sampler).out
    return graph.add(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=chosen, sigmas=sigmas, latent_image=latent
    ).out


def p2p_reweight() -> Graph:
    graph = Graph("p2p_reweight", note("p2p_reweight", drawn=True))
    start = replace(drawn(graph), caption=STRIPED, prompt=STRIPED)
    with graph.group("2. Shared inputs"):
        empty = negative(graph, start)
        latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE).out
        sigmas = graph.add("EditKit_EditSigmas", model=start.model, strength=1.0).out
    for weight, label in (("-2", "weaker"), ("-4", "gone")):
        with graph.group(f"Word weight: red {weight}"):
            edit = align(graph, start, weights=f"red: {weight}")
            edited = graph.add(
                "EditKit_P2PlusEdit",
                model=start.model,
                edit=edit,
                negative=empty,
                cfg=CFG,
                latent=latent,
                sigmas=sigmas,
                seed=3,
            )
            for name in ("source", "edited") if label == "weaker" else ("edited",):
                image = graph.add("EditKit_DecodeLatent", latent=edited[name], vae=start.vae).out
                _save(graph, name if name == "source" else label, image)
    return graph


def inverted(graph: Graph, start: Start) -> tuple[Output, Output, Node, Output, Output]:
    """The second group for a real image: its inversion and the prompts."""
    with graph.group("2. Invert the image"):
        latent, source = encode(graph, start), before(graph, start)
        target, empty = after(graph, start), negative(graph, start)
        sigmas, inversion = invert_image(graph, start, latent, source)
    return source, target, inversion, sigmas, empty


def p2plus_real_image() -> Graph:
    graph = Graph("p2plus_real_image", note("p2plus_real_image", mask=False))
    start = begin(graph, "red_circle")
    with graph.group("2. Invert the image"):
        latent, source = encode(graph, start), before(graph, start)
        _, inversion = invert_image(graph, start, latent, source)
    with graph.group("3. Edit"):
        edit, empty = align(graph, start), negative(graph, start)
        maps = graph.add(
            "EditKit_AttentionMaps", model=start.model, edit=edit, trajectory=inversion.out, image=start.image
        ).out
        graph.add("PreviewImage", "Cross-attention maps of the source", images=maps)
        edited = graph.add(
            "EditKit_P2PlusEdit",
            model=start.model,
            edit=edit,
            negative=empty,
            cfg=CFG,
            tau_u=0.5,
            trajectory=inversion.out,
        )
    with graph.group("4. Decode"):
        _save(graph, "edited", graph.add("EditKit_DecodeLatent", latent=edited["edited"], vae=start.vae).out)
    return graph


def paired(graph: Graph, start: Start, kind: str, title: str, **options: object) -> Graph:
    """A real image under a model patch: the inverted image twice, and the source restored from its trajectory."""
    source, target, inversion, sigmas, empty = inverted(graph, start)
    with graph.group(title):
        patched = graph.add(kind, model=start.model, source=source, target=target, trajectory=inversion.out, **options)
        latent = graph.add("RepeatLatentBatch", samples=inversion["noised latent"], amount=2).out
        sampled = custom(graph, patched, empty, graph.add("DisableNoise").out, "euler", sigmas, latent)
    with graph.group("4. Decode"):
        save_pair(graph, start, sampled, source=False)
    return graph


def masactrl() -> Graph:
    graph = Graph("masactrl", note("masactrl", mask=False))
    start = begin(graph, "red_circle")
    start = replace(start, prompt="a red circle left of a yellow star on a mint background")
    return paired(graph, start, "EditKit_MasaCtrl", "3. MasaCtrl on pairs", from_layer=0.5)


def plug_and_play() -> Graph:
    graph = Graph("plug_and_play", note("plug_and_play", mask=False))
    start = replace(begin(graph, "red_circle"), prompt="a green circle on a pink background")
    return paired(graph, start, "EditKit_FeatureInjection", "3. Plug-and-Play on pairs")


WORKFLOWS = (p2p_replace, p2p_refine, p2p_reweight, p2plus_real_image, masactrl, plug_and_play)
