"""The workflows of flow models: the blended loop, FlowEdit, and flow inversion, on the bundled flow transformer."""

from __future__ import annotations

from dataclasses import replace

from ..hosts.bundled import BUNDLED_FLOW
from .elements import Output
from .graph import Graph
from .notes import note
from .parts import Start, after, before, begin, composite, encode, latent_and_mask, negative, prompts, save

CFG = 4.0  # suits the bundled flow model
STEPS = 28


def _whole_grid(graph: Graph, start: Start) -> Output:
    """Every sigma of a run, from noise to the image."""
    return graph.add("EditKit_EditSigmas", model=start.model, steps=STEPS, strength=1.0).out


def flow_blended_edit() -> Graph:
    graph = Graph("flow_blended_edit", note("flow_blended_edit", flow=True))
    start = begin(graph, "empty_side", BUNDLED_FLOW)
    with graph.group("2. Blended denoising"):
        positive, empty = prompts(graph, start)
        latent, mask = latent_and_mask(graph, start)
        graph.column()
        sigmas = _whole_grid(graph, start)
        noised = graph.add("EditKit_NoiseLatent", model=start.model, latent=latent, sigmas=sigmas).out
        graph.column()
        edited = graph.add(
            "EditKit_BlendedDenoise",
            model=start.model,
            positive=positive,
            negative=empty,
            cfg=CFG,
            sigmas=sigmas,
            latent=noised,
            source_latent=latent,
            schedule=mask,
        ).out
    graph.row()
    with graph.group("3. Exact background"):
        image = graph.add("EditKit_DecodeLatent", latent=edited, vae=start.vae).out
        whole = composite(graph, start, image)
        graph.column()
        graph.add("SaveImage", images=whole, filename_prefix="editkit/flow_blended_edit")
    return graph


def flow_edit() -> Graph:
    graph = Graph("flow_edit", note("flow_edit", flow=True))
    start = begin(graph, "red_circle", BUNDLED_FLOW)
    start = replace(start, prompt=start.caption.replace("red", "blue"))
    with graph.group("2. FlowEdit"):
        latent = encode(graph, start)
        source, target, empty = before(graph, start), after(graph, start), negative(graph, start)
        graph.column()
        sigmas = _whole_grid(graph, start)
        edited = graph.add(
            "EditKit_FlowEdit",
            model=start.model,
            source=source,
            target=target,
            negative=empty,
            latent=latent,
            sigmas=sigmas,
            source_cfg=1.5,
            target_cfg=CFG,
            n_max=24,
        ).out
    with graph.group("3. Decode"):
        save(graph, start, edited, "flow_edit")
    return graph


def flow_inversion_edit() -> Graph:
    graph = Graph("flow_inversion_edit", note("flow_inversion_edit", flow=True))
    start = begin(graph, "red_circle", BUNDLED_FLOW)
    start = replace(start, prompt=start.caption.replace("mint", "striped pink"))
    with graph.group("2. Invert the image"):
        latent, empty = encode(graph, start), negative(graph, start)
        graph.column()
        sigmas = _whole_grid(graph, start)
        inverted = graph.add(
            "EditKit_FlowInversion",
            model=start.model,
            positive=empty,
            latent=latent,
            sigmas=sigmas,
            solver="RF-Inversion",
        )
    graph.row()
    with graph.group("3. Sample with another prompt"):
        target = after(graph, start)
        graph.column()
        edited = graph.add(
            "EditKit_FlowInversionEdit",
            model=start.model,
            positive=target,
            negative=empty,
            cfg=CFG,
            trajectory=inverted.out,
            solver="RF-Inversion",
        ).out
    with graph.group("4. Decode"):
        save(graph, start, edited, "flow_inversion_edit")
    return graph


WORKFLOWS = (flow_blended_edit, flow_edit, flow_inversion_edit)
