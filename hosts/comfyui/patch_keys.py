"""Which of EditKit's model patches a MODEL carries: the keys of their wrappers in ComfyUI."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension

OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
ATTENTION_KEY = "editkit_attention"
BLEND_KEY = "editkit_blend"


def blends(model: Any) -> bool:
    return bool(model.get_wrappers(OUTER_SAMPLE, BLEND_KEY))


def has_attention_edit(model: Any) -> bool:
    return bool(model.get_wrappers(OUTER_SAMPLE, ATTENTION_KEY))
