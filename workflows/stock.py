"""The stock ComfyUI nodes that the workflows use, described as `/object_info` describes them (ComfyUI 0.3.64).

Combos list every value that a workflow of ours may hold, not all that ComfyUI offers. `tests/comfyui` compares this
table with a running server.
"""

from __future__ import annotations

from typing import Any

Info = dict[str, Any]

MAX_SEED = 0xFFFFFFFFFFFFFFFF
CHECKPOINTS = [
    "v1-5-pruned-emaonly-fp16.safetensors",
    "sd_xl_base_1.0.safetensors",
    "sd3.5_large_fp8_scaled.safetensors",
    "flux1-dev-fp8.safetensors",
]


def _node(
    title: str,
    inputs: dict[str, tuple],
    outputs: tuple[str, ...] = (),
    *,
    names: tuple[str, ...] | None = None,
    shows: bool = False,
) -> Info:
    """All inputs of these nodes are required; an output's name is its type unless `names` says otherwise."""
    return {
        "display_name": title,
        "input": {"required": inputs},
        "output": list(outputs),
        "output_name": list(names or outputs),
        "output_node": shows,
    }


STOCK: dict[str, Info] = {
    "CFGGuider": _node(
        "CFGGuider",
        {
            "model": ("MODEL", {}),
            "positive": ("CONDITIONING", {}),
            "negative": ("CONDITIONING", {}),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}),
        },
        ("GUIDER",),
    ),
    "CheckpointLoaderSimple": _node("Load Checkpoint", {"ckpt_name": (CHECKPOINTS, {})}, ("MODEL", "CLIP", "VAE")),
    "LoadImage": _node("Load Image", {"image": (["example.png"], {"image_upload": True})}, ("IMAGE", "MASK")),
    "CLIPTextEncode": _node(
        "CLIP Text Encode (Prompt)",
        {"text": ("STRING", {"multiline": True, "dynamicPrompts": True}), "clip": ("CLIP", {})},
        ("CONDITIONING",),
    ),
    "DisableNoise": _node("DisableNoise", {}, ("NOISE",)),
    "EmptyLatentImage": _node(
        "Empty Latent Image",
        {
            "width": ("INT", {"default": 512, "min": 16, "max": 16384}),
            "height": ("INT", {"default": 512, "min": 16, "max": 16384}),
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
        },
        ("LATENT",),
    ),
    "ImageFromBatch": _node(
        "ImageFromBatch",
        {
            "image": ("IMAGE", {}),
            "batch_index": ("INT", {"default": 0, "min": 0, "max": 4095}),
            "length": ("INT", {"default": 1, "min": 1, "max": 4096}),
        },
        ("IMAGE",),
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
    "KSamplerSelect": _node("KSamplerSelect", {"sampler_name": (["euler", "dpmpp_2m", "ddim"], {})}, ("SAMPLER",)),
    "MaskPreview": _node("MaskPreview", {"mask": ("MASK", {})}, shows=True),
    "PreviewAny": _node("Preview Any", {"source": ("*", {})}, shows=True),
    "PreviewImage": _node("Preview Image", {"images": ("IMAGE", {})}, shows=True),
    "RandomNoise": _node(
        "RandomNoise",
        {"noise_seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True})},
        ("NOISE",),
    ),
    "RepeatLatentBatch": _node(
        "Repeat Latent Batch",
        {"samples": ("LATENT", {}), "amount": ("INT", {"default": 1, "min": 1, "max": 64})},
        ("LATENT",),
    ),
    "SamplerCustom": _node(
        "SamplerCustom",
        {
            "model": ("MODEL", {}),
            "add_noise": ("BOOLEAN", {"default": True}),
            "noise_seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}),
            "positive": ("CONDITIONING", {}),
            "negative": ("CONDITIONING", {}),
            "sampler": ("SAMPLER", {}),
            "sigmas": ("SIGMAS", {}),
            "latent_image": ("LATENT", {}),
        },
        ("LATENT", "LATENT"),
        names=("output", "denoised_output"),
    ),
    "SamplerCustomAdvanced": _node(
        "SamplerCustomAdvanced",
        {
            "noise": ("NOISE", {}),
            "guider": ("GUIDER", {}),
            "sampler": ("SAMPLER", {}),
            "sigmas": ("SIGMAS", {}),
            "latent_image": ("LATENT", {}),
        },
        ("LATENT", "LATENT"),
        names=("output", "denoised_output"),
    ),
    "SaveImage": _node(
        "Save Image", {"images": ("IMAGE", {}), "filename_prefix": ("STRING", {"default": "ComfyUI"})}, shows=True
    ),
}
