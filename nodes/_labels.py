"""What the page writes beside an input, and which inputs newer hosts fold away. Ids stay what saved workflows contain."""

from __future__ import annotations

from typing import Any

# An input that declares no label of its own: this one, or its id with spaces.
LABELS = {
    "alpha": "object share (alpha)",
    "embedding_lr": "embedding learning rate",
    "eta": "source guidance (eta)",
    "gamma": "noise guidance (gamma)",
    "lr": "learning rate",
    "maps": "noise draws",
    "mask_cfg": "mask CFG",
    "prox": "proximal guidance",
    "tune_steps": "decoder fine-tune steps",
    "quantile": "share removed (quantile)",
}

# Folded away as "advanced" by hosts that know it, like the switches that reproduce published scripts.
RARELY_USED = {
    "EditKit_AttentionMaps": ("layers", "grid"),
    "EditKit_BlendedDenoise": ("start_step", "end_step", "eta"),
    "EditKit_BlendedEdit": ("kernels", "feather", "tune_steps"),
    "EditKit_DiffEdit": ("clip_ratio", "smooth", "smallest_island", "mask_cfg"),
    "EditKit_DiffEditMask": ("clip_ratio", "smooth", "smallest_island", "sigma", "mask_cfg"),
    "EditKit_DilationSchedule": ("scale_with_size",),
    "EditKit_EncodeImage": ("seed",),
    "EditKit_FeatureInjection": ("share_noise", "feature_block", "attention_from"),
    "EditKit_FlowEdit": ("n_min", "n_avg"),
    "EditKit_FlowInversion": ("iterations",),
    "EditKit_Imagic": ("rank", "low_memory", "precision", "patience"),
    "EditKit_InvertDDIM": (
        "iterations",
        "damping",
        "tolerance",
        "reg_steps",
        "lambda_auto_corr",
        "lambda_kl",
        "seed",
    ),
    "EditKit_IterativeGuidance": ("swap",),
    "EditKit_LayeredEmbeddings": ("join", "low_memory", "precision", "patience"),
    "EditKit_LayeredTune": ("rank", "normalise", "low_memory", "precision", "patience"),
    "EditKit_MasaCtrl": ("share_noise", "object_threshold"),
    "EditKit_NegativePrompt": ("pull", "pull_to", "dilation", "pull_below", "threshold", "interpolation"),
    "EditKit_NoiseLatent": ("step",),
    "EditKit_NullText": ("tolerance", "tolerance_growth"),
    "EditKit_P2Plus": (
        "share_noise",
        "self_divisor",
        "blend_pool",
        "blend_smooth",
        "blend_divisor",
        "from_layer",
        "until_layer",
    ),
    "EditKit_P2PlusEdit": (
        "self_divisor",
        "blend_pool",
        "blend_smooth",
        "blend_divisor",
        "from_layer",
        "until_layer",
    ),
    "EditKit_StyleEdit": ("self_divisor", "blend_pool", "blend_smooth", "blend_divisor"),
    "EditKit_StyleInvert": ("network", "init", "lr", "tolerance", "tolerance_growth"),
    "EditKit_StyleTransfer": ("feature_block", "attention_from"),
    "EditKit_TuneDecoder": ("patience", "last_blocks", "low_memory"),
    "EditKit_TuneLatent": ("patience",),
}


def label_inputs(node_id: str, inputs: list[Any]) -> list[Any]:
    """Give every input a readable label, and mark the rarely used ones where this host can."""
    rare = RARELY_USED.get(node_id, ())
    for entry in inputs:
        entry.display_name = entry.display_name or LABELS.get(entry.id) or _spaced(entry.id)
        if entry.id in rare and hasattr(entry, "advanced"):
            entry.advanced = True
    return inputs


def _spaced(name: str) -> str | None:
    return name.replace("_", " ") if "_" in name else None
