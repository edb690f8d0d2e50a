"""Inputs and outputs that many nodes share, each declared once. Defaults and tooltips can be overridden."""

from __future__ import annotations

from typing import Any

from ._api import (
    EmbeddingsSocket,
    MaskScheduleSocket,
    PromptEditSocket,
    TrajectorySocket,
    io,
    reproduction_switch,
)

MAX_SEED = 0xFFFFFFFFFFFFFFFF
AUTOMATIC_BLOCK = -1  # Plug-and-Play: choose the output block from the depth of the network
AUTOMATIC_DIVISOR = 0  # LocalBlend: choose the attention resolution from the size of the latent

PATCHES_STAY = "LoRA, ControlNet and guidance patches stay active."
UNET_MODEL = "An SD 1.x, SD 2.x or SDXL model. LoRA and other patches stay active."
ATTENTION_MODEL = "An SD 1.x, SD 2.x, SDXL, SD3 or Flux model. LoRA and other patches stay active."


# --- sampling ---------------------------------------------------------------------------------------------------------


def model_input(tooltip: str = f"Any diffusion model. {PATCHES_STAY}") -> io.Model.Input:
    return io.Model.Input("model", tooltip=tooltip)


def latent_input(tooltip: str = "Clean latent of the image, or a batch of them.") -> io.Latent.Input:
    return io.Latent.Input("latent", tooltip=tooltip)


def negative_input(
    tooltip: str = "The negative prompt, or the embeddings of an inversion. Not evaluated at cfg 1.",
) -> io.MultiType.Input:
    return io.MultiType.Input("negative", types=[io.Conditioning, EmbeddingsSocket], tooltip=tooltip)


def cfg_input(
    default: float = 7.5,
    tooltip: str = "CFG scale, 1 to 30. 1 turns guidance off and halves the model calls.",
    *,
    optional: bool = False,
) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=1.0, max=30.0, step=0.1, optional=optional, tooltip=tooltip)


def seed_input(
    tooltip: str = "Seed of the noise. Every image of the batch has its own noise.",
    *,
    optional: bool = False,
    control: bool = True,
) -> io.Int.Input:
    """A seed; with `control`, the page offers to change it after every run."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=control,
        optional=optional,
        tooltip=tooltip,
    )


def steps_input(
    tooltip: str = "Steps of the full schedule, from pure noise to the image.", *, optional: bool = False
) -> io.Int.Input:
    return io.Int.Input("steps", default=50, min=1, max=1000, optional=optional, tooltip=tooltip)


def strength_input(default: float, low: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("strength", default=default, min=low, max=1.0, step=0.01, tooltip=tooltip)


def sigmas_input(tooltip: str, *, optional: bool = False) -> io.Sigmas.Input:
    return io.Sigmas.Input("sigmas", optional=optional, tooltip=tooltip)


def mask_schedule_input() -> io.MultiType.Input:
    return io.MultiType.Input(
        "schedule",
        types=[MaskScheduleSocket, io.Mask],
        tooltip="A mask schedule, or one latent mask for all steps. 1 = edit.",
    )


def fraction_input(
    name: str, default: float, tooltip: str, *, label: str | None = None, optional: bool = False
) -> io.Float.Input:
    """A fraction of the steps, 0 to 1."""
    return io.Float.Input(
        name, display_name=label, default=default, min=0.0, max=1.0, step=0.05, optional=optional, tooltip=tooltip
    )


# --- inversion --------------------------------------------------------------------------------------------------------


def trajectory_input(tooltip: str, *, optional: bool = False) -> Any:
    return TrajectorySocket.Input("trajectory", optional=optional, tooltip=tooltip)


def embeddings_input(tooltip: str) -> Any:
    return EmbeddingsSocket.Input("embeddings", tooltip=tooltip)


def encoding_ratio_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("encoding_ratio", default=default, min=0.01, max=1.0, step=0.01, tooltip=tooltip)


def tolerance_inputs() -> list:
    """When the optimisation of one sampling step stops early."""
    return [
        io.Float.Input(
            "tolerance",
            default=1e-5,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-8,
            optional=True,
            tooltip="A sampling step stops early when its mean squared error falls below this. 0 = never.",
        ),
        io.Float.Input(
            "tolerance_growth",
            default=2e-5,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-8,
            optional=True,
            tooltip="Added to the tolerance at every sampling step, 0 to 1.",
        ),
    ]


# --- attention control ------------------------------------------------------------------------------------------------


def attention_model_input(*, patched: bool = True, joint: bool = True) -> io.Model.Input:
    """A MODEL whose attention is controlled; `joint`: also a transformer that attends to text and image jointly."""
    models = ATTENTION_MODEL if joint else UNET_MODEL
    return model_input(f"{models} The output is a patched clone." if patched else models)


def edit_input() -> Any:
    return PromptEditSocket.Input("edit", tooltip="Source and target prompt from 'Align Prompts (P2P, Word Swap)'.")


def prompt_pair_inputs(source: str, target: str) -> list:
    return [io.Conditioning.Input("source", tooltip=source), io.Conditioning.Input("target", tooltip=target)]


def p2p_fraction_inputs(tau_c: float = 0.8, tau_s: float = 0.4) -> list:
    """How long Prompt-to-Prompt and P2Plus control the attention, with defaults of tau_c and tau_s."""
    return [
        fraction_input(
            "tau_c",
            tau_c,
            "Fraction of the steps that use the source's cross-attention maps.",
            label="cross-attention (tau_c)",
        ),
        fraction_input(
            "tau_s",
            tau_s,
            "Fraction of the steps that use the source's self-attention maps. Lower values let shapes change more.",
            label="self-attention (tau_s)",
        ),
        fraction_input(
            "tau_u",
            0.0,
            "Fraction of the steps that also use the source's self-attention maps in the unconditional branch (P2Plus). "
            "0 = Prompt-to-Prompt, 0.5 for large changes of shape. No effect at cfg 1.",
            label="uncond self-attention (tau_u)",
        ),
    ]


def local_blend_inputs() -> list:
    """LocalBlend and the attention layers; its words are named in 'Align Prompts (P2P, Word Swap)'."""
    return [
        _count(
            "self_divisor",
            2,
            (1, 16),
            "Self-attention is replaced in layers of at most 1/n of the latent's resolution: 2 = up to 32 x 32 for a "
            "64 x 64 latent, 1 = all layers.",
            label="self-attention resolution 1/n",
        ),
        fraction_input(
            "blend_start",
            0.2,
            "LocalBlend: fraction of the steps before it starts. 1 = never. Needs blend words.",
            optional=True,
        ),
        _threshold(
            "blend_threshold", "The image may change where the map of the blend words exceeds this share of its peak."
        ),
        _threshold("keep_threshold", "The image stays where the map of the keep words exceeds this share of its peak."),
        _count(
            "blend_pool",
            3,
            (1, 15),
            "LocalBlend: side of the max-pooling window that dilates the map, odd, in map pixels. 1 = no dilation.",
            label="blend dilation window",
        ),
        io.Boolean.Input(
            "blend_smooth",
            default=False,
            optional=True,
            tooltip="LocalBlend: upscale the map with bilinear instead of nearest interpolation.",
        ),
        _count(
            "blend_divisor",
            AUTOMATIC_DIVISOR,
            (0, 16),
            "LocalBlend: use maps of 1/n of the latent's resolution. 0 = automatic: 4, or less for small latents.",
            label="blend map resolution 1/n",
        ),
        _edited_maps(),
    ]


def layer_range_inputs() -> list:
    """The layers whose attention Prompt-to-Prompt changes."""
    return [
        fraction_input(
            "from_layer",
            0.0,
            "Fraction of the attention layers that stay unchanged, counted from the input, 0 to 1.",
            optional=True,
        ),
        fraction_input(
            "until_layer",
            1.0,
            "Attention changes up to this fraction of the layers, counted from the input: 1 = to the last.",
            optional=True,
        ),
    ]


def _edited_maps() -> Any:
    return reproduction_switch(
        io.Boolean,
        "edited_maps",
        display_name="blend by edited maps",
        default=False,
        optional=True,
        tooltip="LocalBlend: read the target's maps after the edit has changed them, as the published code does. Off: the "
        "target's own maps.",
    )


def _threshold(name: str, tooltip: str) -> io.Float.Input:
    return fraction_input(name, 0.3, f"LocalBlend, 0 to 1: {tooltip[0].lower()}{tooltip[1:]}", optional=True)


def _count(name: str, default: int, bounds: tuple[int, int], tooltip: str, *, label: str) -> io.Int.Input:
    low, high = bounds
    return io.Int.Input(name, display_name=label, default=default, min=low, max=high, optional=True, tooltip=tooltip)


def injection_fraction_inputs() -> list:
    """How long Plug-and-Play injects the source's features and attention."""
    return [
        fraction_input(
            "features_until", 0.8, "Fraction of the steps that use the source's residual features. 0 = none."
        ),
        fraction_input(
            "attention_until", 0.5, "Fraction of the steps that use the source's self-attention maps. 0 = none."
        ),
    ]


def injection_block_inputs() -> list:
    """Where Plug-and-Play injects."""
    return [
        reproduction_switch(
            io.Combo,
            "last_step",
            options=["inclusive", "exclusive"],
            default="inclusive",
            optional=True,
            tooltip="inclusive: inject one step longer, as the published code does (41 and 26 of 50 steps).",
        ),
        io.Int.Input(
            "feature_block",
            default=AUTOMATIC_BLOCK,
            min=-1,
            max=63,
            optional=True,
            tooltip="Index of the output block whose features are injected, from 0. -1 = automatic, a third of the way (4 of 12).",
        ),
        io.Int.Input(
            "attention_from",
            default=AUTOMATIC_BLOCK,
            min=-1,
            max=63,
            optional=True,
            tooltip="Index of the first output block whose self-attention is injected, from 0. -1 = automatic, as feature_block.",
        ),
    ]


# --- outputs ----------------------------------------------------------------------------------------------------------


def edited_output(tooltip: str = "Clean latent of the edited image.") -> io.Latent.Output:
    return io.Latent.Output("edited", display_name="latent", tooltip=tooltip)


def loss_curve_output(tooltip: str = "Loss over the steps, on a logarithmic axis.") -> io.Image.Output:
    return io.Image.Output("loss_curve", display_name="loss curve", tooltip=tooltip)


def report_output(tooltip: str) -> io.String.Output:
    return io.String.Output("report", display_name="report", tooltip=tooltip)
