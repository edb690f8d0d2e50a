"""The stock ComfyUI nodes that the workflows use, described as `/object_info` describes them (ComfyUI 0.3.64).

Combos list every value that a workflow of ours may hold, not all that ComfyUI offers. `tests/comfyui` compares this
table with a running server.
"""

from __future__ import annotations

from typing import Any

Info = dict[str, Any]

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def _node(title: str, inputs: dict[str, tuple], outputs: tuple[str, ...] = (), *, shows: bool = False) -> Info:
    """All inputs of these nodes are required; an output's name is its type."""
    return {
        "display_name": title,
        "input": {"required": inputs},
        "output": list(outputs),
        "output_name": list(outputs),
        "output_node": shows,
    }


STOCK: dict[str, Info] = {
    "CLIPTextEncode": _node(
        "CLIP Text Encode (Prompt)",
        {"text": ("STRING", {"multiline": True, "dynamicPrompts": True}), "clip": ("CLIP", {})},
        ("CONDITIONING",),
    ),
    "InvertMask": _node("InvertMask", {"mask": ("MASK", {})}, ("MASK",)),
    "KSampler": _node(
        "KSampler",
        {
            "model": ("MODEL", {}),
            "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}),
            "sampler_name": (["euler", "dpmpp_2m", "ddim"], {}),
            "scheduler": (["ddim_uniform"], {}),
            "positive": ("CONDITIONING", {}),
            "negative": ("CONDITIONING", {}),
            "latent_image": ("LATENT", {}),
            "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}),
        },
        ("LATENT",),
    ),
    "PreviewAny": _node("Preview Any", {"source": ("*", {})}, shows=True),
    "PreviewImage": _node("Preview Image", {"images": ("IMAGE", {})}, shows=True),
    "SaveImage": _node(
        "Save Image", {"images": ("IMAGE", {}), "filename_prefix": ("STRING", {"default": "ComfyUI"})}, shows=True
    ),
}
