"""DiffEdit nodes: the mask from two prompts, the masked decode of an inverted picture, and the whole method in one."""

from __future__ import annotations

from ..hosts import host as _host
from ..pipelines.blended.blending import finished_latent
from ..pipelines.core.guidance import EditPrompts
from ..pipelines.core.noise import image_seeds
from ..pipelines.core.sigmas import executed
from ..pipelines.diffedit import (
    DiffEditMask,
    DiffEditSettings,
    MaskRule,
    diffedit,
    diffedit_mask,
    heat_image,
    mask_in_pixels,
    masked_decode,
    strength_sigma,
)
from ..pipelines.inversion.ddim import MODES, InversionOptions
from ._api import EmbeddingsSocket, MaskScheduleSocket, TrajectorySocket, io, schema, show_text
from .blended.blending import MAX_SEED, as_schedule


def _model() -> io.Model.Input:
    return io.Model.Input("model", tooltip="Any model; LoRA, ControlNet and guidance patches stay in force.")


def _latent() -> io.Latent.Input:
    return io.Latent.Input("latent", tooltip="The encoded picture, or a batch of pictures.")


def _prompts() -> list:
    return [
        io.Conditioning.Input("source", tooltip="What the picture shows now; an empty prompt works too, less exactly."),
        io.Conditioning.Input("target", tooltip="What it should show; as 'source' but for what is to change."),
    ]


def _negative_and_cfg() -> list:
    return [
        io.MultiType.Input(
            "negative",
            types=[io.Conditioning, EmbeddingsSocket],
            tooltip="What to move away from, or the embeddings of a null-text inversion; not evaluated at cfg 1.",
        ),
        io.Float.Input(
            "cfg",
            default=7.5,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale of the decode; 7.5 as published, about 4 for the bundled model, 1 = none.",
        ),
    ]


def _ratio() -> io.Float.Input:
    return io.Float.Input(
        "encoding_ratio",
        default=0.8,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="How far up the noise levels the edit starts, 0 to 1; 0.8 as published. More changes more.",
    )


def _legacy_offset() -> io.Boolean.Input:
    return io.Boolean.Input(
        "legacy_offset",
        default=False,
        optional=True,
        tooltip="As diffusers: put the picture back one level too late, so that the outside does not end at the source. "
        "Only to reproduce its pictures.",
    )


def _mask_inputs() -> list:
    return [
        io.Int.Input("maps", default=10, min=1, max=100, tooltip="How many noises are compared; 10 as published."),
        io.Float.Input(
            "strength",
            default=0.5,
            min=0.02,
            max=1.0,
            step=0.01,
            tooltip="How much noise the comparison uses, 0 (none) to 1 (all); 0.5 as published.",
        ),
        io.Float.Input(
            "threshold",
            default=0.5,
            min=0.01,
            max=0.99,
            step=0.01,
            tooltip="Share of the ceiling above which a cell is edited, 0 to 1; 0.5 as published. Less gives a larger mask.",
        ),
    ]


def _seed() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=True,
        tooltip="Seed of the mask's noises. Image b of the batch uses seed + b.",
    )


def _rule_inputs() -> list:
    return [
        io.Float.Input(
            "clip_ratio",
            default=3.0,
            min=0.1,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="The ceiling, as a multiple of the picture's mean difference (at least 0.1); 3 as published.",
        ),
        io.Int.Input(
            "smooth",
            default=1,
            min=1,
            max=31,
            step=2,
            optional=True,
            tooltip="Side in latent cells, odd, of the square over which differences are averaged first; 1 = as published.",
        ),
        io.Int.Input(
            "smallest_island",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="Connected parts of the mask with fewer latent cells are dropped; 0 keeps all.",
        ),
    ]


def _vae_for_size() -> io.Vae.Input:
    return io.Vae.Input(
        "vae",
        optional=True,
        tooltip="Says how many pixels a cell has, where the LATENT does not: one from a native VAE Encode.",
    )


def _mask_outputs() -> list:
    return [
        io.Mask.Output(
            "mask", display_name="mask", tooltip="What must change, at the size of the picture, [B, H, W], 1 = edit."
        ),
        io.Mask.Output(
            "latent_mask", display_name="latent mask", tooltip="The same on the latent grid, [B, h, w], 1 = edit."
        ),
        io.Image.Output(
            "heat_map",
            display_name="heat map",
            tooltip="How much the two prompts disagree, black to white, up to the ceiling.",
        ),
    ]


def _shown(found: DiffEditMask, size: tuple[int, int, int]) -> tuple:
    """The three mask outputs, and what the node says about them."""
    mask, heat = _host.to_host(mask_in_pixels(found.mask, *size)), _host.to_host(heat_image(found.heat, *size))
    shares = ", ".join(f"{share:.0%}" for share in found.mask.mean(dim=(1, 2)).tolist())
    text = f"to edit: {shares} of the picture"
    if found.empty:
        text += f". Nothing found in image {', '.join(map(str, found.empty))}: do the prompts differ?"
    return (mask, _host.to_host(found.mask), heat), text


class DiffEditMaskNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DiffEditMask",
            display_name="Mask from two prompts (DiffEdit)",
            category="EditKit/mask",
            description=(
                "Finds what must change for the picture to fit another prompt: where the model, shown the same noised picture, "
                "predicts different things for the two. Equal prompts give an empty mask and a warning."
            ),
            search_aliases=["automatic mask", "text mask", "prompt difference", "segmentation"],
            inputs=[
                _model(),
                _latent(),
                *_prompts(),
                *_mask_inputs(),
                _seed(),
                *_rule_inputs(),
                io.Float.Input(
                    "sigma",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    optional=True,
                    tooltip="Instead of strength: the noise level to compare at, in sigmas. 0 = from strength.",
                ),
                io.Boolean.Input(
                    "batch_mean",
                    default=False,
                    optional=True,
                    tooltip="As the published code: one ceiling for the whole batch, so that pictures change each other's mask.",
                ),
                _vae_for_size(),
            ],
            outputs=[
                *_mask_outputs(),
                io.Mask.Output(
                    "change",
                    display_name="soft map",
                    tooltip="The disagreement on the latent grid, 0 to 1: a change map for 'Change by degrees'.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, latent, source, target, maps, strength, threshold, seed, clip_ratio=3.0, smooth=1, smallest_island=0,
        sigma=0.0, batch_mean=False, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        clean, size = _host.unnoised_samples(latent, "latent"), _host.image_size(latent, vae)
        rule = MaskRule(clip_ratio, threshold, smooth, smallest_island, batch_mean)
        contexts = [_host.context(source, "source"), _host.context(target, "target")]
        with _host.open_denoiser(model, clean.shape, contexts) as denoiser:
            found = diffedit_mask(
                denoiser, clean, *contexts, maps=maps, rule=rule,
                sigma=sigma if sigma > 0 else strength_sigma(denoiser, strength),
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")),
                rows=_host.batch_that_fits(model, clean.shape), progress=_host.progress(maps),
            )  # fmt: skip
        outputs, text = _shown(found, size)
        return io.NodeOutput(*outputs, _host.to_host(found.heat), ui=show_text(cls, outputs[2], text))


class MaskedDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_MaskedDecode",
            display_name="Masked decode (DiffEdit)",
            category="EditKit/inversion",
            description=(
                "Denoises an inverted picture towards the prompt under the mask, and puts its own path back outside after every "
                "step, at the same noise level. The latent outside the mask ends as the source's, bit for bit."
            ),
            search_aliases=["diffedit", "decode", "masked sampling"],
            inputs=[
                _model(),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                *_negative_and_cfg(),
                TrajectorySocket.Input("trajectory", tooltip="From 'Invert picture', with this model."),
                io.MultiType.Input(
                    "latent_mask",
                    types=[io.Mask, MaskScheduleSocket],
                    tooltip="Where to edit, on the latent grid, 1 = edit: a MASK, or a mask schedule.",
                ),
                _ratio(),
                _legacy_offset(),
            ],
            outputs=[io.Latent.Output("edited", display_name="latent", tooltip="The edited, clean latent.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, trajectory, latent_mask, encoding_ratio, legacy_offset=False
    ) -> io.NodeOutput:
        path, masks = _host.trajectory_in(trajectory), as_schedule(latent_mask)
        towards, against = _host.context(positive, "positive"), _host.negative_in(negative)
        shape, like = (max(path.batch, masks.batch), *path.latents.shape[2:]), _host.trajectory_rest(trajectory)
        opened = _host.opened_for(towards, against, cfg)
        with _host.open_denoiser(model, shape, opened, sigmas=path.sigmas) as denoiser:
            z = masked_decode(
                denoiser, path, masks, EditPrompts(towards, against, cfg), ratio=encoding_ratio, legacy_offset=legacy_offset,
                progress=_host.progress(executed(path.steps, encoding_ratio), model),
            )  # fmt: skip
            edited = denoiser.scale_out(z)
        if not legacy_offset:
            edited = finished_latent(edited, path.source_latent, masks, path.sigmas)
        return io.NodeOutput(_host.finished_out(edited, like=like))


class DiffEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditKit_DiffEdit",
            display_name="Edit by two prompts (DiffEdit)",
            category="EditKit/inversion",
            description=(
                "The whole method: find what must change between two prompts, invert the picture, and decode it towards the "
                "target there. Outside the mask the latent is the source's, bit for bit. Each step is a node of its own, too."
            ),
            search_aliases=["automatic mask edit", "text edit", "diffedit"],
            inputs=[
                _model(),
                _latent(),
                *_prompts(),
                *_negative_and_cfg(),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Steps of the whole grid."),
                _ratio(),
                *_mask_inputs(),
                _seed(),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="next",
                    optional=True,
                    tooltip="How to invert. next: not for flow models; implicit: exact, up to 5 times the inversion's cost.",
                ),
                *_rule_inputs(),
                _legacy_offset(),
                io.Conditioning.Input(
                    "inversion",
                    optional=True,
                    tooltip="The prompt of the inversion; without it, 'source'. Published: empty.",
                ),
                _vae_for_size(),
            ],
            outputs=[
                io.Latent.Output("edited", display_name="latent", tooltip="The edited, clean latent."),
                *_mask_outputs(),
            ],
        )

    @classmethod
    def execute(
        cls, model, latent, source, target, negative, cfg, steps, encoding_ratio, maps, strength, threshold, seed,
        mode="next", clip_ratio=3.0, smooth=1, smallest_island=0, legacy_offset=False, inversion=None, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        clean, size = _host.unnoised_samples(latent, "latent"), _host.image_size(latent, vae)
        settings = DiffEditSettings(
            steps, encoding_ratio, maps, strength, cfg, legacy_offset,
            MaskRule(clip_ratio, threshold, smooth, smallest_island), InversionOptions(mode),
        )  # fmt: skip
        shown, towards = _host.context(source, "source"), _host.context(target, "target")
        inverted = shown if inversion is None else _host.context(inversion, "inversion")
        against = _host.negative_in(negative)
        opened = [*_host.opened_for(towards, against, cfg), *_host.prompts_to_open(shown, inverted)]
        levels = _host.levels(model).schedule(steps)
        with _host.open_denoiser(model, clean.shape, opened, sigmas=levels) as denoiser:
            result = diffedit(
                denoiser, clean, shown, towards, against,
                seeds=image_seeds(seed, len(clean), latent.get("batch_index")), settings=settings,
                inversion=inverted, rows=_host.batch_that_fits(model, clean.shape),
                progress=_host.progress(maps + 2 * executed(steps, encoding_ratio), model),
            )  # fmt: skip
        outputs, text = _shown(result.mask, size)
        edited = _host.finished_out(result.latent, like=latent)
        return io.NodeOutput(edited, *outputs, ui=show_text(cls, outputs[2], text))


NODES = [DiffEditMaskNode, MaskedDecode, DiffEdit]
