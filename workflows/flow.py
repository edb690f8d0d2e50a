"""The workflow of FlowEdit, on the bundled model: its loop edits with eps and v models as with flow models."""

from __future__ import annotations

from dataclasses import replace

from .elements import Output
from .graph import Graph
from .notes import note
from .parts import Start, after, before, begin, encode, negative, save

CFG = 4.0  # suits the bundled model
STEPS = 28


def _whole_grid(graph: Graph, start: Start) -> Output:
    """Every sigma of a run, from noise to the image."""
    return graph.add("EditKit_EditSigmas", model=start.model, steps=STEPS, strength=1.0).out


def flow_edit() -> Graph:
    graph = Graph("flow_edit", note("flow_edit", flow=True))
    start = begin(graph, "red_circle")
    start = replace(start, prompt=start.caption.replace("red", "blue"))
    with graph.group("2. FlowEdit"):
        latent = encode(graph, start)
        source, target = before(graph, start), after(graph, start)
        empty = negative(graph, start)
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


WORKFLOWS = (flow_edit,)
